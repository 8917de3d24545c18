"""Two hundred damaged model files: an error each, or a model that can be used; never the end of the process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

TINY = Path(__file__).resolve().parents[2] / "fixtures" / "kvlocal-tiny-q8_0.gguf"

CODE = """
import sys
from pathlib import Path

import gguf
import numpy as np

from kvlocal.native.context import Context, ContextConfig
from kvlocal.errors import KVError
from kvlocal.native.model import Model

source, path = Path(sys.argv[1]), Path(sys.argv[2])
whole, n_header = source.read_bytes(), gguf.GGUFReader(source).data_offset
for i in range(200):
    rng = np.random.default_rng(i)
    data = bytearray(whole)
    if i % 4 == 0:
        del data[rng.integers(24, n_header) :]
    elif i % 4 == 1:
        for at in rng.integers(0, n_header, 1 + i % 5):
            data[at] ^= 1 << int(rng.integers(8))
    elif i % 4 == 2:
        at = int(rng.integers(8, 2000)) // 4 * 4
        data[at : at + 4] = int(rng.choice([0, 1, 255, 65536, 2**31 - 1, 2**32 - 1])).to_bytes(4, "little")
    else:
        at = int(rng.integers(n_header - 3000, n_header)) // 4 * 4
        data[at : at + 8] = rng.bytes(8)
    path.write_bytes(data)
    print(i, end=" ", flush=True)
    try:
        model = Model(path)
    except KVError as error:
        assert "\\n" not in str(error) and path.name in str(error), str(error)
        print("refused", flush=True)
        continue
    try:
        config = ContextConfig(256, n_threads=1, n_window=8, mass="sum", formats=("q8", "kv2"), rotate=True)
        with Context(model, config) as context:
            cache = context.cache
            context.decode([1, 2, 3] * 30, 0)
            for layer in range(len(cache.layers)):
                cache.window_scores(0, layer, 8)
                assert cache.mass(0, layer).shape[1] == 90
                cache.keep(0, layer, [np.arange(0, n, 2) for n in cache.lengths(0, layer)])
                cache.demote(0, layer, [np.arange(20)] * cache.layers[layer].n_head_kv, "kv2")
            context.decode([1, 2, 3], 90)
            context.restore(0, context.save(0))
            assert {int(n) for held in cache.held(0) for n in held} == {48}
            context.decode([4], 93)
        print("works", flush=True)
    except KVError as error:
        print("refused", flush=True)
    finally:
        model.close()
"""


def test_no_damaged_header_ends_the_process(tmp_path: Path) -> None:
    arguments = [sys.executable, "-c", CODE, str(TINY), str(tmp_path / "damaged.gguf")]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=300, check=False)
    last = done.stdout.split("\n")[-1] or done.stdout.split("\n")[-2]
    assert done.returncode == 0, f"after {last!r}: {done.stderr[-2000:]}"
    outcomes = [line.split()[1] for line in done.stdout.splitlines()]
    assert len(outcomes) == 200 and outcomes.count("refused") >= 140
    assert outcomes.count("works") >= 20, "few went on to score, evict, demote, save and restore"
