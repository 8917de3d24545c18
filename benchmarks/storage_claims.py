"""What the mean of the keys, 3-bit keys and sinks are worth: attention over keys and values that were stored and read.

Keys, values and queries come from a text in f16. They are stored by the encoders of the cache and read again, and the
attention of the last queries over them is compared with that over the originals, in numpy: the relative error of a
head's output and the KL divergence (nats) of its softmax, mean over layers, heads and queries. Twice: the model that is
given over a novel, and a model with random weights whose keys lie far from zero in a few channels, over random tokens;
of this one also the KL divergence of the logits, by the cache itself.

The schemes are those of a study on synthetic heads (spec: quant, section 3.3, last table) as far as they exist here.

    python benchmarks/storage_claims.py              # some minutes
    python benchmarks/storage_claims.py --tokens 512 # to see that it runs
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from common import ROOT, command, model_path, parser, table, write_json
from quality import NOVELS
from quality_storage import all_kept
from threadpoolctl import threadpool_limits

from kvlocal.doctor.rows import decode_rows, encode_rows, group_slots
from kvlocal.errors import UsageError
from kvlocal.eval.records import Store, rows
from kvlocal.eval.stage import StageConfig
from kvlocal.eval.texts import Excerpt, Kld, excerpts
from kvlocal.measure.bench import random_tokens
from kvlocal.models.f32 import f32_copy, to_f32
from kvlocal.models.random import OffsetShape, write_random_model
from kvlocal.native.cache import PagedCache
from kvlocal.native.context import Context, ContextConfig
from kvlocal.native.model import Model
from kvlocal.storage.storage import Storage

Floats = np.ndarray

OFFSETS = OffsetShape("offsets", "qwen2", 4, 1024, 8, 2, 128, 2048, 4096, 1000000.0, 32768, tied=True, rms_eps=1e-6)
"""Four layers, GQA of 4, heads of 128, the base of Qwen 2.5."""

PROTECTIONS = {
    "nothing": Storage("kv3", sink=0, tail=0),
    "last 128": Storage("kv3", sink=0, tail=128),
    "4, last 128": Storage("kv3", sink=4, tail=128),
    "32, last 128": Storage("kv3", sink=32, tail=128),
    "LogQuant's": Storage("logquant", tail=128),
}
"""What stays in f16: first tokens, last tokens; or LogQuant's choice of at most 128."""

LOGITS = (
    *("q8", "q4", "q4:centre=0", "kv3", "kv3:centre=0", "kv2", "kv2:centre=0"),
    *("kivi", "kivi:group=64", "kivi:sink=32", "kivi:bits=4"),
)
"""Storages whose logits are compared."""

CHUNK = 512  # tokens of one pass


@dataclass(frozen=True)
class Scheme:
    """How keys and values are stored: rows of :data:`ROWS`; rotated before, without their mean."""

    name: str
    k_row: str
    v_row: str
    rotate: bool = False
    centre: bool = False

    @property
    def label(self) -> str:
        return ", ".join([self.name, *["rotated"] * self.rotate, *["mean"] * self.centre])


def schemes() -> list[Scheme]:
    """Every format, rotated and without its keys' mean or not; per channel (kivi); per token (token2)."""
    out = []
    for name, k, v in (("q8", "q8", "q8"), ("q4", "q4", "q4"), ("kv3", "kv3", "kv2"), ("kv2", "kv2", "kv2")):
        out += [Scheme(name, k, v, rotate, centre) for rotate in (False, True) for centre in (False, True)]
    for bits in (4, 2):
        for group in (32, 64):
            out.append(Scheme(f"kivi {bits} bit, groups of {group}", f"kivi{bits}-{group}-k", f"kivi{bits}-{group}"))
    return [*out, Scheme("token2", "token2", "token2")]


@dataclass(frozen=True)
class Head:
    """One KV head of a layer: queries ``[n_queries, group, d]`` of its last tokens, keys and values ``[n, d]``."""

    q: Floats
    k: Floats
    v: Floats
    scale: float


@cache
def hadamard(d: int) -> Floats:
    """The orthonormal, symmetric Walsh-Hadamard matrix of the largest power of two that divides ``d``."""
    out = np.ones((1, 1), np.float32)
    while d % (2 * len(out)) == 0:
        out = np.block([[out, out], [out, -out]])
    return out / np.float32(len(out) ** 0.5)


