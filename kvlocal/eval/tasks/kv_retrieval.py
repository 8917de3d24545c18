"""Key-value retrieval: one value out of a JSON object of random keys and values."""

from __future__ import annotations

import json
from pathlib import Path

from kvlocal.errors import UsageError
from kvlocal.eval.cases import Case, Question
from kvlocal.jsonl import PAIRS, TEXT, Row, read_rows

TASK = "kv_retrieval"

_N_ANSWER = 48  # a value has 36 characters, some 30 tokens
_HEADER = "This is a JSON object that stores one random value under each of its random keys."
_FIELDS = {"ordered_kv_records": PAIRS, "key": TEXT, "value": TEXT}


def kv_cases(path: Path, *, rows: int = 0) -> list[Case]:
    """The rows of a file of lost-in-the-middle; scored by :func:`kvlocal.eval.scores.contains`.

    Paper: Liu et al., *Lost in the Middle: How Language Models Use Long Contexts*, arXiv:2307.03172.

    A row has ``ordered_kv_records`` (pairs of key and value), ``key`` and ``value``. The document holds the records in
    their order, one per line. Labels: ``depth``, the asked record's place from 0 (first) to 1 (last), and ``n_keys``.

    Args:
        rows: at most so many, from the first; 0 for all.

    Raises:
        UsageError: no such file, or a row with a fault.
    """
    return [_case(row) for row in read_rows(path, _FIELDS, rows=rows)]


def _case(row: Row) -> Case:
    records, key, value = row["ordered_kv_records"], row["key"], row["value"]
    places = [place for place, record in enumerate(records) if record[0] == key]
    if len(places) != 1 or records[places[0]][1] != value or not value:
        raise UsageError(f"{row.place}: 'ordered_kv_records' must hold 'key' once, with 'value', which is not empty.")
    lines = ",\n".join(f" {json.dumps(k, ensure_ascii=False)}: {json.dumps(v, ensure_ascii=False)}" for k, v in records)
    question = f'Which value does the JSON object store under the key "{key}"? Reply with that value and nothing else.'
    return Case(
        id=f"{TASK}/{row.line}",
        task=TASK,
        document=f"{_HEADER}\n\n{{\n{lines}\n}}\n\n",
        # begun as the object would go on: a small model repeats the key before it comes to the value
        questions=(Question(question, (value,), _N_ANSWER, f'"{key}": "'),),
        labels={"depth": places[0] / max(1, len(records) - 1), "n_keys": len(records)},
    )
