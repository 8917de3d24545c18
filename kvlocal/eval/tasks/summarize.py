"""Summaries: news articles of CNN/DailyMail, and LongBench's groups of reports about one event."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from kvlocal.errors import UsageError
from kvlocal.eval.cases import Case, Question
from kvlocal.jsonl import TEXT, TEXTS, Kind, Row, read_rows


@dataclass(frozen=True)
class Format:
    """One kind of file: in which fields it has the document and the reference summaries, and what is asked."""

    task: str
    document: str
    reference: str
    kind: Kind
    question: str
    n_answer: int


FORMATS = (
    Format(
        "cnn_dailymail", "article", "highlights", TEXT, "Tell in three sentences what the article above reports.", 128
    ),
    Format("multi_news", "context", "answers", TEXTS, "Tell in one paragraph what the news reports above say.", 256),
)
"""CNN/DailyMail (Hermann et al., arXiv:1506.03340) and Multi-News (Fabbri et al., arXiv:1906.01749) of LongBench."""


def summary_cases(path: Path, *, rows: int = 0) -> list[Case]:
    """The rows of a file, whose kind is found by the fields of its first row; scored by
    :func:`kvlocal.eval.scores.rouge`.

    CNN/DailyMail has ``article`` and ``highlights``, LongBench's ``multi_news`` has ``context`` and ``answers``. Texts
    are taken as they are: the line breaks of ``multi_news`` are the word ``NEWLINE_CHAR``.

    Args:
        rows: at most so many, from the first; 0 for all.

    Raises:
        UsageError: no such file, another kind of file, or a row with a fault.
    """
    found = read_rows(path, {}, rows=rows)
    form = next((form for form in FORMATS if {form.document, form.reference} <= found[0].fields.keys()), None)
    if form is None:
        wanted = " or ".join(f"'{form.document}' and '{form.reference}'" for form in FORMATS)
        raise UsageError(f"{found[0].place}: no summaries to be found; a row must have the fields {wanted}.")
    return [_case(form, row) for row in found]


def _case(form: Format, row: Row) -> Case:
    row.require({form.document: TEXT, form.reference: form.kind})
    document, reference = row[form.document].strip(), row[form.reference]
    references = (reference,) if isinstance(reference, str) else tuple(reference)
    if not document or not references[0].strip():
        raise UsageError(f"{row.place}: '{form.document}' and '{form.reference}' must not be empty.")
    question = Question(form.question, references, form.n_answer)
    return Case(f"{form.task}/{row.line}", form.task, document + "\n\n", (question,))
