"""Every table in 80 and in 60 columns, with the longest names there are."""

from __future__ import annotations

import io
import time
from pathlib import Path
from typing import Any

import pytest
from kvlocal_cli.backend import engine as backend
from kvlocal_cli.render import bench, config, models, plan, policies, report
from kvlocal_cli.render import eval as eval_output
from kvlocal_cli.render.markdown import markdown_table
from kvlocal_cli.render.screen import PlainConsole
from kvlocal_cli.render.table import results_table

from kvlocal.models.listing import ModelFile

LONG = "Some-Very-Long-Model-Name-135M-Instruct-8k-Lc100K-Mix1-Ep2.Q4_K_M.gguf"
MIB = 2**20


def printed(width: int, *what: Any) -> list[str]:
    text = io.StringIO()
    console = PlainConsole(file=text, width=width)
    for each in what:
        console.print(each)
    return text.getvalue().splitlines()


REPORT: dict[str, Any] = {
    "model": LONG,
    "policy": "expected-attention",
    "policy_args": {"window": 32, "a_long_parameter": "of_a_long_value"},
    "budget": {"tokens": 32_768, "fraction": 0.99987, "bytes": 45_678_901_234},
    "tokens": {"prompt": 131_072, "generated": 1024, "held_mean": 32_768.4, "held_min": 1, "held_max": 131_072},
    "kv": dict.fromkeys(("used_bytes", "peak_bytes", "full_bytes", "allocated_bytes", "fixed_bytes"), 45_678_901_234),
    "reads": {
        "retriever": "sentencekv 1024 share=layer",
        "tokens": 1023.5,
        "kept": 0.97,
        "index_bytes": 3 * MIB,
        "choose_s": 12.3,
    },
    "archive": {
        "recall": "turn",
        "bytes": 45_678_901_234,
        "units": 131_072,
        "units_lost": 1_234,
        "recalled": 1023.5,
        "missed": 12.5,
        "read_bytes": 45_678_901_234,
        "error": "the archive in /home/somebody/.cache cannot be written: No space left on device",
    },
    "rss": dict.fromkeys(("before_evict_bytes", "after_evict_bytes", "peak_bytes"), 345_678_901_234),
    "timing": {
        **dict.fromkeys(("load_s", "prefill_s", "ttft_s", "evict_s", "decode_s"), 12_345.6),
        **{"prefill_tps": 12_345.6, "decode_tps": 2_345.6},
    },
    "finish_reason": "length",
}


@pytest.mark.parametrize("width", [80, 60])
def test_the_comparison_names_its_figures_in_full(width: int) -> None:
    lines = printed(width, report.comparison_table([{**REPORT, "policy": "full"}, REPORT]))
    assert len(lines) == 11, "no label and no figure is broken"
    assert "a full cache would take" in "\n".join(lines) and max(map(len, lines)) <= width


ROW: dict[str, Any] = {
    **{
        "model": LONG,
        "depth": 131_072,
        "policy": "expected-attention",
        "budget": "25%",
        "prefill": "chunked",
        "reads": "quest 512",
        "recalls": "",
    },
    **{"storage": "kivi:bits=4:group=64", "n_prompt": 512, "n_gen": 128, "prefill_tps": 12345.6, "decode_tps": 234.5},
    **{"decode_tps_min": 123.4, "decode_tps_max": 345.6, "used_bytes": 456 * MIB, "peak_bytes": 4567 * MIB},
    **{"evict_s": 12.34, "prompt_s": 123.4, "ttft_s": 123.4},
}
MACHINE = {"threads": 16, "cores": 16, "cpu": "A CPU with a name of its own @ 2.60GHz", "read_bytes_per_s": 12e9}
ABOUT = {"metric": "needle", "model": LONG, "settings": {"f32": False}}
SCORE: dict[str, Any] = {
    **{
        "task": "niah_multikey_3",
        "policy": "expected-attention",
        "storage": "kivi",
        "budget": "25%",
        "guide": 64,
        "reads": "quest 512",
        "recalls": "",
    },
    **{"prefill": "chunked", "question": "after", "held": 0.25, "n": 12, "score": 0.5, "ci_low": 0.4, "ci_high": 0.6},
}


