"""The tools of make test-device: copies counted in a log, headers taken or fetched, packages named."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).resolve().parents[2] / "tools"
sys.path.insert(0, str(TOOLS))
import count_transfers  # noqa: E402
import device_tests  # noqa: E402

sys.path.remove(str(TOOLS))

LOG = """
## SPLIT #0: Vulkan0 # 0 inputs
node #  0 (   GET_ROWS): embd

## SPLIT #0: CPU # 0 inputs
node #  0 (   GET_ROWS): embd (   1K) [  CPU         ]

## SPLIT #1: Vulkan0 # 3 inputs: [embd (   1K)] [kvl_rows (  12K)] [leaf 7 (view) (   4M)]
node #  1

## SPLIT #2: CPU # 1 inputs: [Vulkan0#out#0 (   2K)]
"""


def test_the_parts_of_every_graph_are_found() -> None:
    assert count_transfers.graphs(LOG) == [
        [("Vulkan0", [])],
        [("CPU", []), ("Vulkan0", ["embd", "kvl_rows", "leaf 7 (view)"]), ("CPU", ["Vulkan0#out#0"])],
    ]


def test_missing_packages_are_named_to_whoever_may_not_install_them(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(device_tests.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(device_tests.os, "geteuid", lambda: 1000)
    monkeypatch.setattr(device_tests, "output", lambda *words: "" if words[-1] == "glslc" else "installed")
    with pytest.raises(SystemExit):
        device_tests.install_packages()
    assert "`apt-get install glslc`" in capsys.readouterr().err
    monkeypatch.setattr(device_tests.shutil, "which", lambda name: None)
    with pytest.raises(SystemExit):
        device_tests.install_packages()
    assert "there is no apt-get here" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("installed", "candidate", "backports"),
    [("25.0.7-2", "", None), ("", "25.0.7-2", False), ("22.3.6-1", "22.3.6-1", True), ("", "22.3.6-1", True)],
)
def test_a_mesa_that_is_too_old_is_replaced(
    installed: str, candidate: str, backports: bool | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ran: list[tuple[object, ...]] = []

    def output(*words: str) -> str:
        return (installed if not ran else "25.0.7-2") if words[0] == "dpkg-query" else f"  Candidate: {candidate}\n"

    monkeypatch.setattr(device_tests, "BUILD", tmp_path)
    monkeypatch.setattr(device_tests, "output", output)
    monkeypatch.setattr(device_tests, "run", lambda *words, **_: ran.append(words))
    monkeypatch.setattr(device_tests.os, "geteuid", lambda: 1000)
    if backports is not None:
        with pytest.raises(SystemExit):
            device_tests.install_mesa()
    monkeypatch.setattr(device_tests.os, "geteuid", lambda: 0)
    device_tests.install_mesa()
    commands = [word for words in ran for word in words if word in ("update", "install", "bookworm-backports")]
    assert commands == {None: [], False: ["install"], True: ["update", "bookworm-backports", "install"]}[backports]


@pytest.mark.parametrize(("version", "own"), [(239, False), (308, False), (309, True), (321, True)])
def test_old_headers_are_replaced(version: int, own: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    system = tmp_path / "include"
    (system / "vulkan").mkdir(parents=True)
    (system / "vulkan" / "vulkan_core.h").write_text(f"#define VK_HEADER_VERSION {version}\n")
    unpacked: list[Path] = []
    monkeypatch.setattr(device_tests, "SYSTEM_HEADERS", system)
    monkeypatch.setattr(device_tests, "BUILD", tmp_path)
    monkeypatch.setattr(device_tests, "unpack_headers", unpacked.append)
    assert device_tests.headers() == (system if own else tmp_path / "headers" / "usr" / "include")
    assert unpacked == ([] if own else [tmp_path / "headers"])
