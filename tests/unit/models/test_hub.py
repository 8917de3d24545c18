"""Models of the Hugging Face hub, without a network: the hub is faked."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvlocal.errors import KVError, UsageError
from kvlocal.models.resolve import resolve_model

GGUF = b"GGUF" + bytes(range(200))
SHARDS = ["m-00001-of-00002.gguf", "m-00002-of-00002.gguf"]


def message(kind: type[KVError], spec: str | None) -> str:
    """Return the message of the error that `spec` ends in, which must be exactly of `kind` and one line."""
    with pytest.raises(KVError) as caught:
        resolve_model(spec)
    assert type(caught.value) is kind
    assert "\n" not in str(caught.value)
    return str(caught.value)


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
    assert resolve_model(spec) == hub.root / downloads[0]
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
    assert resolve_model("hf:u/r") == hub.root / "sub/m-Q4_0.gguf"


def test_progress_follows_the_first_bar_of_the_hub(hub: FakeHub) -> None:
    seen: list[tuple[int, int | None, str]] = []
    resolve_model("hf:u/r:m.gguf", progress=lambda *step: seen.append(step))
    assert seen == [(5, 10, "u/r/m.gguf"), (10, 10, "u/r/m.gguf")]


def test_old_hub_draws_its_own_bars(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "hf_hub_download", lambda repo, name: FakeHub.hf_hub_download(hub, repo, name))
    assert resolve_model("hf:u/r:m.gguf", progress=print).read_bytes() == GGUF


def test_hub_is_optional(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert "pip install huggingface_hub" in message(KVError, "hf:u/r")