@pytest.mark.parametrize("width", [200, 80, 60, 30])
def test_results_have_every_figure_at_every_width(width: int) -> None:
    rows = [{**ROW, "policy": "full", "storage": "f16"}, ROW]
    lines = printed(width, *bench.as_rich(MACHINE, rows, width))
    assert max(map(len, lines)) <= width
    for figure in ("131,072", "12,346", "(123–346)", "456.0 MiB", "12.34"):
        assert figure in "\n".join(lines)
    scores = [
        SCORE,
        {
            **SCORE,
            "task": "vt",
            "storage": "f16",
            "prefill": "exact",
            "guide": 0,
            "reads": "",
            "recalls": "",
            "question": "inside",
        },
    ]
    lines = printed(width, *eval_output.as_rich(ABOUT, scores, width))
    assert max(map(len, lines)) <= width
    assert "0.50 [0.40, 0.60]" in "\n".join(lines) and "niah_multikey_3" in "\n".join(lines)


def test_what_is_too_wide_becomes_a_block_per_row() -> None:
    columns = [("policy", True), ("budget", True), ("KV", False), ("decode t/s", False)]
    rows = [["full", "100%", "24.0 MiB", "31.2"]]
    assert len(printed(60, results_table(columns, rows, 60))) == 3
    assert [line.rstrip() for line in printed(30, results_table(columns, rows, 30))] == [
        "full · budget 100%",
        "  KV          24.0 MiB",
        "  decode t/s  31.2",
    ]


@pytest.mark.parametrize("width", [80, 60])
def test_models_with_long_names_fit_but_for_what_is_to_be_copied(width: int) -> None:
    path = Path("/models") / LONG
    model = ModelFile(LONG, path, "kvlocal", (path,), 94 * MIB, "llama", "Q4_K_M", 0.0)
    text = models.models_text([model], width)
    assert text.splitlines()[:3] == [
        LONG,
        f"  94.0 MiB · Q4_K_M · llama · used {time.strftime('%Y-%m-%d', time.localtime(0))}",
        f"  {path}",
    ]
    assert len(models.models_text([model], None).splitlines()) == 4


@pytest.mark.parametrize("width", [80, 60])
def test_the_other_tables_fit(width: int) -> None:
    rows = backend.describe_policies()
    lines = printed(width, policies.policies_table(rows), policies.parameters_table(rows), report.stats_table(REPORT))
    lines += printed(width, config.settings_table([("a-long-option", "v" * 70, "KVLOCAL_A_LONG_OPTION", "run, chat")]))
    planned = {
        **{"model": LONG, "policy": "expected-attention", "budget": "25%", "storage": "f16", "prefill": "chunked"},
        **{
            "parallel": 8,
            "threads": 16,
            "threads_reason": "16 physical cores",
            "n_ctx": 131_072,
            "n_prompt": 100_000,
            "n_generate": 512,
            "weights_bytes": 2**40,
        },
        "kv": dict.fromkeys(
            ("used_bytes", "full_bytes", "peak_bytes", "query_bytes", "table_bytes", "recall_bytes", "archive_bytes"),
            2**41,
        ),
        **dict.fromkeys(("compute_bytes", "total_bytes", "device_bytes"), 2**41),
        "pages": [{"device": "CUDA0", "n_layer": 1000, "kernels": "tested on hardware"}],
        **{"free_bytes": 1, "device_free_bytes": 1, "fits": False, "max_context": {"full": 4096, "ladder": None}},
    }
    lines += printed(width, *plan.plan_view(planned, helps=False))
    assert max(map(len, lines)) <= width
    said = "\n".join(lines)
    for name in ("full", "ada-snapkv", "window=32", "2048.00 GiB"):
        assert name in said


def test_cells_of_markdown_cannot_break_the_table() -> None:
    text = markdown_table([("policy", True), ("n", False)], [["a|b\n\x1b[31mc", "1"], ["漢字", "12"]])
    assert text.splitlines() == [
        "| policy     |   n |",
        "| ---------- | --: |",
        "| a\\|b [31mc |   1 |",
        "| 漢字       |  12 |",
    ]
