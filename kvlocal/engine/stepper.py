"""How a sequence goes on: the tokens that come next."""

from __future__ import annotations

from collections.abc import Sequence as Tokens
from typing import Protocol

from kvlocal.engine.sequence import Sequence
from kvlocal.native.sampling import Sampler, Sampling


class Stepper(Protocol):
    """Chooses what comes next from the logits of a sequence's last token."""

    def next(self, sequence: Sequence) -> list[int]:
        """The next tokens, one at least; the first that ends the answer ends the list."""
        ...

    def close(self) -> None:
        """Give back what is native."""
        ...


class Plain:
    """One token at a time, drawn by llama.cpp's samplers."""

    def __init__(self, sampling: Sampling, n_vocab: int, ends: Tokens[int]) -> None:
        """``ends``: the tokens that end an answer."""
        self._sampler = Sampler(sampling, n_vocab, ends if sampling.ignore_eos else ())

    def next(self, sequence: Sequence) -> list[int]:
        kept = sequence.kept_logits
        if kept is not None:
            return [self._sampler.sample_from(kept)]
        output = -1 if sequence.output is None else sequence.output
        return [self._sampler.sample(sequence.context.handle, output)]

    def close(self) -> None:
        self._sampler.close()