def rotated(x: Floats) -> Floats:
    """Every block of every row of ``x`` ``[n, d]`` times :func:`hadamard`; its own inverse."""
    h = hadamard(x.shape[1])
    return (x.reshape(-1, len(h)) @ h).reshape(x.shape)


def stored(scheme: Scheme, head: Head, due: np.ndarray) -> tuple[Floats, Floats, float]:
    """Keys and values with what is ``due`` as it is read after it was stored, and the bits per value of all of them.

    Of a scheme that groups tokens whole groups only, the earliest; the mean is of the keys that are stored.
    """
    step = group_slots(scheme.k_row)
    due = due[: len(due) // step * step]
    bits = 0
    both = []
    for x, row, centre in ((head.k, scheme.k_row, scheme.centre), (head.v, scheme.v_row, False)):
        rows_in = x[due]
        mean = rows_in.mean(axis=0) if centre and len(due) else np.float32(0)
        rows_in = rows_in - mean
        codes = encode_rows(row, rotated(rows_in) if scheme.rotate else rows_in)
        read = decode_rows(row, codes)
        out = x.copy()
        out[due] = (rotated(read) if scheme.rotate else read) + mean
        both.append(out)
        bits += 8 * codes.nbytes + 16 * (x.size - rows_in.size)
    return both[0], both[1], bits / (head.k.size + head.v.size)


def attention(head: Head, k: Floats, v: Floats) -> tuple[Floats, Floats]:
    """Log-probabilities ``[n_queries * group, n]`` (``-inf`` for keys that a query does not see) and outputs."""
    n_queries, group, d = head.q.shape
    seen = np.arange(len(k)) <= (len(k) - n_queries + np.arange(n_queries))[:, None]
    z = head.q.reshape(-1, d) @ k.T * np.float32(head.scale)
    z = np.where(np.repeat(seen, group, axis=0), z, np.float32(-np.inf))
    z -= z.max(axis=1, keepdims=True)
    z -= np.log(np.exp(z).sum(axis=1, keepdims=True, dtype=np.float64)).astype(np.float32)
    return z, np.exp(z) @ v


def losses(head: Head, wanted: list[Scheme], dues: dict[str, np.ndarray]) -> Iterator[tuple[str, str, Floats]]:
    """Scheme, protection, and relative error, KL divergence (means over the queries) and bits per value ``[3]``."""
    log_p, exact = attention(head, head.k, head.v)
    p = np.exp(log_p)
    norms = np.linalg.norm(exact, axis=1)
    for scheme in wanted:
        for protection, due in dues.items():
            k, v, bits = stored(scheme, head, due)
            log_q, out = attention(head, k, v)
            error = np.linalg.norm(out - exact, axis=1) / norms
            with np.errstate(invalid="ignore"):  # of two that are -inf
                kl = np.where(p > 0, p * (log_p - log_q), 0).sum(axis=1, dtype=np.float64)
            yield scheme.label, protection, np.array([error.mean(), kl.mean(), bits])


def heads(cache: PagedCache, n_queries: int) -> Iterator[Head]:
    """Those of sequence 0, layer by layer."""
    for i, layer in enumerate(cache.layers):
        q = cache.queries(0, i, n_queries)
        group = layer.n_head // layer.n_head_kv
        for h in range(layer.n_head_kv):
            yield Head(q[:, h * group : (h + 1) * group], *cache.keys_values(0, i, h), layer.kq_scale)


def attention_rows(model: Model, tokens: list[int], n_queries: int, n_threads: int) -> list[dict[str, Any]]:
    """A row per scheme and protection: ``error``, ``kl``, ``bits``.

    Raises:
        UsageError: the sizes of the model's heads do not fit all the schemes.
    """
    if not model.stores("kv2"):
        raise UsageError(f"The heads of {model.name} are not of a multiple of 64 values; choose another model.")
    n = len(tokens)
    sums: dict[tuple[str, str], Floats] = {}
    wanted = schemes()
    dues = {name: storage.due(n, 0) for name, storage in PROTECTIONS.items()}
    config = ContextConfig(n_ctx=n, n_threads=n_threads, n_window=n_queries)
    with Context(model, config) as context:
        for at in range(0, n, CHUNK):
            context.decode(tokens[at : at + CHUNK], at, outputs="none")
        assert context.cache is not None
        found = list(heads(context.cache, n_queries))
    with threadpool_limits(1, user_api="blas"):  # the matrices are small
        for i, head in enumerate(found):
            print(f"{model.name}: head {i + 1} of {len(found)}", flush=True)
            for label, protection, values in losses(head, wanted, dues):
                sums[label, protection] = sums.get((label, protection), 0) + values / len(found)
    by_label = {scheme.label: scheme for scheme in wanted}
    return [
        {
            "scheme": label,
            "name": by_label[label].name,
            "rotate": by_label[label].rotate,
            "centre": by_label[label].centre,
            "protection": protection,
            **dict(zip(("error", "kl", "bits"), map(float, values), strict=True)),
        }
        for (label, protection), values in sums.items()
    ]


def logit_rows(model: Model, texts: list[list[int]], n_context: int, n_threads: int, to: Path) -> list[dict[str, Any]]:
    """KL divergence of the logits, per storage: of what follows ``n_context`` tokens, with nothing dropped."""
    found = [Excerpt(f"random:{i}", "random", tuple(text), n_context) for i, text in enumerate(texts)]
    config = StageConfig(n_ctx=len(texts[0]) + 64, n_threads=n_threads)
    store = Store(to)
    try:
        got = rows(Kld(model, found, all_kept(LOGITS), config, store).run())
    finally:
        store.close()
    return [{key: row[key] for key in ("storage", "kl", "floor", "top1", "held")} for row in got]


def show(found: list[dict[str, Any]]) -> str:
    """The table of :func:`attention_rows`."""
    by = {(row["scheme"], row["protection"]): row for row in found}
    lines = []
    for label in dict.fromkeys(row["scheme"] for row in found):
        of_scheme = [by[label, protection] for protection in PROTECTIONS]
        cells = [f"{row['error']:.3f} ({row['kl']:.4f}) {row['bits']:.2f}" for row in of_scheme]
        lines.append([label, *cells])
    return table(["relative error (KL) bits; exact:", *PROTECTIONS], lines)


def main() -> None:
    p = parser(__doc__ or "")
    p.add_argument("--tokens", type=int, default=2048, help="of the text")
    p.add_argument("--queries", type=int, default=64, help="last queries whose attention is compared")
    p.add_argument("--continue", dest="n_continue", type=int, default=128, help="tokens whose logits are compared")
    p.add_argument("--texts", type=int, default=3, help="random texts for the logits")
    p.set_defaults(output=ROOT / "benchmarks" / "results" / "claims.json")
    args = p.parse_args()
    if not 0 < args.queries < args.tokens or args.tokens < 256:
        p.error("a text has at least 256 tokens, and more than --queries")
    if args.n_continue < 2 or args.texts < 1:
        p.error("the logits of a token at least, of one text")
    results: dict[str, Any] = {
        "command": command(p, args, "storage_claims"),
        "tokens": args.tokens,
        "queries": args.queries,
        "continue": args.n_continue,
        "texts": args.texts,
        "models": [],
    }

    def add(model: Model, what: str, tokens: list[int], logits: list[dict[str, Any]]) -> None:
        found = attention_rows(model, tokens, args.queries, args.threads)
        results["models"].append({"name": model.name, "text": what, "rows": found, "logits": logits})
        print(f"\n{model.name}, {what}\n\n{show(found)}\n")

    model = Model(f32_copy(model_path(args)))
    novel = args.data / "text" / NOVELS[0]
    add(model, novel.stem, list(excerpts(model, [novel], args.tokens, 0, 1)[0].tokens), [])
    model.close()
    with tempfile.TemporaryDirectory() as folder:
        source = write_random_model(OFFSETS, Path(folder) / "offsets.gguf")
        model = Model(to_f32(source, Path(folder) / "offsets-f32.gguf"))
        texts = [random_tokens(model, args.tokens + args.n_continue, seed).tolist() for seed in range(args.texts)]
        logits = logit_rows(model, texts, args.tokens, args.threads, Path(folder) / "records.jsonl")
        add(model, "random tokens", texts[0][: args.tokens], logits)
        cells = [[row["storage"], f"{row['kl']:.4f}", f"{row['floor']:.1e}", f"{row['top1']:.1%}"] for row in logits]
        print(table(["storage", "KL of the logits", "noise floor", "same likeliest"], cells))
        model.close()
    args.output.parent.mkdir(parents=True, exist_ok=True)
    write_json(args, results)


if __name__ == "__main__":
    main()
