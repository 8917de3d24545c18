"""A case of an evaluation: a document, questions about it, and how an answer is scored."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

Score = Callable[[str, Sequence[str]], Mapping[str, float]]
"""From an answer and the expected strings to measures by name; tables show ``score``, 0 to 1."""


@dataclass(frozen=True)
class Question:
    """One question.

    Attributes:
        text: follows the document in the user's turn (the first question) or is a turn of its own (later ones).
        expected: what the answer should hold, all of it; with ``any_of`` they are several ways to say one thing.
        n_answer: most tokens of the answer.
        answer_prefix: how the assistant's turn begins; the model goes on from there.
    """

    text: str
    expected: tuple[str, ...]
    n_answer: int
    answer_prefix: str = ""
    any_of: bool = False


@dataclass(frozen=True)
class Case:
    """One document and the questions about it.

    Attributes:
        id: tells it from the other cases of its evaluation, the same in every run.
        task: the group whose scores are averaged.
        document: what the user's turn begins with; ends with the white space that parts it from a question.
        questions: at least one.
        labels: what else is known of it, such as a needle's depth.
    """

    id: str
    task: str
    document: str
    questions: tuple[Question, ...]
    labels: Mapping[str, float | str] = field(default_factory=dict)
