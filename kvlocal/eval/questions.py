"""Questions about documents: every case under every variant, with the question seen by the eviction or not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass

import numpy as np

from kvlocal.errors import UsageError
from kvlocal.eval.cases import Case, Question, Score
from kvlocal.eval.evaluation import Evaluation
from kvlocal.eval.records import Record, Store, digest, identity, variant_key
from kvlocal.eval.scores import measure
from kvlocal.eval.stage import Branch, Stage, StageConfig, group, open_stages
from kvlocal.measure.variants import Variant
from kvlocal.models.marks import Piece
from kvlocal.models.template import chat_pieces, has_template, piece_tokens, split_pieces
from kvlocal.native.model import Model

_DOCUMENT, _ANSWER = "kvlocaldocument", "kvlocalanswer"  # stand for them while a template is rendered


@dataclass(frozen=True)
class Turns:
    """A case as tokens: the document, the first question up to where the model answers, and the later ones."""

    document: list[int]
    questions: list[list[int]]


def turns(model: Model, case: Case) -> Turns:
    """A case in the model's chat template, or as plain text if it has none; nothing in it becomes a control token."""

    def rendered(messages: list[dict[str, str]]) -> list[Piece]:
        if has_template(model):
            return chat_pieces(model, messages)
        return [Piece("\n".join(message["content"] for message in messages) + "\n", control=False)]

    def split(messages: list[dict[str, str]], text: str) -> tuple[list[Piece], list[Piece]]:
        found = split_pieces(rendered(messages), text)
        if found is None:
            raise UsageError(f"The chat template of {model.name} leaves out what the case {case.id} says.")
        return found

    first = case.questions[0]
    core = case.document.strip()
    lead, _, trail = case.document.partition(core) if core else ("", "", case.document)
    messages = [{"role": "user", "content": f"{lead}{_DOCUMENT}{trail}{first.text}"}]
    before, after = split(messages, _DOCUMENT)
    head = piece_tokens(model, [*before, Piece(core, control=False)])
    tails = [_tail(model, after, first, head[-1] if head else None)]
    for question in case.questions[1:]:
        messages += [{"role": "assistant", "content": _ANSWER}, {"role": "user", "content": question.text}]
        tails.append(_tail(model, split(messages, _ANSWER)[1], question, None))
    return Turns(head, tails)


def _tail(model: Model, pieces: list[Piece], question: Question, after: int | None) -> list[int]:
    """Tokens from behind the document, or an answer, to where the model goes on."""
    parts = [*((piece.text, piece.control) for piece in pieces), (question.answer_prefix, False)]
    return [token for part in model.tokenize_parts(parts, add_special=False, after=after) for token in part]


Want = tuple[Variant, str]
"""A variant, and whether its eviction sees the first question (``inside``) or only the document (``after``)."""


class Ask(Evaluation[Case, Want]):
    """Runs cases under variants, with the question ``inside`` and ``after``, as ``modes`` say.

    ``metric`` is its name in the records; ``score`` makes measures of an answer.
    """

    def __init__(
        self,
        model: Model,
        metric: str,
        cases: Sequence[Case],
        score: Score,
        variants: Sequence[Variant],
        modes: Sequence[str],
        config: StageConfig,
        store: Store,
    ) -> None:
        super().__init__(cases, [(variant, mode) for mode in modes for variant in variants], store)
        self.model, self.metric, self.score, self.variants, self.config = model, metric, score, variants, config

    def key(self, unit: Case, want: Want) -> str:
        return digest(self.metric, asdict(unit), variant_key(want[0]), want[1])

    def open(self, stack: ExitStack) -> None:
        self._stages = open_stages(self.model, group(self.variants), self.config, stack)

    def measure(self, unit: Case, missing: Sequence[Want]) -> Iterator[tuple[int, str]]:
        case_turns = turns(self.model, unit)
        self._check(unit, case_turns)
        done = 0
        for stage, variants in self._stages:
            # in this order: the document alone must be the newest text when what follows it is not to be seen
            for mode in ("after", "inside"):
                wanted = [v for v, m in missing if m == mode and v in variants]
                if wanted:
                    yield done, unit.id
                    stage.read(case_turns.document + (case_turns.questions[0] if mode == "inside" else []))
                for i in range(0, len(wanted), self.config.parallel):
                    some = wanted[i : i + self.config.parallel]
                    yield done, unit.id
                    self._run_some(stage, unit, case_turns, mode, some)
                    stage.close_branches()
                    done += len(some)

    def _check(self, case: Case, case_turns: Turns) -> None:
        n = len(case_turns.document) + sum(map(len, case_turns.questions)) + sum(q.n_answer for q in case.questions)
        if n >= self.config.n_ctx:
            raise UsageError(
                f"The case {case.id} needs {n} tokens, the context has room for {self.config.n_ctx - 1}; use a larger "
                "context (-c) if the model allows it, or shorter cases."
            )

    def _run_some(self, stage: Stage, case: Case, case_turns: Turns, mode: str, variants: Sequence[Variant]) -> None:
        branches = [stage.branch(seq, variant) for seq, variant in enumerate(variants, start=1)]
        measures: list[list[dict[str, float]]] = [[] for _ in branches]
        answers: list[list[str]] = [[] for _ in branches]
        for turn, question in enumerate(case.questions):
            if turn == 0 and mode == "inside":
                logits = np.array([branch.logits for branch in branches])
            else:
                follow = np.array(case_turns.questions[turn], np.int32)
                logits = stage.extend(branches, np.tile(follow, (len(branches), 1)))
            for i, tokens in enumerate(stage.answer(branches, logits, question.n_answer)):
                answers[i].append(self.model.detokenize(tokens))
                measures[i].append(measure(self.score, answers[i][-1], question))
        for branch, given, found in zip(branches, answers, measures, strict=True):
            self.store.put(self.key(case, (branch.variant, mode)), self._record(case, mode, branch, given, found))

    def _record(
        self, case: Case, mode: str, branch: Branch, answers: list[str], measures: list[dict[str, float]]
    ) -> Record:
        means = {name: float(np.mean([m[name] for m in measures])) for name in measures[0]}
        if len(measures) > 1:  # the first question is the one that the eviction may have seen
            later = float(np.mean([m["score"] for m in measures[1:]]))
            means |= {"score_first": measures[0]["score"], "score_later": later}
        return Record(
            metric=self.metric,
            task=case.task,
            case=case.id,
            question=mode,
            held_mean=branch.held_mean,
            used_bytes=branch.used_bytes,
            full_bytes=branch.full_bytes,
            evict_s=branch.evict_s,
            measures=means,
            labels=dict(case.labels),
            answer="\n".join(answers),
            **identity(branch.variant),
        )
