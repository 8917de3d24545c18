"""The base of all evaluations: units of work, their records, and measuring those that have none."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Generic, TypeVar

from kvlocal.eval.records import Record, Store

Unit = TypeVar("Unit")
Want = TypeVar("Want")


@dataclass(frozen=True)
class Step:
    """Progress: ``done`` of ``total`` results, and the name of the next one."""

    done: int
    total: int
    what: str


OnStep = Callable[[Step], None]


class Evaluation(Generic[Unit, Want]):
    """Every unit (a case, an excerpt) under everything that is wanted of it (a variant, asked in some way).

    Subclasses define :meth:`key`, :meth:`open` and :meth:`measure`.
    """

    def __init__(self, units: Sequence[Unit], wants: Sequence[Want], store: Store) -> None:
        self.units, self.wants, self.store = units, wants, store

    def key(self, unit: Unit, want: Want) -> str:
        """The key of a result on record; it changes with everything that the result depends on."""
        raise NotImplementedError

    def open(self, stack: ExitStack) -> None:
        """Open the contexts, when something has to be measured; ``stack`` closes them."""
        raise NotImplementedError

    def measure(self, unit: Unit, missing: Sequence[Want]) -> Iterator[tuple[int, str]]:
        """Measure and record what is missing of a unit; yield, before each part, how much is done and what is next."""
        raise NotImplementedError

    def run(self, on_step: OnStep = lambda _step: None) -> Iterator[Record]:
        """Every record, measured now or before, unit by unit; those of a unit in the order of what is wanted."""
        total = len(self.units) * len(self.wants)
        with ExitStack() as stack:
            is_open = False
            for i, unit in enumerate(self.units):
                missing = [want for want in self.wants if self.store.get(self.key(unit, want)) is None]
                if missing and not is_open:
                    self.open(stack)
                    is_open = True
                before = (i + 1) * len(self.wants) - len(missing)
                for done, what in self.measure(unit, missing) if missing else ():
                    on_step(Step(before + done, total, what))
                for want in self.wants:
                    record = self.store.get(self.key(unit, want))
                    assert record is not None
                    yield record
        on_step(Step(total, total, ""))
