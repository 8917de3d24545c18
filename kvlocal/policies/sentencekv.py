"""SentenceKV as its paper has it: SnapKV keeps a part of the prompt, and of that a part is read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvlocal.policies.snapkv import SnapKV


@dataclass(frozen=True, kw_only=True)
class SentenceKV(SnapKV):
    """Keeps what SnapKV keeps; a token reads the sentences of it that answer best.

    Paper: Zhu et al., *SentenceKV: Efficient LLM Inference via Sentence-Level Semantic KV Caching*, arXiv:2504.00970.

    Formula: that of ``snapkv`` with ``budget`` = r tau, and that of the retriever ``sentencekv`` with
    ``--retrieve-budget`` = tau; the paper has r of 2 or 3.

    Shapes: as ``snapkv``.
    Limits: what the first question did not look at is gone, as with ``snapkv``; the same retriever over another policy
    or storage (``--retrieve sentencekv``) is not bound to that. Scores are pooled per KV head, which is the authors'
    code; their paper adds them up over the heads of a layer.
    """

    name: ClassVar[str] = "sentencekv"
    paper: ClassVar[str] = "SentenceKV, arXiv:2504.00970"
    reads: ClassVar[str] = "sentencekv"
