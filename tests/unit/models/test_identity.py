"""Which model it is: a hash over all of its parts, the same wherever the files lie."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvlocal.models import identity
from kvlocal.models.default import DEFAULT_MODEL
from kvlocal.models.identity import fingerprint, model_identity


def parts(folder: Path, n: int = 3) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    out = [folder / f"m-{i:05d}-of-{n:05d}.gguf" for i in range(1, n + 1)]
    for i, path in enumerate(out):
        path.write_bytes(b"GGUF" + bytes([i]) * 3_000_000)
    return out


@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("at", [10, 1_500_000, -1])
def test_a_change_in_any_part_is_noticed(tmp_path: Path, which: int, at: int) -> None:
    files = parts(tmp_path)
    before = fingerprint(files[0])
    data = bytearray(files[which].read_bytes())
    data[at] ^= 1
    # between the samples nothing is read, so the middle is changed by more than one of them is wide
    data[at : at + 200_000] = bytes(byte ^ 1 for byte in data[at : at + 200_000])
    files[which].write_bytes(data)
    assert fingerprint(files[0]) != before


def test_a_part_that_is_longer_or_another_order_is_noticed(tmp_path: Path) -> None:
    files = parts(tmp_path)
    before = fingerprint(files[0])
    with files[2].open("ab") as file:
        file.write(b"x")
    longer = fingerprint(files[0])
    parts(tmp_path)
    files[1].rename(tmp_path / "x")
    files[2].rename(files[1])
    (tmp_path / "x").rename(files[2])
    assert len({before, longer, fingerprint(files[0])}) == 3


def test_the_same_wherever_it_lies(tmp_path: Path) -> None:
    assert fingerprint(parts(tmp_path / "a")[0]) == fingerprint(parts(tmp_path / "b")[0])


def test_what_a_spec_stands_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"GGUF")
    monkeypatch.setattr(identity, "fetched_default", lambda: None)
    assert model_identity("hf:u/r:Q4_0") == "hf:u/r:Q4_0"
    assert model_identity(str(path)).startswith("m.gguf ")
    assert model_identity(None).startswith(DEFAULT_MODEL.label)
    monkeypatch.setattr(identity, "fetched_default", lambda: path)
    assert model_identity(str(path)) == model_identity(None)
