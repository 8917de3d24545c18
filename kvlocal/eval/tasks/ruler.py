"""RULER: rows made by its generator (NVIDIA/RULER), one file per task."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from kvlocal.errors import UsageError
from kvlocal.eval.cases import Case, Question
from kvlocal.jsonl import TEXT, TEXTS, WHOLE, Row, read_rows

N_ANSWER = {"niah": 128, "vt": 30, "cwe": 120, "fwe": 50, "qa": 32}
"""Most tokens of an answer, by prefix of the task's name, as in RULER."""

_N_ANSWER_ELSE = 128
_FIELDS = {"index": WHOLE, "input": TEXT, "outputs": TEXTS}


def ruler_cases(folder: Path, *, tasks: Sequence[str] = (), rows: int = 0) -> list[Case]:
    """The rows of every ``*.jsonl`` of a folder, whose stem is the task, in the order of the names.

    Paper: Hsieh et al., *RULER: What's the Real Context Size of Your Long-Context Language Models?*, arXiv:2404.06654.

    A row has ``input``, ``outputs``, ``index`` and, if its answer is begun for the model, ``answer_prefix``. The
    question is the last line of ``input``, the document all before it; white space at the end of ``input`` is left out.

    Args:
        tasks: only these, in this order.
        rows: at most so many of each task, from the first; 0 for all.

    Raises:
        UsageError: no such folder, no ``*.jsonl`` in it, a task that is not there, a row with a fault.
    """
    if not folder.is_dir():
        raise UsageError(f"There is no folder {folder}; give one with a .jsonl file per RULER task.")
    files = {path.stem: path for path in sorted(folder.glob("*.jsonl"))}
    if not files:
        raise UsageError(f"The folder {folder} holds no .jsonl file; give one with a .jsonl file per RULER task.")
    missing = [task for task in tasks if task not in files]
    if missing:
        raise UsageError(f"The folder {folder} has no task {', '.join(missing)}; it has {', '.join(files)}.")
    return [case for task in tasks or files for case in _cases(task, read_rows(files[task], _FIELDS, rows=rows))]


def n_answer(task: str) -> int:
    """Most tokens of an answer to a task."""
    return next((n for prefix, n in N_ANSWER.items() if task.startswith(prefix)), _N_ANSWER_ELSE)


def _cases(task: str, rows: Sequence[Row]) -> list[Case]:
    cases: dict[str, Case] = {}
    for row in rows:
        case = _case(task, row)
        if case.id in cases:
            raise UsageError(f"{row.place}: the index {row['index']} was there before; give every row its own.")
        cases[case.id] = case
    return list(cases.values())


def _case(task: str, row: Row) -> Case:
    prefix = row.fields.get("answer_prefix", "")
    if not isinstance(prefix, str):
        raise UsageError(f"{row.place}: the field 'answer_prefix' must be {TEXT.name}.")
    text = row["input"].rstrip()
    if not text:
        raise UsageError(f"{row.place}: the field 'input' is empty; it must hold a document and a question.")
    split = text.rfind("\n") + 1
    # the outputs of a qa task are variants of one answer; elsewhere all of them count
    question = Question(text[split:], tuple(row["outputs"]), n_answer(task), prefix, any_of=task.startswith("qa"))
    return Case(f"{task}/{row['index']}", task, text[:split], (question,))
