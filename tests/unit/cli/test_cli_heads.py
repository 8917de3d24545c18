"""The map of rungs: letters in 80 columns, numbers of a layer, the picture."""

from __future__ import annotations

import io
from xml.etree import ElementTree

import numpy as np
import pytest
from fake_engine import Fake, call, install, sentence
from kvlocal_cli.render.heads import LETTERS, RUNGS, Rungs, count_rungs, layer_table, rungs_map, shares
from kvlocal_cli.render.heads_svg import rungs_svg
from rich.console import Console, RenderableType

from kvlocal.native.formats import FORMATS

F16, Q8, Q4, KV2 = map(FORMATS.index, ("f16", "q8", "q4", "kv2"))


def drawn(what: RenderableType, width: int = 80, colour: bool = False) -> list[str]:
    text = io.StringIO()
    Console(file=text, width=width, force_terminal=colour, color_system="standard" if colour else None).print(what)
    return [line.rstrip() for line in text.getvalue().splitlines()]


def random_rungs(n_head: int, n_seen: int, n_layer: int = 12) -> Rungs:
    rng = np.random.default_rng(n_head)
    layers = []
    for _ in range(n_layer):
        layers.append([rng.integers(0, len(FORMATS), rng.integers(1, n_seen + 1)) for _ in range(n_head)])
    return count_rungs(n_seen, layers)


def test_slots_are_counted_per_format_and_what_is_missing_is_gone() -> None:
    rungs = count_rungs(10, [[np.array([F16, F16, Q4]), np.array([KV2], np.int32)]])
    assert [dict(zip(RUNGS, map(int, head), strict=True)) for head in rungs.layers[0]] == [
        {**dict.fromkeys(RUNGS, 0), "f16": 2, "q4": 1, "gone": 7},
        {**dict.fromkeys(RUNGS, 0), "kv2": 1, "gone": 9},
    ]
    assert rungs.used == ["f16", "q4", "kv2", "gone"] and rungs.n_heads == 2


def test_every_rung_has_a_letter_of_its_own() -> None:
    assert set(LETTERS) == {*FORMATS, "gone"} and len(set(LETTERS.values())) == len(LETTERS)


@pytest.mark.parametrize("n_head", [1, 2, 3, 4, 5, 8, 12, 32, 71, 500])
@pytest.mark.parametrize("n_seen", [1, 99, 13107])
def test_the_map_fits_80_columns(n_head: int, n_seen: int) -> None:
    lines = drawn(rungs_map(random_rungs(n_head, n_seen)))
    assert [line[:2].strip() for line in lines[1:13]] == [str(i) for i in range(12)], "a line per layer"
    assert lines[13].startswith("Mean of a head:   ")


def test_bars_are_in_proportion_and_the_smallest_rung_is_seen() -> None:
    counts = np.array([1, 0, 2047, 0, 0, 0, 0, 2048])
    assert shares(counts, 16) == [1, 0, 7, 0, 0, 0, 0, 8]
    assert shares(counts * 0, 16) == [0] * 8
    assert shares(np.ones(8, int), 3) in ([1, 1, 1, 0, 0, 0, 0, 0],) or sum(shares(np.ones(8, int), 3)) == 3


def test_letters_say_the_same_with_and_without_colour() -> None:
    rungs = random_rungs(2, 64, 3)
    plain, coloured = "\n".join(drawn(rungs_map(rungs))), "\n".join(drawn(rungs_map(rungs), colour=True))
    assert "\x1b[32mF" in coloured
    for name in rungs.used:
        assert f"{LETTERS[name]} {name} " in plain


def test_of_many_heads_a_layer_is_one_bar() -> None:
    rungs = count_rungs(4, [[np.full(1 + i % 4, F16) for i in range(32)]])
    title, row, *_ = drawn(rungs_map(rungs))
    assert "all KV heads in one bar" in title
    assert row.startswith("0 FFF") and row.endswith("·· 1-4")


def test_the_heads_of_a_layer_in_numbers() -> None:
    rungs = count_rungs(1500, [[np.full(1200, Q8), np.array([F16] * 3 + [Q8] * 7)]])
    assert [line.split() for line in drawn(layer_table(rungs, 0), width=60)][2:] == [
        ["0", "0", "1,200", "1,200", "300"],
        ["1", "3", "7", "10", "1,490"],
    ]


def test_an_empty_cache_says_so() -> None:
    assert drawn(rungs_map(count_rungs(0, [[np.array([], int)]]))) == ["The cache is empty."]
    assert drawn(rungs_map(count_rungs(0, []))) == ["The cache is empty."]


def test_the_picture_is_one_file_with_the_counts_in_it() -> None:
    rungs = count_rungs(10, [[np.array([F16, F16, Q4]), np.array([KV2])], [np.full(10, F16)] * 2])
    text = rungs_svg(rungs, "a <model> & \x1b]52;c;aGk=\x07")
    root = ElementTree.fromstring(text)
    names = {"svg": "http://www.w3.org/2000/svg"}
    tips = [each.text for each in root.iterfind(".//svg:title", names)]
    assert tips == [
        "layer 0, head 0: f16 2, q4 1, gone 7",
        "layer 0, head 1: kv2 1, gone 9",
        "layer 1, head 0: f16 10",
        "layer 1, head 1: f16 10",
    ]
    bars = [
        [float(rect.attrib["width"]) for rect in group.iterfind("svg:rect", names)]
        for group in root.iter()
        if group.tag.endswith("}g")
    ]
    assert all(sum(bar) == pytest.approx(sum(bars[0]), abs=0.02) for bar in bars), "every bar is as long as the text"
    assert "href" not in text and "a &lt;model&gt; &amp; ]52;c;aGk=" in text


# --- kv-map ------------------------------------------------------------------------------------------------------


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Fake:
    return install(monkeypatch)


def test_kv_map_reads_a_prompt_as_run_does(fake: Fake, tmp_path) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "text").write_text("word " * 64)
    result = call("kv-map", "-f", str(tmp_path / "text"), "--budget", "25%")
    assert result.exit_code == 0 and "0 FFFFFF" in result.stdout and result.stderr == ""
    assert fake.settings.budget == "25%" and fake.settings.model is None


@pytest.mark.parametrize("model", [None, "my.gguf"])
def test_kv_map_takes_a_picture_with_and_without_a_model(
    model: str | None,
    fake: Fake,
    tmp_path,
    monkeypatch: pytest.MonkeyPatch,  # type: ignore[no-untyped-def]
) -> None:
    picture = tmp_path / "heads.svg"
    result = call("kv-map", *filter(None, [model]), "-p", "a b c d", str(picture))
    assert (result.exit_code, result.stdout) == (0, "") and picture.exists()
    assert fake.settings.model == model
    monkeypatch.setenv("KVLOCAL_MODEL", "other.gguf")
    assert call("kv-map", *filter(None, [model]), "-p", "a b c d", str(picture)).exit_code == 0
    assert fake.settings.model == (model or "other.gguf")


def test_kv_map_says_what_it_cannot_do(fake: Fake, tmp_path) -> None:  # type: ignore[no-untyped-def]
    assert "evicts nothing" in sentence("kv-map", "-p", "x", "--policy", "full")
    assert "there is no folder" in sentence("kv-map", "-p", "x", str(tmp_path / "none" / "a.svg"))
    assert "does not end in .svg" in sentence("kv-map", "m.gguf", "-p", "x", str(tmp_path / "a.png"))
