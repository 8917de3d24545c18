"""The models on disk: two caches in temporary folders, the hub's with huggingface_hub itself."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import huggingface_hub.constants
import numpy as np
import pytest
from gguf import GGUFWriter, LlamaFileType

from kvlocal.errors import KVError, UsageError
from kvlocal.models import default as models
from kvlocal.models import listing as model_files
from kvlocal.models.listing import find_model, list_models, read_header, remove_model

SHARDS = ["big-00001-of-00002.gguf", "big-00002-of-00002.gguf"]


def write_gguf(path: Path, *, n: int = 8, file_type: int | str | None = LlamaFileType.MOSTLY_Q4_K_M) -> Path:
    """A GGUF file of ``n`` zeros."""
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = GGUFWriter(path, "qwen2")
    if isinstance(file_type, str):
        writer.add_string("general.file_type", file_type)
    elif file_type is not None:
        writer.add_uint32("general.file_type", int(file_type))
    writer.add_tensor("x", np.zeros(n, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(autouse=True)
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """kvlocal's folder of models, not there yet."""
    monkeypatch.setenv("KVLOCAL_CACHE", str(tmp_path / "own"))
    return tmp_path / "own" / "models"


@pytest.fixture(autouse=True)
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's folder, not there yet."""
    folder = tmp_path / "hub"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(folder))
    scan = huggingface_hub.scan_cache_dir
    monkeypatch.setattr(huggingface_hub, "scan_cache_dir", lambda: scan(folder))
    return folder


def add(hub: Path, repo: str, revision: str, name: str, *, blob: str = "", refs: str = "", **content: Any) -> Path:
    """A file of a repository, as the hub stores it: a link from a revision to a blob."""
    folder = hub / f"models--{repo.replace('/', '--')}"
    stored = folder / "blobs" / (blob or f"blob-of-{revision}-{name}".replace("/", "_"))
    if name.endswith(".gguf"):
        write_gguf(stored, **content)
    else:
        stored.parent.mkdir(parents=True, exist_ok=True)
        stored.write_text("text")
    link = folder / "snapshots" / revision / name
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(os.path.relpath(stored, link.parent))
    if refs:
        (folder / "refs").mkdir(exist_ok=True)
        (folder / "refs" / refs).write_text(revision)
    return link


def below(folder: Path) -> list[str]:
    """All files and links, by their path."""
    paths = (path for path in folder.rglob("*") if path.is_symlink() or path.is_file())
    return sorted(path.relative_to(folder).as_posix() for path in paths)


def names() -> list[str]:
    return [model.name for model in list_models()]


# --- what is there -----------------------------------------------------------------------------------------------


def test_nothing_is_there() -> None:
    assert list_models() == []


def test_own_models_with_what_their_headers_say(own: Path) -> None:
    path = write_gguf(own / "b.gguf")
    write_gguf(own / "a.gguf", file_type=None)
    (own / "notes.txt").touch()
    (own / "gone.gguf").symlink_to("nowhere")
    write_gguf(own / ".fetch-1" / "half.gguf")
    os.utime(path, (2e9, 1e9))
    first, second = list_models()
    assert (first.name, first.architecture, first.quantization) == ("a.gguf", "qwen2", None)
    assert (second.name, second.path, second.files) == ("b.gguf", path, (path,))
    assert (second.cache, second.architecture, second.quantization) == ("kvlocal", "qwen2", "Q4_K_M")
    assert (second.size_bytes, second.last_used, second.is_default) == (path.stat().st_size, 2e9, False)


def test_pipes_are_no_models_and_suffixes_have_any_case(own: Path) -> None:
    write_gguf(own / "A.GGUF")
    os.mkfifo(own / "b.gguf")
    (own / "c.gguf").symlink_to("b.gguf")
    assert names() == ["A.GGUF"]
    assert read_header(own / "b.gguf") == model_files.Header()


def test_looking_is_no_use(own: Path, hub: Path) -> None:
    """A file's header is read; when the model was used must not become now by that."""
    for path in (write_gguf(own / "a.gguf"), add(hub, "u/r", "rev", "m.gguf")):
        os.utime(path, ns=(1_500_000_000 * 10**9, 1_400_000_000 * 10**9 + 7))
    for _ in range(2):
        assert [model.last_used for model in list_models()] == [1.5e9, 1.5e9]
    assert (own / "a.gguf").stat().st_mtime_ns == 1_400_000_000 * 10**9 + 7


