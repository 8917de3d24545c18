"""Sections of docs/results.md from what parallel_sequences.py and storage_claims.py measured; their sentences are
computed from the figures."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from common import at_commit, table

from pages.storage_speed import depth, ladder

Row = dict[str, Any]

TIMES, LOSS = 1.6, 0.01
"""What was expected: so many times the sequences of f16, at a KL divergence below this."""

KEPT = "32, last 128"
"""What stays in f16 by default, as storage_claims.py names it."""

ROTATED = ("q4", "kv3", "kv2")
MIB = 2**20


def sections(results: Path) -> str:
    """Both sections as Markdown, from ``parallel.json`` and ``claims.json``; of a file that is missing it is said."""
    parts = []
    for name, (title, section) in SECTIONS.items():
        path = results / f"{name}.json"
        text = "Not measured yet."
        if path.is_file():
            found = json.loads(path.read_text("utf-8"))
            text = f"{section(found['results'])}\n\n{at_commit({name: found.get('commit', '')})}"
        parts.append(f"## {title}\n\n{text}")
    return "\n\n".join(parts)


#
# parallel sequences
#


def _parallel(found: Row) -> str:
    rows = [row for row in found["rows"] if row["sequences"]]
    each = {row["label"]: row["allocated"] / row["sequences"] for row in rows}
    lines = []
    for row in rows:
        n = f"{row['sequences']}" if row["stopped"] else f"more than {row['sequences']}"
        sizes = [f"{size / MIB:.1f}" for size in (each[row["label"]], row["allocated"], row["peak"])]
        of_f16 = f"{each['f16'] / each[row['label']]:.1f}"
        rest = [row["within_peak"], f"{row['kl']:.2g}", f"{row['tokens_per_s']:.0f}"]
        lines.append([row["label"], n, f"{row['ratio']:.1f}", of_f16, *sizes, *rest])
    header = ["storage", "sequences", "times f16", "by bytes of one", "MiB each", "MiB in all", "MiB while one is read"]
    return "\n\n".join(
        [
            f"```console\n$ {found['command']}\n```",
            f"Excerpts of {found['tokens']:,} tokens of two novels are read one after the other, and each is stored "
            f"right after it was read, until the next one would take more than {found['budget'] / MIB:g} MiB of "
            "pages, page waste and all. While one is read it is in f16: the most that was taken meanwhile, and how "
            "many sequences fit if that counts too, stand beside it. Then all of them go on together for "
            f"{found['continue']} tokens, one of each in a batch. KL divergence (nats) from the predictions of a cache "
            f"that holds the sequence alone in f16, mean of the first {max(len(row['kls']) for row in rows)}; "
            "tokens/s of all together are a side figure, not compared under equal conditions.",
            table([*header, "fit even then", "KL", "tokens/s in all"], lines),
            _expected_sequences(rows, each),
        ]
    )


def _expected_sequences(rows: list[Row], each: dict[str, float]) -> str:
    holds: list[str] = []
    fails: list[str] = []
    for row in rows:
        if row["label"] == "f16":
            continue
        # numbers of sequences are small whole numbers: both ways of counting must agree
        times = min(row["ratio"], each["f16"] / each[row["label"]])
        said = f"{row['label']} ({times:.1f} times, KL {row['kl']:.2g})"
        (holds if times >= TIMES and row["kl"] < LOSS else fails).append(said)
    return (
        f"Expected were at least {TIMES} times the sequences of f16 at a KL below {LOSS}. Counted by sequences and by "
        f"the bytes of one, whichever is less, it holds for {_listed(holds)}; it does not for {_listed(fails)}."
    )


#
# what the parts of a storage are worth
#


class _Figures:
    """What storage_claims.py found for one model; ``on`` names it in sentences."""

    def __init__(self, model: Row, on: str) -> None:
        self.on = on
        self.name, self.text, self.rows, self.logits = (model[key] for key in ("name", "text", "rows", "logits"))
        self._by = {(row["name"], row["rotate"], row["centre"], row["protection"]): row for row in self.rows}

    def get(self, name: str, centre: bool = True, kept: str = KEPT, rotate: bool = True) -> Row:
        """A row; of the schemes that neither rotate nor centre by name alone."""
        plain = (name, False, False, kept)
        return self._by[plain] if name not in ("q8", *ROTATED) else self._by[name, rotate, centre, kept]

    def kl(self, name: str, centre: bool = True, kept: str = KEPT, rotate: bool = True) -> float:
        return float(self.get(name, centre, kept, rotate)["kl"])

    def show(self) -> str:
        by: dict[str, list[Row]] = {}
        for row in self.rows:
            by.setdefault(row["scheme"], []).append(row)
        kept = [row["protection"] for row in next(iter(by.values()))]
        bits = {label: next(r["bits"] for r in rows if r["protection"] == "nothing") for label, rows in by.items()}
        lines = [
            [label, f"{bits[label]:.4g}", *(f"{row['error']:.3f} ({row['kl']:.2g})" for row in rows)]
            for label, rows in by.items()
        ]
        return table(["stored as", "bits", *kept], lines)


def _claims(found: Row) -> str:
    models = real, offsets = [_Figures(*of) for of in zip(found["models"], ("Novel", "Offsets"), strict=True)]
    parts = [
        f"```console\n$ {found['command']}\n```",
        f"Keys, values and the last {found['queries']} queries of {found['tokens']:,} tokens; keys and values are "
        "stored by the encoders of the cache and read again. Relative error of a head's output and, in brackets, KL "
        "divergence (nats) of its softmax, mean over layers, heads and queries. A column per set of tokens that stay "
        "in f16: none, the last 128, these and the first 4 or 32, or those that LogQuant chooses. *rotated*: "
        "multiplied with a Walsh-Hadamard matrix before; *mean*: the mean of the stored keys is taken away before. "
        "Bits are those of a stored value; keys of kv3 have 3.25, its values 2.25.",
        f"{real.name}, a novel:",
        real.show(),
        "Random weights with large biases of the keys (in each head six channels with offsets of 30 to 90 times the "
        "others' standard deviation and two with 10 to 20), random tokens:",
        offsets.show(),
    ]
    if offsets.logits:
        lines = [[row["storage"], f"{row['kl']:.2g}", f"{row['top1']:.0%}"] for row in offsets.logits]
        parts += [
            f"The same random weights: KL divergence of the logits of the {found['continue']} tokens that come next, "
            f"{found['texts']} texts, through the cache in each storage with its own sinks and tail (`centre=0`: the "
            "mean is not taken away):",
            table(["storage", "KL of the logits", "same likeliest"], lines),
        ]
    bullets = [_mean(real, offsets), _sinks_for_mean(real), _three_bits(models), _protection(models), _sinks(models)]
    return "\n\n".join([*parts, "\n".join(f"- {text}" for text in bullets)])


def _mean(real: _Figures, offsets: _Figures) -> str:
    def worth(model: _Figures) -> str:
        return _changes((name, model.kl(name, centre=False), model.kl(name)) for name in ROTATED)

    failed = [name for name in ROTATED if offsets.kl(name, centre=False) < 10 * offsets.kl(name)]
    verdict = (
        f"for {_listed(failed)} it is worth less than ten times" if failed else "so it is, more than ten times each"
    )
    text = (
        "The mean of the keys: in a study on synthetic heads rotation without it failed wherever keys have offsets, at "
        f"2, 3 and 4 bit, and the mean mended it; here {verdict}. KL without and with it (rotated, 32 first and 128 "
        f"last tokens in f16). Offsets: {worth(offsets)}. Novel: {worth(real)}."
    )
    by = {row["storage"]: row["kl"] for row in offsets.logits}
    pairs = [(name, by[f"{name}:centre=0"], by[name]) for name in ROTATED if f"{name}:centre=0" in by and name in by]
    return text + (f" Of the logits, with offsets: {_changes(pairs)}." if pairs else "")


def _sinks_for_mean(real: _Figures) -> str:
    def compared(kept: str) -> str:
        pairs = {name: [real.get(name, centre, kept)["error"] for centre in (False, True)] for name in ROTATED}
        lower = _listed(name for name, (without, with_it) in pairs.items() if with_it < without)
        return f"{lower} ({', '.join(f'{name} {a:.3f} and {b:.3f}' for name, (a, b) in pairs.items())})"

    return (
        "The mean and the first tokens: if these are stored in few bits too, the mean lowers the error of the output "
        f"(novel, rotated, last 128 in f16; without and with it) of {compared('last 128')}; if 4 of them stay in f16, "
        f"of {compared('4, last 128')}."
    )


def _three_bits(models: Iterable[_Figures]) -> str:
    texts = []
    for model in models:
        others = ("kv2", *(f"kivi 2 bit, groups of {group}" for group in (32, 64)))
        own = model.kl("kv3")
        said = "; ".join(f"{name} {model.kl(name):.2g} (kv3 is {_change(model.kl(name), own)})" for name in others)
        texts.append(f"{model.on}: {own:.2g} against {said}")
    return (
        "3-bit keys: in the study kv3, 2.75 bits with its 2-bit values, was below all storages of 2 bits. KL (rotated, "
        f"with the mean, 32 first and 128 last tokens in f16). {'. '.join(texts)}."
    )


def _protection(models: Iterable[_Figures]) -> str:
    texts = []
    for model in models:
        names = dict.fromkeys(row["name"] for row in model.rows)
        left = {name: model.kl(name) / model.kl(name, kept="nothing") for name in names}
        short = [name for name, share in left.items() if share > 2 / 3]
        held = "for none" if len(short) == len(names) else f"not for {'; '.join(short)}" if short else "for all"
        texts.append(
            f"{model.on.lower()} {held} (change of {min(left.values()) - 1:+.0%} to {max(left.values()) - 1:+.0%})"
        )
    return (
        "First and last tokens: in the study 32 first and 128 last tokens in f16 cut the KL by a third or more for "
        f"every storage. Here, rotated and with the mean where a storage has that: {'; '.join(texts)}."
    )


def _sinks(models: Iterable[_Figures]) -> str:
    texts = []
    for model in models:
        said = []
        for name in ("kv3", "kv2", "kivi 2 bit, groups of 32"):
            said.append(
                f"{name} " + "/".join(f"{model.kl(name, kept=k):.2g}" for k in ("last 128", "4, last 128", KEPT))
            )
        texts.append(f"{model.on}: {'; '.join(said)}")
    return f"KL with 0/4/32 first tokens in f16 beside the last 128. {'. '.join(texts)}."


def _changes(of: Iterable[tuple[str, float, float]]) -> str:
    return ", ".join(f"{name} {a:.2g} and {b:.2g} ({_change(a, b)})" for name, a, b in of)


def _change(before: float, after: float) -> str:
    """How much less or more ``after`` is."""
    low, high = sorted((before, after))
    if low <= 0 or high / low < 1.05:
        return "about the same"
    times = high / low
    return f"{times:.{0 if times >= 10 else 1}f} times {'less' if after < before else 'more'}"


def _listed(words: Iterable[str]) -> str:
    return ", ".join(words) or "none"


SECTIONS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "depth": ("Decode speed of every storage at great depth", depth),
    "ladder": ("What the ladder costs", ladder),
    "parallel": ("Parallel sequences in the same bytes", _parallel),
    "claims": ("What the mean of the keys, 3-bit keys and sinks are worth", _claims),
}
