"""A model with all its weights as F32: what numerical comparisons are made on.

    path = f32_copy(Path("model.Q4_K_M.gguf"))

On quantized weights llama.cpp also rounds the activations, so that a last-bit difference between two kernels that do
the same becomes a large one: their logits differ by a KL divergence of about 0.003. On F32 weights this falls away.
"""

from __future__ import annotations

import hashlib
import math
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter, LlamaFileType
from gguf.quants import dequantize

from kvlocal.errors import KVError, UsageError
from kvlocal.models.folder import models_dir
from kvlocal.models.parts import PART

Progress = Callable[[int, int], None]
"""Called as (bytes written, bytes in all) after each tensor."""

_VERSION = 1  # part of the copy's name: raise it when the same source gives other bytes
_ARCHITECTURE, _FILE_TYPE, _ALIGNMENT = "general.architecture", "general.file_type", "general.alignment"


def f32_copy(source: Path, on_progress: Progress | None = None) -> Path:
    """The model with F32 weights: ``source`` itself if it is one, else its copy beside the fetched models.

    The copy is made if it is not there, and found again by the name, size and time of change of ``source``. It takes
    4 bytes per weight (0.5 GB for 135 M weights) and is never removed by the program.

    Raises:
        UsageError, KVError: as :func:`to_f32`.
    """
    target = _cached(source)
    if target.is_file():
        return target
    if all(tensor.tensor_type == GGMLQuantizationType.F32 for tensor in _open(source).tensors):
        return source
    return to_f32(source, target, on_progress)


def to_f32(source: Path, target: Path, on_progress: Progress | None = None) -> Path:
    """Rewrite a GGUF file with every tensor as F32 and the same metadata, but for ``general.file_type``.

    The file appears under its name only when it is complete; on failure nothing is left. Memory: the metadata, and
    one tensor at a time.

    Args:
        target: replaced if it is there.

    Raises:
        UsageError: ``source`` is one part of a split model, is no GGUF file, or is ``target``.
        KVError: a tensor of a type that cannot be dequantized, too little space, or a file that cannot be read or
            written.
    """
    reader = _open(source)
    _check_types(source, reader)
    size = sum(_padded(4 * int(tensor.n_elements), int(reader.alignment)) for tensor in reader.tensors)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.exists() and target.samefile(source):
            raise UsageError(f"{source} cannot be rewritten in its own place; name another file for the F32 copy.")
        # its header has about the size of the source's: only types and offsets differ
        _check_space(target.parent, int(reader.data_offset) + size)
        # in the directory of the target: a rename is atomic only within one file system
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=target.parent, ignore_cleanup_errors=True) as scratch:
            temp = Path(scratch) / target.name
            _write(source, reader, temp, size, on_progress)
            temp.replace(target)
    except OSError as error:
        raise KVError(
            f"The F32 copy of {source.name} cannot be written to {target.parent}: {error.strerror or error}; "
            f"it takes {size / 1e6:.0f} MB, and KVLOCAL_CACHE names another directory for models."
        ) from error
    return target


def _cached(source: Path) -> Path:
    try:
        state = source.stat()
    except FileNotFoundError:
        raise UsageError(f"There is no model file {source}; give the path of a GGUF file.") from None
    except OSError as error:
        raise KVError(f"{source} cannot be read: {error.strerror or error}.") from error
    digest = hashlib.sha256(f"{_VERSION} {state.st_size} {state.st_mtime_ns}".encode()).hexdigest()[:12]
    return models_dir() / f"{source.stem}-f32-{digest}.gguf"