def test_the_default_model_is_marked(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_gguf(own / "a.gguf")
    path = write_gguf(own / models.DEFAULT_MODEL.file)
    assert not any(model.is_default for model in list_models()), "of another size: it is not whole"
    monkeypatch.setattr(models, "_is_complete", lambda *_, verify: True)
    assert [model.path for model in list_models() if model.is_default] == [path]


def test_parts_are_one_model(own: Path, hub: Path) -> None:
    for name in SHARDS:
        write_gguf(own / name, n=100)
        add(hub, "u/r", "rev", f"sub/{name}", n=100)
    mine, theirs = list_models()
    assert (mine.name, [path.name for path in mine.files]) == (SHARDS[0], SHARDS)
    assert mine.size_bytes == sum((own / name).stat().st_size for name in SHARDS)
    assert (theirs.name, theirs.path.name) == (f"hf:u/r:sub/{SHARDS[0]}", SHARDS[0])
    assert len(theirs.files) == 2 and theirs.size_bytes == mine.size_bytes


def test_models_of_the_hub_are_named_as_they_are_fetched(hub: Path) -> None:
    link = add(hub, "u/r", "rev", "m-Q4_0.gguf", file_type=LlamaFileType.MOSTLY_Q4_0)
    add(hub, "u/r", "rev", "README.md")
    add(hub, "u/other", "rev2", "x.gguf")
    (hub / "datasets--u--data" / "snapshots" / "rev").mkdir(parents=True)
    (hub / "broken--").mkdir()
    other, model = list_models()
    assert (other.name, model.name, model.path) == ("hf:u/other:x.gguf", "hf:u/r:m-Q4_0.gguf", link)
    assert (model.cache, model.quantization, model.is_default) == ("huggingface", "Q4_0", False)


def test_a_file_in_two_revisions_is_one_model_at_its_newest_place(hub: Path) -> None:
    old = add(hub, "u/r", "old", "m.gguf", blob="same")
    new = hub / "models--u--r" / "snapshots" / "new" / "m.gguf"
    add(hub, "u/r", "new", "m.gguf", blob="same", refs="main")
    (model,) = list_models()
    assert (model.path, set(model.files)) == (new, {old, new})
    assert model.size_bytes == new.stat().st_size, "what they share counts once"


def test_without_the_hubs_package_there_are_only_our_own(own: Path, hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add(hub, "u/r", "rev", "m.gguf")
    write_gguf(own / "a.gguf")
    monkeypatch.setattr(model_files, "import_hub", lambda: (_ for _ in ()).throw(ImportError()))
    assert names() == ["a.gguf"]


@pytest.mark.parametrize("content", [b"", b"GGUF", b"GGUF" + bytes(range(100)), b"text" * 100])
def test_a_damaged_header_says_nothing(content: bytes, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    assert read_header(path) == model_files.Header()
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("file_type", ["text", 99_999])
def test_a_type_that_is_not_known_is_left_out(file_type: int | str, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", file_type=file_type)
    assert read_header(path) == model_files.Header("qwen2", None)


def test_a_library_that_cannot_be_loaded_leaves_the_list(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_name: str) -> None:
        raise KVError("it is broken")

    write_gguf(own / "a.gguf")
    monkeypatch.setattr("kvlocal.native.library.open_library", broken)
    assert list_models()[0].architecture is None


# --- which one is meant ------------------------------------------------------------------------------------------


@pytest.fixture
def several(own: Path, hub: Path) -> None:
    write_gguf(own / "a.gguf")
    for name in ("m-Q4_0.gguf", "m-Q8_0.gguf", "m-F16.gguf"):
        add(hub, "u/r", "rev", name)
    add(hub, "u/one", "rev2", "only.gguf")


@pytest.mark.usefixtures("several")
@pytest.mark.parametrize(
    ("spec", "name"),
    [
        ("a.gguf", "a.gguf"),
        ("hf:u/r:m-Q4_0.gguf", "hf:u/r:m-Q4_0.gguf"),
        ("u/r:m-Q4_0.gguf", "hf:u/r:m-Q4_0.gguf"),
        ("u/r:q4_0", "hf:u/r:m-Q4_0.gguf"),
        ("hf:u/r:Q8_0", "hf:u/r:m-Q8_0.gguf"),
        ("u/one", "hf:u/one:only.gguf"),
    ],
)
def test_a_model_by_its_name(spec: str, name: str) -> None:
    assert find_model(spec).name == name


@pytest.mark.usefixtures("several")
def test_a_model_by_its_path(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for model in list_models():
        assert find_model(str(model.path)) == model
    monkeypatch.chdir(own)
    assert find_model("./a.gguf").name == "a.gguf"


@pytest.mark.usefixtures("several")
def test_none_and_several(tmp_path: Path) -> None:
    outside = write_gguf(tmp_path / "outside.gguf")
    for spec in ("b.gguf", "u/none", "u/r:Q2_K", "hf:", "", str(outside)):
        with pytest.raises(UsageError, match=r"There is no model .*own/models or .*hub; `kvlocal models` lists"):
            find_model(spec)
    for spec in ("u/r", "u/r:"):
        with pytest.raises(UsageError, match=r"fits 3 models; name one of hf:u/r:m-F16.gguf, hf:u/r:m-Q4_0.gguf, "):
            find_model(spec)


# --- away with it ------------------------------------------------------------------------------------------------


def test_removing_one_of_our_own(own: Path) -> None:
    for name in [*SHARDS, "a.gguf"]:
        write_gguf(own / name, n=100)
    size = (own / SHARDS[0]).stat().st_size
    assert remove_model(find_model(SHARDS[0])) == 2 * size
    assert names() == ["a.gguf"]


def test_a_link_is_removed_and_not_what_it_points_to(own: Path, tmp_path: Path) -> None:
    outside = write_gguf(tmp_path / "outside.gguf")
    own.mkdir(parents=True)
    (own / "link.gguf").symlink_to(outside)
    remove_model(find_model("link.gguf"))
    assert outside.is_file() and names() == []


def test_a_revision_with_nothing_else_goes_as_a_whole(hub: Path) -> None:
    link = add(hub, "u/r", "rev", "m.gguf", refs="main")
    add(hub, "u/other", "rev2", "x.gguf")
    size = link.stat().st_size
    assert remove_model(find_model("u/r")) == size
    assert not (hub / "models--u--r").exists()
    assert names() == ["hf:u/other:x.gguf"]


def test_the_other_files_of_a_revision_stay(hub: Path) -> None:
    for name in ("m-Q4_0.gguf", "m-Q8_0.gguf", "README.md"):
        add(hub, "u/r", "rev", name, refs="main")
    remove_model(find_model("u/r:Q4_0"))
    left = ["blob-of-rev-README.md", "blob-of-rev-m-Q8_0.gguf"]
    folder = hub / "models--u--r"
    assert below(folder / "blobs") == left
    assert below(folder / "snapshots") == ["rev/README.md", "rev/m-Q8_0.gguf"]
    assert names() == ["hf:u/r:m-Q8_0.gguf"]


def test_a_copy_of_a_repository_with_the_same_revision_stays(hub: Path) -> None:
    """Revisions are named by git: a copy has the same names."""
    for repo in ("u/a", "u/b"):
        add(hub, repo, "rev", "m.gguf")
    remove_model(find_model("u/a"))
    assert names() == ["hf:u/b:m.gguf"]
    remove_model(find_model("u/b"))
    assert names() == []


def test_a_link_out_of_the_hubs_cache_is_refused(hub: Path, tmp_path: Path) -> None:
    outside = {repo: write_gguf(tmp_path / f"{repo}.gguf") for repo in ("r", "alone")}
    add(hub, "u/r", "rev", "README.md")
    for repo, path in outside.items():
        link = hub / f"models--u--{repo}" / "snapshots" / f"rev{repo[1:]}" / "m.gguf"
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(path)
    with pytest.raises(KVError, match="points out of .*models--u--r; remove it yourself"):
        remove_model(find_model("u/r"))
    assert len(names()) == 2
    # a revision that goes as a whole: the folder with the link, not what it points to
    remove_model(find_model("u/alone"))
    assert names() == ["hf:u/r:m.gguf"]
    assert all(path.is_file() for path in outside.values())


def test_an_old_hub_removes_whole_revisions_only(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add(hub, "u/r", "rev", "m.gguf")
    add(hub, "u/r", "rev", "README.md")
    add(hub, "u/one", "rev2", "x.gguf")
    scan: Callable[[], Any] = huggingface_hub.scan_cache_dir

    def old_scan() -> Any:
        info = scan()
        return SimpleNamespace(repos=info.repos, delete_revisions=info.delete_revisions)

    monkeypatch.setattr(huggingface_hub, "scan_cache_dir", old_scan)
    with pytest.raises(KVError, match="shares its revision with other files"):
        remove_model(find_model("u/r"))
    remove_model(find_model("u/one"))
    assert names() == ["hf:u/r:m.gguf"]


def test_what_cannot_be_removed_is_one_sentence(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_gguf(own / "a.gguf")
    model = find_model("a.gguf")

    def refuse(_path: Path) -> None:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", refuse)
        with pytest.raises(KVError, match=r"a\.gguf cannot be removed: Permission denied\."):
            remove_model(model)
    (own / "a.gguf").rename(own.parent / "a.gguf")
    with pytest.raises(KVError, match="cannot be removed: No such file"):
        remove_model(model)


def test_a_file_elsewhere_is_never_removed(own: Path, hub: Path, tmp_path: Path) -> None:
    """Not even if somebody makes up a model."""
    write_gguf(own / "a.gguf")
    outside = write_gguf(tmp_path / "outside.gguf")
    for cache in ("kvlocal", "huggingface"):
        values = {**vars(find_model("a.gguf")), "cache": cache, "path": outside, "files": (outside,)}
        with pytest.raises(KVError, match="does not lie in|is no longer in"):
            remove_model(model_files.ModelFile(**values))
    assert outside.is_file() and names() == ["a.gguf"]
