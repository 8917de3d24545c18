"""Files that results go to: what could not be written is refused before the measurement."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
from kvlocal_cli.terminal.output_file import check_output, write_output

from kvlocal.errors import KVError, UsageError


def test_what_can_be_written_is_left_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "old.json").write_text("before")
    check_output(tmp_path / "old.json")
    check_output(tmp_path / "new.json")
    check_output(Path("/dev/stdout"))
    os.mkfifo(tmp_path / "pipe")
    check_output(tmp_path / "pipe")
    assert (tmp_path / "old.json").read_text() == "before" and sorted(os.listdir(tmp_path)) == ["old.json", "pipe"]


def test_no_folder_and_a_folder(tmp_path: Path) -> None:
    for path, said in ((tmp_path / "none" / "x.json", "no folder"), (tmp_path, "is a folder")):
        with pytest.raises(UsageError, match=said):
            check_output(path)


def read_only(*_: Any, **__: Any) -> Any:
    raise OSError(errno.EROFS, os.strerror(errno.EROFS))


def test_a_read_only_folder_or_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "TemporaryFile", read_only)
    with pytest.raises(KVError, match=r"new.json' cannot be written: Read-only file system; name another file"):
        check_output(tmp_path / "new.json")
    (tmp_path / "old.json").touch()
    monkeypatch.setattr(Path, "open", read_only)
    with pytest.raises(KVError, match=r"old.json' cannot be written: Read-only"):
        check_output(tmp_path / "old.json")


def test_a_folder_of_the_kernel_is_one_where_nothing_can_be_made() -> None:
    with pytest.raises(KVError, match="cannot be written"):
        check_output(Path("/proc/new.json"))


def test_results_that_cannot_be_written_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(KVError, match="No space left on device; the results were printed"):
        write_output(Path("/dev/full"), "the table\n")
    assert capsys.readouterr().out == "the table\n"
