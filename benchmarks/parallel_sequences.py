"""How many sequences fit into the same bytes, by storage, and what that costs in quality.

Excerpts of two novels, another one in every sequence, are read one after the other into one cache, and each is stored
right after it was read (by a policy: evicted), until the next one would take more than the budget: bytes of the pages
taken from the pools, as the cache reports them, page waste and all. While a text is read it is in f16, so the most that
was taken meanwhile is more; that is reported too, and how many sequences fit into the budget even so. Then all of them
go on with their own texts, a batch having a token of every sequence. KL divergence (nats) of the predictions of three
of them from those of a cache that holds that sequence alone and in f16.

    python benchmarks/parallel_sequences.py                               # half an hour on two cores
    python benchmarks/parallel_sequences.py --tokens 256 --budget 8MiB    # to see that it runs
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from common import ROOT, command, model_path, parser, table, write_json
from quality import NOVELS

from kvlocal.engine.evictor import evict, size
from kvlocal.engine.sequence import Sequence as CacheSequence
from kvlocal.errors import UsageError
from kvlocal.eval.texts import Distribution, Excerpt, excerpts
from kvlocal.measure.variants import PAGED, Variant
from kvlocal.models.f32 import f32_copy
from kvlocal.native.cache import PagedCache
from kvlocal.native.context import Context, ContextConfig
from kvlocal.native.model import Model
from kvlocal.policies import make_policy
from kvlocal.policies.full import Full
from kvlocal.storage.budget import Budget, format_bytes

Row = dict[str, Any]

SAMPLE = 3  # sequences whose predictions are compared
MOST = 256  # sequences that llama.cpp allows
CHUNK = 512  # tokens of one pass
EVERY = 32  # tokens that a sequence grows by before it is stored or evicted again
SLACK = 64
MIB = 2**20


def variants(storages: str, policies: str) -> list[Variant]:
    """Nothing dropped, f16 first; then policies, each with its budget behind a colon (``ladder:25%``).

    Raises:
        UsageError: a storage, policy or budget that does not exist, or a policy that drops nothing.
    """
    names = dict.fromkeys(["f16", *(text.strip() for text in storages.split(","))])
    out = [Variant(PAGED, Full(), Budget.parse("100%"), name) for name in names]
    for text in filter(None, policies.split(",")):
        name, _, share = text.strip().partition(":")
        policy = make_policy(name)
        if not policy.evicts:
            raise UsageError(f"The policy {name!r} drops nothing; name its storage with --kv.")
        out.append(Variant(name, policy, Budget.parse(share)))
    for variant in out:
        _ = variant.store  # says which there are
    return out


def label(variant: Variant) -> str:
    return f"{variant.name} {variant.budget}" if variant.policy.evicts else variant.storage


def open_context(model: Model, variant: Variant, n_ctx: int, n_seq: int, n_outputs: int, n_threads: int) -> Context:
    store = variant.store
    return Context(
        model,
        ContextConfig(
            n_ctx=n_ctx,
            n_threads=n_threads,
            n_seq_max=n_seq,
            n_outputs=n_outputs,
            n_window=variant.policy.n_window,
            mass=variant.policy.mass,
            formats=variant.formats,
            rotate=variant.rotates,
            kivi_bits=store.bits,
            kivi_group=store.group,
        ),
    )


def read(context: Context, seq: int, tokens: Sequence[int]) -> None:
    for at in range(0, len(tokens), CHUNK):
        context.decode(tokens[at : at + CHUNK], at, seq, outputs="none")


def bound(context: Context, seq: int, variant: Variant) -> None:
    """Evict and demote what is due, as an engine does after a prompt and while it answers."""
    cache, policy, store = context.cache, variant.policy, variant.store
    assert cache is not None
    budget = store.tokens(variant.budget, context.n_seen(seq), cache, policy)
    held, sequence = np.inf, CacheSequence.adopt(context, seq)
    while policy.evicts and size(cache, seq, policy) < held:
        held = size(cache, seq, policy)
        if not evict(sequence, policy, budget, n_room=context.config.n_ctx):
            break
    store.store(cache, seq, policy.n_window)


def most_sequences(variant: Variant, cache: PagedCache, n_context: int, budget: int) -> int:
    """One more than fit if each takes no more than its tokens do in their smallest storage, at most :data:`MOST`."""
    n = min(n_context, variant.store.tokens(variant.budget, n_context, cache, variant.policy))
    return min(budget // (n * variant.store.bytes_per_token(cache)) + 1, MOST)


def alone(context: Context, excerpt: Excerpt) -> Distribution:
    """Predictions of the continuation, by a context that holds nothing else, with nothing dropped or demoted."""
    context.truncate(0, 0)
    read(context, 0, excerpt.tokens[: excerpt.n_context])
    rest = excerpt.tokens[excerpt.n_context :]
    context.decode(rest, excerpt.n_context, outputs="all")
    return Distribution.of(context.logits(len(rest)))


def fill(context: Context, found: Sequence[Excerpt], variant: Variant, budget: int) -> Row:
    """Read and store one excerpt after the other, each in a sequence of its own, while they fit into the budget.

    Returns:
        ``sequences``; ``stopped``: by the budget, not by the number of excerpts; ``within_peak``: sequences that also
        fit while they are read; bytes ``allocated`` at the end and at most (``peak``).
    """
    peaks: list[int] = []
    allocated, stopped = 0, False
    for seq, excerpt in enumerate(found):
        read(context, seq, excerpt.tokens[: excerpt.n_context])
        bound(context, seq, variant)
        stats = context.stats()
        if stats.allocated_bytes > budget:
            context.truncate(seq, 0)
            stopped = True
            break
        allocated = int(stats.allocated_bytes)
        peaks.append(int(stats.peak_bytes))
        print(f"{label(variant)}: {seq + 1} sequences, {allocated / MIB:.1f} MiB", flush=True)
    within = sum(peak <= budget for peak in peaks)
    row = {"sequences": len(peaks), "stopped": stopped, "within_peak": within}
    return row | {"allocated": allocated, "peak": max(peaks, default=0)}


def go_on(context: Context, found: Sequence[Excerpt], variant: Variant) -> tuple[list[Distribution], float]:
    """All sequences go on together, a token of each at a time: predictions of the first :data:`SAMPLE`, and seconds."""
    rest = np.array([excerpt.tokens[excerpt.n_context :] for excerpt in found], np.int32)
    seqs = range(len(found))
    logits, seconds = [], 0.0
    for i, tokens in enumerate(rest.T):
        pos = np.array([context.n_seen(seq) for seq in seqs], np.int32)
        start = time.perf_counter()
        context.decode(tokens, pos, np.array(seqs, np.int32))
        seconds += time.perf_counter() - start
        logits.append(context.logits(len(found))[:SAMPLE])
        for seq in seqs if (i + 1) % EVERY == 0 else ():
            bound(context, seq, variant)
    return [Distribution.of(of_one) for of_one in np.stack(logits, axis=1)], seconds


def measure(
    model: Model, variant: Variant, found: Sequence[Excerpt], exact: Sequence[Distribution], budget: int, n_threads: int
) -> Row:
    """A row of the results: as :func:`fill`, and ``kl`` of each of the sample, its mean, tokens/s of all together."""
    n_ctx = len(found[0].tokens) + SLACK
    row: Row = {"label": label(variant), "policy": variant.name, "storage": variant.storage}
    with open_context(model, variant, n_ctx, len(found), len(found), n_threads) as context:
        row |= fill(context, found, variant, budget)
        if not row["sequences"]:
            return row
        got, seconds = go_on(context, found[: row["sequences"]], variant)
        kls = [p.kl(q) for p, q in zip(exact, got, strict=False)]
        n_tokens = row["sequences"] * len(got[0].log_p)
        return row | {
            "kls": kls,
            "kl": float(np.mean(kls)),
            "tokens_per_s": n_tokens / seconds,
            "allocated_after": int(context.stats().allocated_bytes),
        }


def show(rows: Sequence[Row]) -> str:
    lines = []
    for row in rows:
        n = row["sequences"]
        sizes = [f"{row['allocated'] / n / MIB:.1f}", f"{row['allocated'] / MIB:.1f}", f"{row['peak'] / MIB:.1f}"]
        shown = [f"{n}" if row["stopped"] else f"{n} (no more texts)", f"{row['ratio']:.1f}", *sizes]
        lines.append([row["label"], *shown, row["within_peak"], f"{row['kl']:.5f}", f"{row['tokens_per_s']:.0f}"])
    header = ["storage", "sequences", "x f16", "MiB each", "MiB in all", "MiB while one is read", "fit even then"]
    return table([*header, "KL", "t/s in all"], lines)


def main() -> None:
    p = parser(__doc__ or "")
    p.add_argument("--budget", default="256MiB", help="bytes for all sequences")
    p.add_argument("--tokens", type=int, default=3072, help="of each sequence")
    p.add_argument("--kv", default="f16,q8,q4,kv3,kv2", help="storages of sequences that drop nothing; f16 is added")
    p.add_argument("--policy", default="ladder:25%", help="policies with their budgets, comma-separated")
    p.add_argument("--continue", dest="n_continue", type=int, default=64, help="tokens that every sequence goes on")
    p.set_defaults(output=ROOT / "benchmarks" / "results" / "parallel.json")
    args = p.parse_args()
    try:
        budget = Budget.parse(args.budget)
        wanted = variants(args.kv, args.policy)
    except UsageError as error:
        p.error(str(error))
    if budget.unit != "bytes" or args.tokens < 1 or args.n_continue < 1:
        p.error("a budget is in bytes (256MiB), and a text and its continuation have a token at least")
    model = Model(f32_copy(model_path(args)))
    model.check_paged()
    n_bytes = int(budget.value)
    n_ctx = args.tokens + args.n_continue + SLACK
    with open_context(model, wanted[0], n_ctx, 1, args.n_continue, args.threads) as context:
        cache = context.cache
        assert cache is not None
        if n_bytes < args.tokens * cache.bytes_per_token:
            p.error(
                f"one sequence takes {format_bytes(args.tokens * cache.bytes_per_token)} in f16; the budget is less"
            )
        most = [most_sequences(variant, cache, args.tokens, n_bytes) for variant in wanted]
        paths = [args.data / "text" / name for name in NOVELS]
        found = excerpts(model, paths, args.tokens, args.n_continue, -(-max(most) // len(paths)))
        # any number of the first ones are spread over the novels
        found = [found[i] for i in np.random.default_rng(0).permutation(len(found))]
        exact = [alone(context, excerpt) for excerpt in found[:SAMPLE]]
    rows: list[Row] = []
    for variant, n in zip(wanted, most, strict=True):
        rows.append(measure(model, variant, found[:n], exact, n_bytes, args.threads))
        rows[-1]["ratio"] = rows[-1]["sequences"] / rows[0]["sequences"]
        args.output.parent.mkdir(parents=True, exist_ok=True)
        results = {"command": command(p, args, "parallel_sequences"), "model": model.name, "budget": n_bytes}
        write_json(args, results | {"tokens": args.tokens, "continue": args.n_continue, "rows": rows})
    print(f"\n{model.name}: sequences of {args.tokens} tokens in {budget}\n\n{show(rows)}")
    model.close()


if __name__ == "__main__":
    main()
