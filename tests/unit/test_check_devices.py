"""tools/check_devices.py: what it sees in objects, which files it looks at, what it says of a check that failed."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from types import ModuleType

import pytest

OURS = "int kvl_a(int x) { return x; }\n"


@pytest.fixture
def compiled(tmp_path: Path) -> dict[str, Path]:
    sources = {
        "hooked": "int kvl_a(int); int other(); int f() { return kvl_a(1) + other(); }",
        "stale": "int kvl_a(int, int); int g() { return kvl_a(1, 2); }",
        "bare": "int other(); int h() { return other(); }",
        "ours": OURS,
    }
    for name, text in sources.items():
        (tmp_path / f"{name}.cpp").write_text(text)
        command = [os.environ.get("CXX", "c++"), "-c", "-o", tmp_path / f"{name}.o", tmp_path / f"{name}.cpp"]
        subprocess.run(command, check=True)
    return {name: tmp_path / f"{name}.o" for name in sources}


def test_what_hooks_call_must_be_there(check_devices: ModuleType, compiled: dict[str, Path]) -> None:
    hooked, stale, bare, ours = (compiled[name] for name in ("hooked", "stale", "bare", "ours"))
    check_devices.check_calls([hooked], [ours])
    with pytest.raises(check_devices.CheckFailed, match="called and not there: .*kvl_aii"):
        check_devices.check_calls([hooked, stale], [ours])
    with pytest.raises(check_devices.CheckFailed, match=r"^bare\.o calls nothing of ours"):
        check_devices.check_calls([hooked, bare], [ours])


def test_the_files_with_hooks_are_those_of_the_patches(check_devices: ModuleType) -> None:
    names = [path.name for backend in ("ggml-cuda", "ggml-metal") for path in check_devices.get_hooked(backend)]
    assert sorted(names) == ["ggml-cuda.cu", "ggml-metal-ops.cpp", "ggml-metal.cpp"]
    with pytest.raises(check_devices.CheckFailed, match="no patch has hunks in ggml-none"):
        check_devices.get_hooked("ggml-none")


def test_every_check_says_a_line_and_one_that_fails_is_an_exit_code(
    check_devices: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    checks = {"bad": lambda: check_devices.run("sh", "-c", "echo it broke >&2; exit 3"), "good": lambda: "compiles"}
    monkeypatch.setattr(check_devices, "CHECKS", checks)
    assert check_devices.main() == 1
    said = re.sub(r"\d+ s\b", "N s", capsys.readouterr().out)
    assert said == "bad: FAILED: sh returned 3:\nit broke (N s)\ngood: compiles (N s)\n"
    del checks["bad"]
    assert check_devices.main() == 0
