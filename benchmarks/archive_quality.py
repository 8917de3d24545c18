"""What an archive brings back: the figures of docs/archive.md.

Questions that come after the document was evicted, with and without an archive: needles on the tiny model, RULER on the
default one, and a chat of thirty turns. What was measured is kept: a run goes on where it stopped.

    python benchmarks/archive_quality.py                        # everything, then the page
    python benchmarks/archive_quality.py --only needle,page     # one part, then the page from all that is there
"""

from __future__ import annotations

import json

from common import RESULTS, ROOT, parser
from measure.long_chat import measure as long_chat
from pages.archive import write_page
from quality import TINY, Run
from retrieval_quality import needles, ruler_rows

from kvlocal.eval.scores import contains
from kvlocal.measure.code import commit
from kvlocal.measure.variants import PAGED, Variant, expand, retrievers
from kvlocal.models.f32 import f32_copy
from kvlocal.models.resolve import resolve_model
from kvlocal.native.model import Model
from kvlocal.storage.archive import Archive

PARTS = ("needle", "chat", "ruler-4096", "ruler-8192")


def variants(*recalls: int) -> list[Variant]:
    """Everything, and policies alone and with archives of which a turn recalls so many tokens, of the smallest of them
    every number; of one also what a retriever reads at every step."""
    one = [None, Archive(budget=recalls[-1])]
    out = [*expand([PAGED], {}, []), *expand(["ladder"], {}, ["25%", "12.5%", "6%"], archives=one)]
    some = [None, *(Archive(budget=n) for n in recalls)]
    out += expand(["ladder", "streaming"], {}, ["3%"], archives=some)
    out += expand(["ada-snapkv"], {}, ["6%"], archives=one)
    steps = retrievers(["sentencekv"], {}, [512])
    return [*out, *expand(["streaming"], {}, ["3%"], retrievers=steps, archives=[Archive(recall="step")])]


def needle(run: Run) -> None:
    run.ask("needle", needles(run), contains, variants(64, 128, 256), "after")


def ruler(run: Run, length: int, n_rows: int) -> None:
    run.ask(f"ruler-{length}", ruler_rows(run, length, n_rows), contains, variants(64, 128, 256), "after")


def chat() -> None:
    RESULTS.mkdir(exist_ok=True)
    results = {"commit": commit(), "rows": long_chat(TINY)}
    (RESULTS / "archive-chat.json").write_text(json.dumps(results, indent=1) + "\n")


def main() -> None:
    p = parser(__doc__ or "")
    p.add_argument("--only", default=",".join((*PARTS, "page")))
    p.add_argument("--rows", type=int, default=4, help="rows of every RULER task")
    args = p.parse_args()
    wanted = set(args.only.split(","))
    if "chat" in wanted:
        chat()
    big, tiny = any(part.startswith("ruler") for part in wanted), "needle" in wanted
    for path in [TINY] * tiny + [f32_copy(resolve_model(args.model), lambda done, total: None)] * big:
        model = Model(path)
        run = Run(model, args.data, args.threads, parallel=8, name="archive")
        if path == TINY:
            needle(run)
        for length in (4096, 8192):
            if path != TINY and f"ruler-{length}" in wanted:
                ruler(run, length, args.rows)
        model.close()
    if "page" in wanted:
        write_page(RESULTS, ROOT / "docs" / "archive.md")


if __name__ == "__main__":
    main()
