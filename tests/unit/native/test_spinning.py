"""How waiting threads are told not to spin for long, and what becomes of it."""

from __future__ import annotations

import os

import pytest

from kvlocal.native import spinning
from kvlocal.native.spinning import SPINS, Loading, Spinning, short_spins

GNU, TORCH, LLVM = "/usr/lib/libgomp.so.1", "/torch/lib/libgomp-24e2ab19.so.1", "/opt/lib/libomp.so"


@pytest.fixture(autouse=True)
def _unset(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("before", [None, ""])
def test_the_variable_is_set_while_the_library_is_loaded_and_no_longer(
    monkeypatch: pytest.MonkeyPatch, before: str | None
) -> None:
    if before is not None:
        monkeypatch.setenv("GOMP_SPINCOUNT", before)
    with short_spins() as loading:
        assert os.environ["GOMP_SPINCOUNT"] == str(SPINS)
    assert os.environ.get("GOMP_SPINCOUNT") == before and not loading.asked
    with pytest.raises(OSError), short_spins():
        raise OSError
    assert os.environ.get("GOMP_SPINCOUNT") == before


@pytest.mark.parametrize(("name", "value"), [("GOMP_SPINCOUNT", "0"), ("OMP_WAIT_POLICY", "active")])
def test_what_the_user_set_stays(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    with short_spins() as loading:
        assert os.environ[name] == value
        assert name == "GOMP_SPINCOUNT" or "GOMP_SPINCOUNT" not in os.environ
    assert os.environ[name] == value
    assert loading.judge(True) == Spinning("environment", f"{name}={value}", loading.judge(True).runtime)


@pytest.mark.parametrize(
    ("asked", "before", "after", "found"),
    [
        ("", [], [GNU], Spinning("kvlocal", f"GOMP_SPINCOUNT={SPINS}", GNU)),
        # another copy beside ours does not matter
        ("", [TORCH], [TORCH, GNU], Spinning("kvlocal", f"GOMP_SPINCOUNT={SPINS}", GNU)),
        ("", [GNU], [GNU], Spinning("earlier", "", GNU)),
        ("", [], [LLVM], Spinning("other", "", LLVM)),
        ("GOMP_SPINCOUNT=0", [GNU], [GNU], Spinning("environment", "GOMP_SPINCOUNT=0", GNU)),
    ],
)
def test_what_became_of_it(asked: str, before: list[str], after: list[str], found: Spinning) -> None:
    assert Loading(asked, before, after).judge(openmp=True) == found


def test_where_the_system_does_not_tell_what_is_loaded(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    monkeypatch.setattr(spinning, "_MAPS", tmp_path_factory.mktemp("none") / "maps")
    assert spinning._runtimes() == []
    assert Loading("", [], []).judge(openmp=True).source == "other"


def test_without_openmp_ggml_has_threads_of_its_own() -> None:
    assert Loading("OMP_WAIT_POLICY=active", [GNU], [GNU]).judge(openmp=False) == Spinning("own", "poll=0")
