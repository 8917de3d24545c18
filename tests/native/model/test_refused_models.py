"""Model files that llama.cpp loads and then breaks on: refused when they are loaded, in one sentence."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import tinygguf
from gguf import GGUFReader

CODE = """
import sys
from pathlib import Path

import numpy as np

from kvlocal.errors import KVError
from kvlocal.native.context import Context, ContextConfig
from kvlocal.native.model import Model


def use(path, paged):
    model = Model(path)
    config = ContextConfig(256, n_threads=1, n_seq_max=2, paged=paged, mass="sum" if paged else "none")
    with Context(model, config) as context:
        for n, at in ((100, 0), (8, 100), (1, 108)):  # many rows, few rows, one
            context.decode(np.arange(n) % 200 + 3, at)
        model.tokenize("some text")
        cache = context.cache
        for i, layer in enumerate(cache.layers if paged else []):
            cache.window_scores(0, i)
            cache.mass(0, i)
            cache.value_norms(0, i)
            cache.keep(0, i, [np.arange(0, 109, 2 + h) for h in range(layer.n_head_kv)])
        if paged:
            context.decode([5], 109)
            cache.window_scores(0, 0)


for path in sys.argv[1:]:
    for paged in (True, False):
        try:
            use(Path(path), paged)
            print("works", flush=True)
        except KVError as error:
            print("refused:", error, flush=True)
"""


def outcomes(*paths: Path) -> list[str]:
    """What became of every file, on the paged and on the stock cache in turn; one process for all of them."""
    arguments = [sys.executable, "-c", CODE, *map(str, paths)]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=300, check=False)
    out = done.stdout.splitlines()
    assert done.returncode == 0, f"{done.returncode} after {out}: {done.stderr[-1500:]}"
    assert len(out) == 2 * len(paths)
    return out


def overwrite(path: Path, key: str, value: int) -> None:
    """Set an integer of the file's metadata."""
    reader = GGUFReader(path, "r+")
    field = reader.fields[key]
    field.parts[field.data[0]][0] = value
    reader.data.flush()


@pytest.mark.parametrize(("n_head", "n_head_kv"), [(7, 2), (1, 2), (2, 4), (5, 4)])
def test_head_counts_that_do_not_divide(n_head: int, n_head_kv: int, tmp_path: Path) -> None:
    tinygguf.write_model(tmp_path / "m.gguf", "llama", n_head=n_head, n_head_kv=n_head_kv, head_dim=32)
    for said in outcomes(tmp_path / "m.gguf"):
        assert said.startswith("refused:") and f"{n_head} query heads" in said and f"{n_head_kv} KV heads" in said


def test_a_context_length_that_is_none(tmp_path: Path) -> None:
    lengths = [0, 2**31 - 1, 2**31, 3 * 10**9, 2**32 - 1]
    for n_ctx in lengths:
        tinygguf.write_model(tmp_path / str(n_ctx), "llama", head_dim=32)
        overwrite(tmp_path / str(n_ctx), "llama.context_length", n_ctx)
    said = outcomes(*(tmp_path / str(n_ctx) for n_ctx in lengths))
    for n_ctx, line in zip([n for n in lengths for _ in range(2)], said, strict=True):
        assert line.startswith("refused:") and str(n_ctx) in line and "context" in line


def test_a_model_without_a_vocabulary(tmp_path: Path) -> None:
    for name in ("no_vocab", "none"):
        tinygguf.write_model(tmp_path / name, "llama", head_dim=32, tokenizer=name)
    for said in outcomes(tmp_path / "no_vocab", tmp_path / "none"):
        assert said.startswith("refused:") and "vocabulary" in said


def test_sizes_that_cannot_be_are_refused_or_harmless(tmp_path: Path) -> None:
    sizes = [
        *(("rope.dimension_count", n) for n in (0, 31, 34, 2**31)),
        *((f"attention.{name}", 0) for name in ("key_length", "value_length", "head_count", "head_count_kv")),
    ]
    paths = [tmp_path / str(i) for i in range(len(sizes))]
    for path, (key, value) in zip(paths, sizes, strict=True):
        tinygguf.write_model(path, "llama", head_dim=32)
        overwrite(path, f"llama.{key}", value)
    assert all(said.startswith(("refused:", "works")) for said in outcomes(*paths))


@pytest.mark.parametrize("arch", ["llama", "qwen3"])
def test_what_is_sound_works(arch: str, tmp_path: Path) -> None:
    tinygguf.write_model(tmp_path / "m.gguf", arch, n_head=6, n_head_kv=2, head_dim=32)
    assert outcomes(tmp_path / "m.gguf") == ["works", "works"]
