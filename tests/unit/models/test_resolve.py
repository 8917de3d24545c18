"""Models by path: what is a model file and what is not."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kvlocal.errors import KVError, UsageError
from kvlocal.models.resolve import resolve_model

GGUF = b"GGUF" + bytes(range(200))


def message(kind: type[KVError], spec: str | None) -> str:
    """Return the message of the error that `spec` ends in, which must be exactly of `kind` and one line."""
    with pytest.raises(KVError) as caught:
        resolve_model(spec)
    assert type(caught.value) is kind
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_path_of_a_gguf_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "m.gguf").write_bytes(GGUF)
    assert resolve_model(str(tmp_path / "m.gguf")) == tmp_path / "m.gguf"
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert resolve_model("~/m.gguf") == tmp_path / "m.gguf"


def test_missing_file_directory_and_other_format(tmp_path: Path) -> None:
    assert "no model file" in (text := message(UsageError, str(tmp_path / "no.gguf")))
    assert "hf:USER/REPO" in text
    assert "without a GGUF file" in message(UsageError, str(tmp_path))
    for name in ("b.gguf", "a.gguf", "c.txt"):
        (tmp_path / name).touch()
    assert message(UsageError, str(tmp_path)).endswith("name one of its files: a.gguf, b.gguf")
    (tmp_path / "m.bin").write_bytes(b"PK\x03\x04" + bytes(100))
    assert r"not a GGUF file (it begins with b'PK\x03\x04')" in message(UsageError, str(tmp_path / "m.bin"))


@pytest.mark.parametrize("size", [0, 3, 4, 23])
def test_file_shorter_than_a_header(tmp_path: Path, size: int) -> None:
    (tmp_path / "m.gguf").write_bytes(GGUF[:size])
    assert f"truncated ({size} bytes" in message(KVError, str(tmp_path / "m.gguf"))


def test_unreadable_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "m.gguf").write_bytes(GGUF)

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    assert message(KVError, str(tmp_path / "m.gguf")).endswith("m.gguf: Permission denied")


def test_a_pipe_or_device_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "m.gguf")
    (tmp_path / "link.gguf").symlink_to("m.gguf")
    for path in (tmp_path / "m.gguf", tmp_path / "link.gguf", Path("/dev/null")):
        assert "is not a regular file" in message(UsageError, str(path))


@pytest.mark.parametrize("spec", ["", " ", "m\0.gguf"])
def test_what_cannot_be_a_path(spec: str) -> None:
    message(UsageError, spec)


def test_parts_of_a_split_model_must_be_there_as_files(tmp_path: Path) -> None:
    first, second = (tmp_path / f"m-0000{i}-of-00002.gguf" for i in (1, 2))
    first.write_bytes(GGUF)
    assert f"{second.name} is not beside it" in message(UsageError, str(first))
    os.mkfifo(second)
    assert "is not a regular file" in message(UsageError, str(first))
    second.unlink()
    second.write_bytes(GGUF)
    assert resolve_model(str(first)) == first


def test_a_path_need_not_be_utf8(tmp_path: Path) -> None:
    path = os.fsencode(tmp_path) + b"/bad\xff.gguf"
    Path(os.fsdecode(path)).write_bytes(GGUF)
    assert os.fsencode(resolve_model(os.fsdecode(path))) == path
