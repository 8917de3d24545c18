"""What reading a part loses: the figures of docs/retrieval.md.

Texts continued, RULER with the question after the document, needles on the tiny model, and how much of the attention
falls on what is read; nothing is evicted but where a policy is named. What was measured is kept: a run goes on where it
stopped.

    python benchmarks/retrieval_quality.py                    # everything, over an hour, then the page
    python benchmarks/retrieval_quality.py --only mass,page   # one part, then the page from all that is there
"""

from __future__ import annotations

import json

from common import RESULTS, ROOT, parser
from measure.attention_mass import measure as attention_mass
from pages.retrieval import write_page
from quality import TINY, Run, shortened

from kvlocal.eval.cases import Case
from kvlocal.eval.scores import contains
from kvlocal.eval.tasks.needle import needle_cases
from kvlocal.eval.tasks.ruler import ruler_cases
from kvlocal.eval.texts import Kld, excerpts
from kvlocal.measure.code import commit
from kvlocal.measure.variants import PAGED, Variant, expand, retrievers
from kvlocal.models.f32 import f32_copy
from kvlocal.models.resolve import resolve_model
from kvlocal.native.model import Model

BUDGETS = (256, 512, 1024)
PARTS = ("kld", "needle", "ruler-4096", "ruler-8192", "mass")


def readers(*budgets: int, layer: bool = False) -> list[Variant]:
    """Everything read, then every retriever with every budget; with ``layer`` SentenceKV for whole layers as well."""
    found = list(retrievers(["none", "attention", "sentencekv", "quest", "recent"], {}, budgets))
    if layer:
        found += retrievers(["sentencekv"], {"share": "layer"}, budgets)
    return list(expand([PAGED], {}, [], retrievers=found))


def both(*budgets: str) -> list[Variant]:
    """A policy alone, and with a part of what it keeps read."""
    return list(expand(["ladder"], {}, budgets, retrievers=retrievers(["none", "sentencekv"], {}, [512])))


def kld(run: Run) -> None:
    found = excerpts(run.model, run.texts(), 3072, 256, 1)
    wanted = [*readers(*BUDGETS, layer=True), *both("25%", "12.5%")]
    run.collect("kld", lambda store: Kld(run.model, found, wanted, run.sized(3072 + 256 + 64), store))


def ruler_rows(run: Run, length: int, n_rows: int) -> list[Case]:
    """Rows of every task, the first of each before the second."""
    cases = shortened(ruler_cases(run.data / f"ruler-{length}", rows=n_rows))
    cases.sort(key=lambda case: int(case.id.split("/")[1]))
    run.config = run.sized(length + 1024)
    return cases


def needles(run: Run) -> list[Case]:
    """One fact in texts of 1,024 to 8,000 tokens."""

    def count(text: str) -> int:
        return len(run.model.tokenize(text, add_special=False))

    lengths, depths = (1024, 2048, 4096, 8000), (0.1, 0.3, 0.5, 0.7, 0.9)
    run.config = run.sized(8192 + 256)
    return needle_cases(count, lengths=lengths, depths=depths, kind="numbers", mode="single", repeats=2)


def ruler(run: Run, length: int, n_rows: int) -> None:
    wanted = [*readers(*BUDGETS), *both("25%", "12.5%", "6%")]
    run.ask(f"ruler-{length}", ruler_rows(run, length, n_rows), contains, wanted, "after")


def needle(run: Run) -> None:
    run.ask("needle", needles(run), contains, readers(128, *BUDGETS, layer=True), "after")


def mass(run: Run) -> None:
    text = run.model.tokenize(run.texts()[0].read_text("utf-8"))
    results = {"commit": commit(), "rows": attention_mass(run.model, text, run.config.n_threads)}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "retrieval-mass.json").write_text(json.dumps(results, indent=1) + "\n")


def main() -> None:
    p = parser(__doc__ or "")
    p.add_argument("--only", default=",".join((*PARTS, "page")))
    p.add_argument("--rows", type=int, default=4, help="rows of every RULER task")
    args = p.parse_args()
    wanted = set(args.only.split(","))
    big, tiny = wanted & {"kld", "ruler-4096", "ruler-8192", "mass"}, wanted & {"needle"}
    for path in [f32_copy(resolve_model(args.model), lambda done, total: None)] * bool(big) + [TINY] * bool(tiny):
        model = Model(path)
        run = Run(model, args.data, args.threads, parallel=8, name="retrieval")
        if path == TINY:
            needle(run)
            continue
        for length in (4096, 8192):
            if f"ruler-{length}" in wanted:
                ruler(run, length, args.rows)
        if "kld" in wanted:
            kld(run)
        if "mass" in wanted:
            mass(run)
        model.close()
    if "page" in wanted:
        write_page(RESULTS, ROOT / "docs" / "retrieval.md")


if __name__ == "__main__":
    main()
