"""The base of all retrievers: where units of a text end, and how they are scored and read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import ClassVar, Protocol

from kvlocal.errors import UsageError
from kvlocal.native.retrieval import Retrieval
from kvlocal.params import validate, whole


class Vocabulary(Protocol):
    """What tokens stand for."""

    def piece(self, token: int) -> str:
        """Its text; bytes that are only part of a character are replaced."""
        ...

    def entry(self, token: int) -> str:
        """What the vocabulary itself calls it, byte by byte escaped or not."""
        ...


@dataclass(frozen=True, kw_only=True)
class Retriever:
    """Base of all retrievers. Subclasses are dataclasses whose fields are their parameters.

    They define :meth:`ends` and :meth:`retrieval`. Class attributes: ``name`` (as on the command line) and ``paper``
    (reference).
    """

    kind: ClassVar[str] = "retriever"
    name: ClassVar[str] = ""
    paper: ClassVar[str] = ""

    budget: int = whole(1024, low=1, help="tokens per head that a token reads, besides the unit that is open")

    def __post_init__(self) -> None:
        validate(self)
        asked = self.retrieval()
        if asked.sink + asked.recent > asked.budget:
            raise UsageError(
                f"Retriever {self.name} always reads the first {asked.sink} and the last {asked.recent} tokens, which "
                f"a budget of {asked.budget} does not hold; give --retrieve-budget {asked.sink + asked.recent} or more."
            )

    def __str__(self) -> str:
        """Its name, its budget, and what is not as by default, such as ``sentencekv 512 share=head``."""
        parts = [self.name, str(self.budget)]
        for f in fields(self):
            value = getattr(self, f.name)
            parts += [f"{f.name}={value}"] if f.name != "budget" and value != f.default else []
        return " ".join(parts)

    @property
    def n_queries(self) -> int:
        """Queries that the cache must remember."""
        return self.retrieval().n_queries

    def ends(self, tokens: Sequence[int], vocabulary: Vocabulary) -> list[int]:
        """Where units close in a text that begins with a unit: tokens before each end, ascending, below
        ``len(tokens)``. What more tokens would say of an end that is given must not matter."""
        raise NotImplementedError

    def retrieval(self) -> Retrieval:
        """How units are scored and read."""
        raise NotImplementedError
