"""The retrievers by name."""

from __future__ import annotations

from collections.abc import Mapping

from kvlocal.errors import UsageError
from kvlocal.params import closest, values_of
from kvlocal.retrieval.attention import Attention
from kvlocal.retrieval.quest import Quest
from kvlocal.retrieval.recent import Recent
from kvlocal.retrieval.retriever import Retriever
from kvlocal.retrieval.sentencekv import SentenceKV

REGISTRY: dict[str, type[Retriever]] = {cls.name: cls for cls in (SentenceKV, Quest, Attention, Recent)}


def make_retriever(name: str, args: Mapping[str, object] | None = None) -> Retriever:
    """Builds a retriever from its name and parameters; text is converted to the type of the field.

    Raises:
        UsageError: unknown retriever, unknown parameter or a value that is not allowed.
    """
    if name not in REGISTRY:
        raise UsageError(
            f"There is no retriever {name!r}{closest(name, REGISTRY)}; known retrievers: {', '.join(REGISTRY)}."
        )
    cls = REGISTRY[name]
    return cls(**values_of(cls, args or {}))


UNITS = SentenceKV()
"""Its units are those of an archive where no retriever says how a text is cut."""
