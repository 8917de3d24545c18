"""Decode speed at great depth by storage, as ratios within one run, and what demoting costs beside decoding.

Our cache holds the text once in f16, and a branch of it for every storage; llama.cpp's own has a context for each of
its types (q4 and q8 are its q4_0 and q8_0). Every round decodes some tokens from each of them in turn and takes them
back: a ratio is that of two turns of one round, and holds on a machine whose speed drifts. All of ours rotate keys and
values, f16 too, as one context serves them all. Contents do not matter for speed: the text is random tokens, and may be
longer than the model was trained for. llama.cpp's contexts read it in pieces that do not see each other, which would
take them an hour and more at 32768 tokens otherwise; what decodes after them sees all.

    python benchmarks/depth_storage.py                      # four caches of 32768 tokens
    python benchmarks/depth_storage.py --depths 512 -r 3    # to see that it runs
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from common import command, model_path, parser, table, write_json
from performance import decode_ms, fill

from kvlocal.measure.bench import random_tokens
from kvlocal.measure.variants import STOCK_STORAGES
from kvlocal.native.context import Context, ContextConfig
from kvlocal.native.formats import PAGE_SLOTS
from kvlocal.native.model import Model
from kvlocal.storage.storage import MIN_MEAN, STORAGES, Storage

STRIDE = 2048  # tokens between two lines of progress
PIECE = 256  # tokens that llama.cpp's contexts read at once
SLACK = 64
LEAST = Storage().sink + Storage().tail + MIN_MEAN
REFERENCES = ("ours f16", "stock f16", "stock q4")


@dataclass
class Lane:
    """What takes turns: sequence ``seq`` of a context. Seconds per decoded token and per demotion, round by round.

    Attributes:
        used_bytes: K and V held at the depth; store_s: demoting everything that is before the tail there.
        demote_s: demoting ``PAGE_SLOTS`` more tokens in all heads of all layers.
    """

    context: Context
    storage: str
    seq: int = 0
    used_bytes: int = 0
    store_s: float | None = None
    decode_s: list[float] = field(default_factory=list)
    demote_s: list[float] = field(default_factory=list)

    @property
    def label(self) -> str:
        return f"{'stock' if self.context.cache is None else 'ours'} {self.storage}"

    def arrive(self) -> None:
        """The text is as long as the depth: branch from it, store it, forget the rounds of the last depth."""
        cache = self.context.cache
        self.decode_s, self.demote_s = [], []
        if cache is None:
            self.used_bytes = int(self.context.stats().used_bytes)
            return
        self.context.branch(0, self.seq)
        start = time.perf_counter()
        demoted = Storage(self.storage).store(cache, self.seq, 0)
        self.store_s = time.perf_counter() - start if demoted else None
        self.used_bytes = int(cache.seq_stats(self.seq).used_bytes)

    def leave(self) -> None:
        if self.context.cache is not None:
            self.context.truncate(self.seq, 0)

    def decode(self, tokens: np.ndarray, n: int) -> None:
        self.decode_s.append(decode_ms(self.context, tokens, self.seq, n) / 1000)

    def demote(self, tokens: np.ndarray, scratch: int) -> None:
        """A page more per head, in another branch: what is demoted would stay so.

        Twice, the first time to make the branch the owner of the pages that are written.
        """
        cache, store = self.context.cache, Storage(self.storage)
        if cache is None or not store.demotes or store.name == "logquant":  # whose tokens leave in other numbers
            return
        self.context.branch(self.seq, scratch)
        seconds = 0.0
        for _ in range(2):
            self.context.decode(tokens[:PAGE_SLOTS], self.context.n_seen(scratch), scratch, outputs="none")
            start = time.perf_counter()
            demoted = store.store(cache, scratch, 0)
            seconds = time.perf_counter() - start
            assert demoted
        self.demote_s.append(seconds)
        self.context.truncate(scratch, 0)


def read(context: Context, tokens: np.ndarray, begin: int, end: int) -> float:
    """The tokens from ``begin`` to ``end`` into sequence 0, which holds those before; seconds."""
    if context.cache is not None:
        return fill(context, tokens, begin, end)
    start = time.perf_counter()
    for at in range(begin, end, PIECE):
        context.decode(tokens[at : min(at + PIECE, end)], at, 1, outputs="none")
        context.join(1, 0)
    return time.perf_counter() - start


def spread(values: Sequence[float]) -> list[float]:
    """Median, least, most."""
    return [statistics.median(values), min(values), max(values)]


def results(lanes: Sequence[Lane], depth: int) -> list[dict[str, Any]]:
    """A row per lane; ``vs``: how many times as fast as a reference, [median, least, most] over the rounds."""
    by_label = {lane.label: lane for lane in lanes}
    out = []
    for lane in lanes:
        row: dict[str, Any] = {
            "depth": depth,
            "cache": lane.label.split()[0],
            "storage": lane.storage,
            "decode_tps": spread([1 / s for s in lane.decode_s]),
            "used_bytes": lane.used_bytes,
            "vs": {
                label: spread([b / a for a, b in zip(lane.decode_s, by_label[label].decode_s, strict=True)])
                for label in REFERENCES
                if label in by_label
            },
            "store_s": lane.store_s,
        }
        if lane.demote_s and lane.context.cache is not None:
            layers = lane.context.cache.layers
            n_heads = sum(layer.n_head_kv for layer in layers)
            pages = [s / n_heads for s in lane.demote_s]
            steps = [s / len(layers) for s in lane.decode_s]
            row["demote_page_s"] = spread(pages)
            row["demote_page_per_layer_step"] = spread([a / b for a, b in zip(pages, steps, strict=True)])
        out.append(row)
    return out


def cell(values: Sequence[float] | None, form: str = ".2f") -> str:
    if values is None:
        return ""
    median, least, most = (format(value, form) for value in values)
    return f"{median} ({least}–{most})"


def show(rows: Sequence[dict[str, Any]]) -> str:
    header = ["depth", "cache", "t/s", *(f"x {label}" for label in REFERENCES), "MiB"]
    header += ["all demoted, s", "a page of a head, ms", "of a layer's step"]
    lines = []
    for row in rows:
        ms = [1000 * s for s in row["demote_page_s"]] if "demote_page_s" in row else None
        lines.append(
            [
                row["depth"],
                f"{row['cache']} {row['storage']}",
                cell(row["decode_tps"], ".1f"),
                *(cell(row["vs"].get(label)) for label in REFERENCES),
                f"{row['used_bytes'] / 2**20:.1f}",
                "" if row["store_s"] is None else f"{row['store_s']:.2f}",
                cell(ms, ".3f"),
                cell(row.get("demote_page_per_layer_step")),
            ]
        )
    return table(header, lines)


def say(what: str) -> None:
    print(time.strftime("%H:%M:%S"), what, flush=True)


def open_lanes(model: Model, n_ctx: int, n_threads: int, stock: Sequence[str], stack: ExitStack) -> list[Lane]:
    """Ours first, in one context whose last sequence is left for :meth:`Lane.demote`; then those of llama.cpp."""
    formats = tuple(dict.fromkeys(name for storage in STORAGES for name in Storage(storage).formats))
    ours = ContextConfig(
        n_ctx, n_threads=n_threads, n_seq_max=len(STORAGES) + 2, n_window=0, formats=formats, rotate=True
    )
    context = stack.enter_context(Context(model, ours))
    lanes = [Lane(context, storage, seq) for seq, storage in enumerate(STORAGES, start=1)]
    for storage in STOCK_STORAGES:
        if storage in stock:
            theirs = ContextConfig(n_ctx, n_threads=n_threads, n_seq_max=2, paged=False, type_kv=storage)
            lanes.append(Lane(stack.enter_context(Context(model, theirs)), storage))
    return lanes


def main() -> None:
    p = parser(__doc__ or "")
    p.add_argument("--depths", default="16384,32768", help="tokens, comma-separated")
    p.add_argument("-n", type=int, default=16, help="tokens per turn")
    p.add_argument("-r", "--rounds", type=int, default=9)
    p.add_argument("--stock", default=",".join(STOCK_STORAGES), help="which of llama.cpp's types take part")
    args = p.parse_args()
    depths = sorted({int(depth) for depth in args.depths.split(",")})
    if depths[0] < LEAST or args.n < 1 or args.rounds < 1:
        p.error(f"a depth is at least {LEAST} tokens, and there is at least one round of one token")
    model = Model(model_path(args))
    model.check_paged()
    tokens = random_tokens(model, depths[-1])
    rows: list[dict[str, Any]] = []
    with ExitStack() as stack:
        lanes = open_lanes(
            model, depths[-1] + max(args.n, 2 * PAGE_SLOTS) + SLACK, args.threads, args.stock.split(","), stack
        )
        texts = {id(lane.context): lane for lane in lanes}
        read_s: dict[int, float] = defaultdict(float)
        for begin, depth in zip([0, *depths], depths, strict=False):
            for key, lane in texts.items():
                what = "ours" if lane.context.cache is not None else lane.label
                for at in range(begin, depth, STRIDE):
                    read_s[key] += read(lane.context, tokens, at, min(at + STRIDE, depth))
                    say(f"{what}: read {min(at + STRIDE, depth)} of {depth} tokens, {read_s[key]:.0f} s so far")
            for lane in lanes:
                lane.arrive()
            for i in range(-1, args.rounds):  # the first warms up
                say(f"depth {depth}: round {i + 1} of {args.rounds}")
                first = i % len(lanes)
                for lane in [*lanes[first:], *lanes[:first]]:
                    lane.decode(tokens, args.n)
                    lane.demote(tokens, len(STORAGES) + 1)
                if i < 0:
                    for lane in lanes:
                        lane.decode_s, lane.demote_s = [], []
            rows += results(lanes, depth)
            for lane in lanes:
                lane.leave()
            # the next depth may take long
            write_json(args, {"command": command(p, args, "depth_storage"), "rows": rows})
    print(f"\n{model.name}, {args.threads} threads; median (least–most) of {args.rounds} rounds of {args.n} tokens\n")
    print(show(rows))
    model.close()


if __name__ == "__main__":
    main()
