"""Plots of evaluations: which picture, what is on it, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvlocal.errors import UsageError
from kvlocal.eval.plot import curves, grid, label, write_plot
from kvlocal.eval.records import Record, rows

MIB = 2**20
HELD = {"50%": 2, "25%": 1, "100%": 4}


def found(
    policy: str, budget: str, measures: dict[str, float], *, metric: str = "needle", question: str = "", **fields: Any
) -> Record:
    values: dict[str, Any] = {"task": "facts", "case": "case/0", "prefill": "exact", "guide": 0, "storage": "f16"}
    used = HELD[budget] * MIB
    return Record(
        metric=metric,
        policy=policy,
        policy_args={},
        budget=budget,
        question=question,
        held_mean=1.0,
        used_bytes=used,
        full_bytes=4 * MIB,
        evict_s=0.0,
        measures=measures,
        **values | fields,
    )


def needle(policy: str, length: float, depth: float, score: float, question: str = "inside") -> Record:
    budget = "100%" if policy == "paged" else "25%"
    labels = {"length": length, "depth": depth}
    return found(policy, budget, {"score": score}, question=question, labels=labels)


def kld(policy: str, budget: str, kl: float, **fields: Any) -> Record:
    return found(policy, budget, {"kl": kl, "floor": 1e-6}, metric="kld", **fields)


def drawn(records: list[Record], folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, str]:
    """The figure and its file as text; matplotlib notes beside every outline which words it draws."""
    from matplotlib.figure import Figure

    figures: list[Any] = []
    save = Figure.savefig

    def saved(figure: Any, path: Path) -> None:
        figures.append(figure)
        save(figure, path)

    monkeypatch.setattr(Figure, "savefig", saved)
    write_plot(records, folder / "plot.svg")
    return figures[0], (folder / "plot.svg").read_text("utf-8")


@pytest.mark.parametrize(("suffix", "magic"), [(".svg", b"<?xml"), (".PNG", b"\x89PNG")])
def test_the_plot_is_a_picture_of_its_kind(tmp_path: Path, suffix: str, magic: bytes) -> None:
    for name, records in (("kl", [kld("snapkv", "25%", 0.5)]), ("needle", [needle("snapkv", 64, 0, 1)])):
        file = tmp_path / f"{name}{suffix}"
        write_plot(records, file)
        assert file.read_bytes().startswith(magic)


def test_another_suffix_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"A plot is written as .svg or .png, not as 'plot.pdf'."):
        write_plot([kld("snapkv", "25%", 0.5)], tmp_path / "plot.pdf")
    assert not list(tmp_path.iterdir())


def test_a_label_is_what_tells_variants_apart() -> None:
    record = kld("snapkv", "25%", 0.5, prefill="chunked", guide=64, storage="q8")
    assert label(record) == "snapkv 25% chunked guide 64 q8" == label(rows([record])[0])
    assert label(record, budget=False) == "snapkv chunked guide 64 q8"
    assert label(kld("paged", "100%", 0)) == "paged"


# --- needles ----------------------------------------------------------------------------------------------------


def test_a_cell_is_the_mean_of_its_cases_and_empty_without_one() -> None:
    records = [needle("snapkv", *at) for at in ((128, 0.5, 1.0), (128, 0.5, 0.5), (64, 0.5, 0.0), (64, 0.0, 1.0))]
    lengths, depths, scores = grid(records)
    assert (lengths, depths) == ([64, 128], [0, 0.5])
    np.testing.assert_array_equal(scores, [[1, np.nan], [0, 0.75]])


def test_every_variant_and_question_has_a_map(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("paged", "snapkv", "streaming", "tova", "h2o")
    scores = {"inside": 1.0, "after": 0.25}
    records = [needle(name, 64, 0.5, score, mode) for name in names for mode, score in scores.items()]
    figure, svg = drawn(records, tmp_path, monkeypatch)
    maps = [axes for axes in figure.axes if axes.images]
    shown = {axes.get_title(): float(axes.images[0].get_array()[0, 0]) for axes in maps}
    variants = ["paged", *(f"{name} 25%" for name in names[1:])]
    assert shown == {f"{name}\nquestion {mode}": score for name in variants for mode, score in scores.items()}
    # the question below the one above it, four variants side by side
    titles = [axes.get_title().split("\n")[0] for axes in figure.axes[:8]]
    assert titles == variants[:4] * 2
    for text in ("snapkv 25%", "question after", "length, tokens", "depth", "score", "facts"):
        assert f"<!-- {text} -->" in svg, text


def test_one_way_to_ask_needs_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figure, _ = drawn([needle("snapkv", 64, 0.5, 1.0)], tmp_path, monkeypatch)
    assert figure.axes[0].get_title() == "snapkv 25%"


# --- all others -------------------------------------------------------------------------------------------------


def test_a_curve_is_a_policy_over_its_bytes() -> None:
    records = [kld("snapkv", "50%", 0.1), kld("paged", "100%", 0), kld("snapkv", "25%", 0.5), kld("tova", "25%", 0.7)]
    records.append(kld("snapkv", "25%", 0.6, prefill="chunked"))
    found = {name: [row["kl"] for row in points] for name, points in curves(rows(records)).items()}
    assert found == {"snapkv": [0.5, 0.1], "tova": [0.7], "snapkv chunked": [0.6]}


def test_divergences_are_drawn_on_a_logarithmic_axis(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kls = {"50%": (0.1, 0.3), "25%": (1.0, 2.0)}
    records = [kld("snapkv", budget, kl, case=str(kl)) for budget, both in kls.items() for kl in both]
    figure, svg = drawn([*records, kld("full", "100%", 2.5e-4), kld("paged", "100%", 0)], tmp_path, monkeypatch)
    (axes,) = figure.axes
    assert axes.get_yscale() == "log"
    np.testing.assert_allclose(axes.lines[0].get_xydata(), [[1, 1.5], [2, 0.2]])
    low, high = axes.get_ylim()
    assert 0.01 < low < 0.1 and 2 < high < 20, "levels far below take no room"
    for text in ("snapkv", "full: 0.00025", "paged: 0", "KL divergence, nats", "K and V held, MiB", "kld · facts"):
        assert f"<!-- {text} -->" in svg, text


def test_bars_are_the_intervals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records = [kld("snapkv", "25%", kl, case=str(kl)) for kl in (0.1, 0.2, 0.6)]
    figure, _ = drawn(records, tmp_path, monkeypatch)
    (row,) = rows(records)
    (bar,) = figure.axes[0].collections[0].get_segments()
    np.testing.assert_allclose(bar, [[1, row["ci_low"]], [1, row["ci_high"]]])
    assert row["ci_low"] < row["kl"] < row["ci_high"]


def test_scores_have_a_panel_for_each_question_and_levels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = {("paged", "100%"): (0.9, 0.8), ("snapkv", "25%"): (0.7, 0.2), ("tova", "25%"): (0.6, 0.3)}
    records = [
        found(policy, budget, {"score": score}, metric="ruler", question=question)
        for (policy, budget), both in scores.items()
        for question, score in zip(("inside", "after"), both, strict=True)
    ]
    figure, svg = drawn(records, tmp_path, monkeypatch)
    assert [axes.get_title() for axes in figure.axes] == ["question inside", "question after"]
    for axes, n in zip(figure.axes, (0, 1), strict=True):
        levels = {line.get_label(): line for line in axes.lines}
        assert levels["snapkv"].get_ydata() == [scores["snapkv", "25%"][n]]
        # what evicts nothing is a line from side to side
        assert any(list(line.get_ydata()) == [scores["paged", "100%"][n]] * 2 for line in axes.lines)
        assert axes.get_ylim()[0] == 0 < scores["paged", "100%"][n] < axes.get_ylim()[1]
    colours = [{line.get_label(): line.get_color() for line in axes.lines} for axes in figure.axes]
    assert colours[0]["snapkv"] == colours[1]["snapkv"] != colours[0]["tova"]
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == ["snapkv", "tova", "paged"] and "<!-- ruler · facts -->" in svg


def test_of_several_tasks_the_mean_over_all_cases_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records = [kld("snapkv", "25%", kl, task=task) for task, kl in (("one", 0.1), ("two", 0.3))]
    figure, svg = drawn(records, tmp_path, monkeypatch)
    np.testing.assert_allclose(figure.axes[0].lines[0].get_ydata(), [0.2])
    assert "<!-- kld · all -->" in svg


def test_only_what_evicts_nothing_can_be_drawn_too(tmp_path: Path) -> None:
    for measure, metric in (({"kl": 0.0}, "kld"), ({"score": 1.0}, "ruler")):
        write_plot([found("paged", "100%", measure, metric=metric)], tmp_path / f"{metric}.png")
        assert (tmp_path / f"{metric}.png").exists()
