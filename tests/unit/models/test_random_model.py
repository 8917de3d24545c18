"""Models with random weights, read back with the gguf library."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader
from gguf.quants import dequantize

from kvlocal.errors import KVError, UsageError
from kvlocal.models import random as random_model
from kvlocal.models.random import SHAPES, OffsetShape, Shape, write_random_model

TINY = Shape("tiny", "llama", 2, 256, 4, 2, 32, 512, 300, 10000.0, 4096, tied=True)
QWEN = replace(TINY, name="tiny-qwen", arch="qwen2", n_head=8, tied=False, rms_eps=1e-6)


def tensors(path: Path) -> dict[str, Any]:
    return {tensor.name: tensor for tensor in GGUFReader(path).tensors}


@pytest.mark.parametrize("shape", [TINY, QWEN], ids=lambda shape: shape.name)
def test_weights_have_zero_mean_and_keep_the_variance(tmp_path: Path, shape: Shape) -> None:
    for name, tensor in tensors(write_random_model(shape, tmp_path / "m.gguf")).items():
        values = dequantize(tensor.data, tensor.tensor_type)
        if tensor.tensor_type == GGMLQuantizationType.F32:
            assert name.endswith((".bias", "norm.weight"))
            assert (values == 1).all() != name.endswith(".bias")
            continue
        n_in = values.shape[1]
        assert math.isclose(values.std() * math.sqrt(n_in), 1, rel_tol=0.05), name
        assert abs(values.mean()) * math.sqrt(n_in) < 0.05, name
        assert tuple(int(n) for n in tensor.shape) == values.shape[::-1]


def test_the_output_matrix_is_of_the_better_type(tmp_path: Path) -> None:
    q4, q6 = GGMLQuantizationType.Q4_0, GGMLQuantizationType.Q6_K
    tied = tensors(write_random_model(TINY, tmp_path / "tied.gguf"))
    both = tensors(write_random_model(QWEN, tmp_path / "both.gguf"))
    assert tied["token_embd.weight"].tensor_type == q6 and "output.weight" not in tied
    assert both["token_embd.weight"].tensor_type == q4 and both["output.weight"].tensor_type == q6
    assert {t.tensor_type for name, t in tied.items() if name.startswith("blk") and t.data.ndim == 2} == {q4}


def test_only_qwen_has_biases_and_shapes_are_those_asked_for(tmp_path: Path) -> None:
    llama = tensors(write_random_model(TINY, tmp_path / "llama.gguf"))
    qwen = tensors(write_random_model(QWEN, tmp_path / "qwen.gguf"))
    assert [name for name in llama if name.endswith(".bias")] == []
    assert [name for name in qwen if name.endswith(".bias")] == [
        f"blk.{layer}.attn_{part}.bias" for layer in (0, 1) for part in "qkv"
    ]
    sizes = {name: tuple(int(n) for n in tensor.shape) for name, tensor in qwen.items()}
    assert sizes["blk.1.attn_q.weight"] == (256, 256) and sizes["blk.1.attn_k.weight"] == (256, 64)
    assert sizes["blk.0.ffn_down.weight"] == (512, 256) and sizes["output.weight"] == (256, 300)


def test_offsets_are_in_eight_channels_of_every_kv_head_and_nowhere_else(tmp_path: Path) -> None:
    plain = replace(QWEN, head_dim=64)
    shape = OffsetShape(**{**vars(plain), "name": "offset"}, offset=90)
    without, found = (tensors(write_random_model(s, tmp_path / f"{s.name}.gguf")) for s in (plain, shape))
    assert list(found) == list(without)
    for name, tensor in found.items():
        if not name.endswith("attn_k.bias"):
            assert np.array_equal(tensor.data, without[name].data), name
            continue
        for head in np.reshape(tensor.data, (shape.n_head_kv, shape.head_dim)):
            large = np.flatnonzero(np.abs(head) > 5)
            slow = large % 32 >= 28
            assert slow.sum() == 6 and (~slow).sum() == 2
            assert (np.abs(head[large[slow]]) >= 30).all() and (np.abs(head[large]) <= 90).all()
            middle = large[~slow]
            assert (middle % 32 >= 14).all() and (middle % 32 < 18).all()
            assert (np.abs(head[middle]) >= 10).all() and (np.abs(head[middle]) <= 20).all()
    for wrong in ({"arch": "llama"}, {"head_dim": 32}):
        with pytest.raises(ValueError, match="offsets need arch qwen2"):
            OffsetShape(**{**vars(plain), **wrong})


def test_the_same_shape_gives_the_same_bytes_and_no_two_tensors_are_alike(tmp_path: Path) -> None:
    first, second = (write_random_model(TINY, tmp_path / name) for name in ("one.gguf", "two.gguf"))
    assert first.read_bytes() == second.read_bytes()
    same_size = [t.data for name, t in tensors(first).items() if "ffn_gate" in name or "ffn_up" in name]
    assert len(same_size) == 4
    assert all(not np.array_equal(a, b) for a, b in itertools.combinations(same_size, 2))


def test_tokens_are_unique_and_as_many_as_asked(tmp_path: Path) -> None:
    reader = GGUFReader(write_random_model(TINY, tmp_path / "m.gguf"))
    tokens = reader.fields["tokenizer.ggml.tokens"].contents()
    assert len(tokens) == len(set(tokens)) == len(reader.fields["tokenizer.ggml.scores"].contents()) == 300


def test_the_real_shapes_have_their_models_number_of_weights() -> None:
    def n_weights(shape: Shape) -> int:
        return sum(math.prod(tensor.shape) for tensor in random_model._tensors(shape))

    # Llama 3.2 1B has 1.24e9 parameters; the others their real embeddings and 2 of 32, 4 of 36 layers
    assert n_weights(SHAPES["llama-1b"]) == 1_235_814_400
    llama, qwen = (n_weights(replace(SHAPES[n], n_layer=k)) for n, k in (("llama-8b-2l", 32), ("qwen-3b-4l", 36)))
    assert llama == 8_030_261_248 and qwen == 3_085_938_688


def test_a_written_model_is_found_again_and_a_changed_shape_is_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVLOCAL_CACHE", str(tmp_path))
    monkeypatch.setattr(random_model, "SHAPES", {"tiny": TINY})
    path = random_model.random_model("tiny")
    assert path.parent == tmp_path / "models" and list(path.parent.iterdir()) == [path]
    path.write_bytes(b"kept")
    assert random_model.random_model("tiny") == path and path.read_bytes() == b"kept"
    monkeypatch.setattr(random_model, "SHAPES", {"tiny": replace(TINY, n_layer=3)})
    assert random_model.random_model("tiny") != path


def test_a_failure_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(random_model.GGUFWriter, "write_tensor_data", full)
    with pytest.raises(KVError, match=r"random model tiny cannot be written to .*: No space left on device; KVLOCAL_"):
        write_random_model(TINY, tmp_path / "m.gguf")
    assert list(tmp_path.iterdir()) == []


def test_unknown_names_and_impossible_shapes_are_refused() -> None:
    with pytest.raises(UsageError, match="no random model 'llama-2b'; there are llama-1b, llama-8b-2l, qwen-3b-4l"):
        random_model.random_model("llama-2b")
    for wrong in ({"arch": "gemma"}, {"n_embd": 100}, {"n_ff": 500}, {"n_vocab": 259}):
        with pytest.raises(ValueError):
            replace(TINY, **wrong)  # type: ignore[arg-type]
