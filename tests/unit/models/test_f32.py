"""Models rewritten with F32 weights: read back with the gguf library, and loaded."""

from __future__ import annotations

import shutil
import weakref
from collections import namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter
from gguf.quants import dequantize, quantize

from kvlocal.errors import KVError, UsageError
from kvlocal.models import f32 as module
from kvlocal.models.f32 import f32_copy, to_f32
from kvlocal.native.model import Model

TINY = Path(__file__).resolve().parents[2] / "fixtures" / "kvlocal-tiny-q8_0.gguf"
TEXT = "Who is the owner of the mill?\n The owner … of the mill is Belka. 48213"


def metadata(path: Path) -> dict[str, tuple[list[GGUFValueType], Any]]:
    """Types and values of all fields but those that count and those that name the type of the weights."""
    fields = GGUFReader(path).fields
    return {
        key: (field.types, field.contents())
        for key, field in fields.items()
        if not key.startswith("GGUF.") and key != "general.file_type"
    }


def write_model(path: Path, **tensors: tuple[np.ndarray, GGMLQuantizationType | None]) -> Path:
    """A file with metadata of every type and these tensors; of a type that numpy lacks if one is named."""
    writer = GGUFWriter(path, "llama")
    kinds = GGUFValueType
    writer.add_custom_alignment(64)
    numbers = {kinds.UINT8: 7, kinds.INT8: -7, kinds.UINT16: 700, kinds.INT16: -700, kinds.UINT32: 70_000}
    numbers |= {kinds.INT32: -70_000, kinds.UINT64: 1 << 40, kinds.INT64: -(1 << 40)}
    for kind, value in (numbers | {kinds.FLOAT32: 0.1, kinds.FLOAT64: 0.1, kinds.BOOL: True}).items():
        writer.add_key_value(f"test.{kind.name.lower()}", value, kind)
        if kind != kinds.BOOL:
            writer.add_key_value(f"test.{kind.name.lower()}s", [value, 1], kinds.ARRAY, kind)
    writer.add_key_value("test.string", "", kinds.STRING)
    writer.add_key_value("test.broken", [b"\xff\xfe", b"plain"], kinds.ARRAY, kinds.STRING)
    writer.add_key_value("test.bools", [True, False], kinds.ARRAY, kinds.BOOL)
    writer.add_file_type(7)
    for name, (values, kind) in tensors.items():
        writer.add_tensor(name.replace("_", "."), values, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def random(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


@pytest.fixture(scope="module")
def tiny_f32(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return to_f32(TINY, tmp_path_factory.mktemp("f32") / "tiny.gguf")


def test_every_tensor_is_f32_with_the_values_and_the_shape_it_had(tiny_f32: Path) -> None:
    before, after = GGUFReader(TINY).tensors, GGUFReader(tiny_f32).tensors
    assert [tensor.name for tensor in before] == [tensor.name for tensor in after]
    assert {tensor.tensor_type for tensor in after} == {GGMLQuantizationType.F32}
    for old, new in zip(before, after, strict=True):
        assert old.shape.tolist() == new.shape.tolist(), old.name
        np.testing.assert_array_equal(dequantize(old.data, old.tensor_type), new.data, old.name)
    assert any(len(set(tensor.shape.tolist())) == 2 for tensor in after), "no shape here could be turned round"


def test_metadata_is_the_same_but_for_the_type_of_the_weights(tiny_f32: Path) -> None:
    assert metadata(TINY) == metadata(tiny_f32)
    field = GGUFReader(tiny_f32).fields["general.file_type"]
    assert field.contents() == 0 and field.types == [GGUFValueType.UINT32]


def test_the_copy_loads_and_has_the_same_tokenizer(tiny_f32: Path) -> None:
    tokens = []
    for path in (TINY, tiny_f32):
        model = Model(path)
        tokens.append(model.tokenize(TEXT))
        assert b"".join(model.piece(token) for token in model.tokenize(TEXT, add_special=False)).decode() == TEXT
        model.close()
    assert tokens[0] == tokens[1] and len(tokens[0]) > 10


def test_metadata_of_every_type_is_copied_with_its_type(tmp_path: Path) -> None:
    source = write_model(tmp_path / "a.gguf", w=(random(2, 32), None))
    copy = GGUFReader(to_f32(source, tmp_path / "b.gguf"))
    original = GGUFReader(source)
    assert original.fields.keys() == copy.fields.keys()
    for key, field in original.fields.items():
        if key != "general.file_type":
            parts = [copy.fields[key].parts[i].tobytes() for i in copy.fields[key].data]
            assert copy.fields[key].types == field.types, key
            assert parts == [field.parts[i].tobytes() for i in field.data], key
    assert copy.alignment == 64 and all(tensor.data_offset % 64 == 0 for tensor in copy.tensors)


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q8_0"])
def test_types_of_several_dimensions_are_dequantized(tmp_path: Path, kind: str) -> None:
    of = GGMLQuantizationType[kind]
    weights = quantize(random(3, 5, 64), of)
    source = write_model(tmp_path / "a.gguf", w=(weights, None if kind == "F16" else of), norm_weight=(random(7), None))
    norm, tensor = sorted(GGUFReader(to_f32(source, tmp_path / "b.gguf")).tensors, key=lambda t: len(t.shape))
    np.testing.assert_array_equal(tensor.data, dequantize(weights, of))
    assert tensor.shape.tolist() == [64, 5, 3] and tensor.tensor_type == GGMLQuantizationType.F32
    np.testing.assert_array_equal(norm.data, random(7))


def test_progress_ends_at_the_size_of_the_tensors(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    copy = to_f32(TINY, tmp_path / "b.gguf", lambda done, total: seen.append((done, total)))
    reader = GGUFReader(copy)
    assert [done for done, _ in seen] == sorted({done for done, _ in seen}) and len(seen) == len(reader.tensors)
    assert {total for _, total in seen} == {seen[-1][0]} == {copy.stat().st_size - reader.data_offset}


def test_one_tensor_is_held_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[weakref.ref[np.ndarray]] = []

    def spy(*args: Any) -> np.ndarray:
        assert all(values() is None for values in made)
        values = dequantize(*args)
        made.append(weakref.ref(values))
        return values

    monkeypatch.setattr(module, "dequantize", spy)
    to_f32(TINY, tmp_path / "b.gguf")
    assert len(made) > len(GGUFReader(TINY).tensors)


#
# the cached copy
#


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KVLOCAL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "models"


def test_a_model_of_f32_is_its_own_copy(tiny_f32: Path, cache: Path) -> None:
    assert f32_copy(tiny_f32) == tiny_f32
    assert not cache.exists()


def test_a_copy_is_made_once_and_found_again(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = f32_copy(TINY)
    assert copy.parent == cache and copy.name.startswith("kvlocal-tiny-q8_0-f32-")
    monkeypatch.setattr(module, "GGUFReader", None)
    assert f32_copy(TINY) == copy
    assert list(cache.iterdir()) == [copy]


def test_a_changed_source_has_another_copy(cache: Path, tmp_path: Path) -> None:
    source = write_model(tmp_path / "a.gguf", w=(random(2, 32).astype(np.float16), None))
    first = f32_copy(source)
    write_model(source, w=(random(4, 32).astype(np.float16), None))
    second = f32_copy(source)
    assert first != second and GGUFReader(second).tensors[0].shape.tolist() == [32, 4]


#
# what goes wrong
#


def left(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.rglob("*"))


def test_nothing_is_left_when_writing_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    n_written = 0

    def fail(*args: Any) -> np.ndarray:
        nonlocal n_written
        n_written += 1
        if n_written > 9:
            raise OSError(28, "No space left on device")
        return dequantize(*args)

    monkeypatch.setattr(module, "dequantize", fail)
    with pytest.raises(KVError, match=r"cannot be written to .*No space left on device; it takes 10 MB"):
        to_f32(TINY, tmp_path / "out" / "b.gguf")
    assert n_written == 10 and left(tmp_path) == ["out"]


def test_nothing_is_left_when_it_is_interrupted_and_an_older_copy_stays(tmp_path: Path) -> None:
    target = tmp_path / "b.gguf"
    target.write_bytes(b"older")

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        to_f32(TINY, target, stop)
    assert left(tmp_path) == ["b.gguf"] and target.read_bytes() == b"older"


def test_too_little_space_is_said_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, 5_000_000))
    with pytest.raises(KVError, match=r"takes 10 MB, and .* has 5 MB free"):
        to_f32(TINY, tmp_path / "b.gguf")
    assert left(tmp_path) == []


@pytest.mark.parametrize("make", [to_f32, lambda source, target: f32_copy(source)], ids=["to_f32", "f32_copy"])
def test_parts_of_a_split_model_are_refused(tmp_path: Path, cache: Path, make: Any) -> None:
    source = tmp_path / "m-00001-of-00003.gguf"
    shutil.copy(TINY, source)
    with pytest.raises(UsageError, match="one of 3 parts of a split model"):
        make(source, tmp_path / "b.gguf")


def test_a_split_model_of_one_part_is_whole(tmp_path: Path) -> None:
    source = write_model(tmp_path / "m-00001-of-00001.gguf", w=(random(2, 32).astype(np.float16), None))
    assert to_f32(source, tmp_path / "b.gguf").is_file()


def test_a_type_that_cannot_be_dequantized_is_named_with_its_tensor(tmp_path: Path) -> None:
    source = write_model(tmp_path / "a.gguf", w=(random(2, 32), None), ids=(np.arange(4, dtype=np.int32), None))
    with pytest.raises(KVError, match="its tensor ids has the type I32"):
        to_f32(source, tmp_path / "b.gguf")
    assert left(tmp_path) == ["a.gguf"]


def test_a_file_is_not_rewritten_in_its_own_place(tmp_path: Path) -> None:
    source = write_model(tmp_path / "a.gguf", w=(random(2, 32), None))
    with pytest.raises(UsageError, match="cannot be rewritten in its own place"):
        to_f32(source, source)
    assert GGUFReader(source).tensors[0].n_elements == 64


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        (None, UsageError, "There is no model file"),
        (b"", UsageError, "is not a GGUF file"),
        (b"PK\x03\x04 and more", UsageError, r"begins with b'PK\\x03\\x04'"),
        (TINY.read_bytes()[:1000], KVError, "cannot be read as a GGUF file"),
        (TINY.read_bytes()[:-1000], KVError, "cannot be read as a GGUF file"),
    ],
    ids=["missing", "empty", "zip", "cut in the header", "cut in the tensors"],
)
def test_files_that_are_no_models_are_refused(
    tmp_path: Path, cache: Path, data: bytes | None, error: type[KVError], message: str
) -> None:
    source = tmp_path / "a.gguf"
    if data is not None:
        source.write_bytes(data)
    for make in (lambda: to_f32(source, tmp_path / "b.gguf"), lambda: f32_copy(source)):
        with pytest.raises(error, match=message):
            make()
    assert not (tmp_path / "b.gguf").exists()