def _open(source: Path) -> GGUFReader:
    shard = PART.search(source.name)
    if shard is not None and int(shard[2]) > 1:
        raise UsageError(
            f"{source.name} is one of {int(shard[2])} parts of a split model; "
            "join them first with llama-gguf-split --merge, or take a model in one file."
        )
    try:
        with source.open("rb") as file:
            magic = file.read(4)
        reader = GGUFReader(source) if magic == b"GGUF" else None
    except FileNotFoundError:
        raise UsageError(f"There is no model file {source}; give the path of a GGUF file.") from None
    except OSError as error:
        raise KVError(f"{source} cannot be read: {error.strerror or error}.") from error
    except (ValueError, KeyError, IndexError) as error:
        # the reader's ways to say that a file is cut off or damaged
        raise KVError(
            f"{source} cannot be read as a GGUF file ({error}); if it was downloaded, download it again."
        ) from error
    if reader is None:
        raise UsageError(f"{source} is not a GGUF file (it begins with {magic!r}); give a model in GGUF format.")
    if reader.byte_order != "I":
        raise KVError(f"{source} was written for machines of another byte order; take the usual file of this model.")
    if _ARCHITECTURE not in reader.fields:
        raise KVError(f"{source} names no architecture ({_ARCHITECTURE}); give a model that llama.cpp can load.")
    return reader


def _check_types(source: Path, reader: GGUFReader) -> None:
    """Dequantize one row of each type, so that a type that is not supported shows before anything is written."""
    tried = set()
    for tensor in reader.tensors:
        if tensor.tensor_type in tried or tensor.data.size == 0:
            continue
        tried.add(tensor.tensor_type)
        try:
            dequantize(tensor.data.reshape(-1, tensor.data.shape[-1])[:1], tensor.tensor_type)
        except NotImplementedError:
            raise KVError(
                f"{source.name} cannot be copied as F32: its tensor {tensor.name} has the type "
                f"{tensor.tensor_type.name}, which gguf cannot dequantize; take another quantization of the model."
            ) from None


def _check_space(directory: Path, size: int) -> None:
    free = shutil.disk_usage(directory).free
    if free < size:
        raise KVError(
            f"The F32 copy takes {size / 1e6:.0f} MB, and {directory} has {free / 1e6:.0f} MB free; "
            "make room, or let KVLOCAL_CACHE name another directory for models."
        )


def _write(source: Path, reader: GGUFReader, path: Path, size: int, on_progress: Progress | None) -> None:
    writer = GGUFWriter(path, reader.fields[_ARCHITECTURE].contents(), endianess=reader.endianess)
    try:
        writer.data_alignment = int(reader.alignment)
        _copy_metadata(source, reader, writer)
        for tensor in reader.tensors:
            # the file has the inner dimension first, numpy and the writer have it last
            shape = tuple(int(n) for n in reversed(tensor.shape))
            writer.add_tensor_info(tensor.name, shape, np.dtype(np.float32), 4 * math.prod(shape))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        done = 0
        for tensor in reader.tensors:
            # not bound to a name: each is gone before the next one is made
            writer.write_tensor_data(np.ascontiguousarray(dequantize(tensor.data, tensor.tensor_type), np.float32))
            done += _padded(4 * int(tensor.n_elements), int(reader.alignment))
            if on_progress is not None:
                on_progress(done, size)
    finally:
        writer.close()


def _copy_metadata(source: Path, reader: GGUFReader, writer: GGUFWriter) -> None:
    for key, field in reader.fields.items():
        # the first are the header's counts, the second is what the writer was made with
        if key.startswith("GGUF.") or key in (_ARCHITECTURE, _FILE_TYPE):
            continue
        kind, *items = field.types
        if GGUFValueType.ARRAY in items:
            raise KVError(f"{source.name} has an array of arrays ({key}), which gguf cannot copy.")
        value = _value(field)
        # gguf writes no empty arrays
        if kind != GGUFValueType.ARRAY or value:
            writer.add_key_value(key, value, kind, items[0] if items else None)
    writer.add_uint32(_FILE_TYPE, int(LlamaFileType.ALL_F32))


def _value(field: Any) -> Any:
    """The field's value; strings as bytes, since those of a vocabulary need not be UTF-8."""
    if field.types[-1] != GGUFValueType.STRING:
        return field.contents()
    strings = [field.parts[i].tobytes() for i in field.data]
    return strings if field.types[0] == GGUFValueType.ARRAY else strings[0]


def _padded(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment
