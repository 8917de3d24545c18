"""No memory or no room: an error, with the cache as it was, and never the end of the process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tinygguf
from contexts import OpenContext, OpenModel, random_tokens

from kvlocal.errors import KVError


@pytest.mark.parametrize("storage", ["q8", "kv2"])
def test_cutting_a_branch_of_several_formats_needs_pages_of_its_own(
    storage: str, open_model: OpenModel, open_context: OpenContext
) -> None:
    model = open_model("llama")
    context = open_context(model, n_ctx=256, n_pool_ctx=64, n_seq_max=3, formats=(storage,), rotate=True)
    cache = context.cache
    assert cache is not None
    tokens = random_tokens(model, 64)
    context.decode(tokens, 0, 0)
    for layer in range(2):
        # later positions first, so that a cut has to move the others
        cache.demote(0, layer, [np.arange(20, 40)] * 2, storage)
        cache.demote(0, layer, [np.arange(10)] * 2, storage)
    context.branch(0, 1)
    n = 0
    with pytest.raises(KVError, match="full"):
        while True:
            context.decode(tokens[:32], n, 2)
            for layer in range(2):
                cache.demote(2, layer, [np.arange(n, n + 32)] * 2, storage)
            n += 32
    # the pool of the format may have pages left for fewer heads than a layer has
    before = context.save(1)
    with pytest.raises(KVError, match="No room to separate a shared branch before cutting"):
        context.truncate(1, 30)
    assert context.save(1) == before
    context.truncate(2, 0)
    context.truncate(1, 30)
    for layer in range(2):
        assert all(at.tolist() == list(range(30)) for at in cache.positions(1, layer))
        assert all(at.tolist() == list(range(64)) for at in cache.positions(0, layer))
    for seq in range(3):
        context.truncate(seq, 0)
    assert context.stats().used_bytes == context.stats().allocated_bytes == 0


CODE = """
import ctypes
import resource
import sys
from pathlib import Path

import numpy as np

from kvlocal.errors import KVError
from kvlocal.native.context import Context, ContextConfig
from kvlocal.native.model import Model

N = 800_000
model = Model(Path(sys.argv[1]), no_alloc=True)
context = Context(model, ContextConfig(N, n_batch=50_000, n_threads=1, formats=("q8",)))
cache = context.cache
for at in range(0, N, 50_000):
    context.decode(np.full(50_000, 5), at)
cache.demote(0, 0, [np.arange(1000)], "q8")
ctx, lib = context.handle, context._native.lib
slots, counts, out = np.arange(1, N, dtype=np.int32), np.array([N - 1], np.int32), np.zeros(N, np.int32)
pointer = ctypes.POINTER(ctypes.c_int32)
n = np.zeros(1, np.int32)
slots_at, counts_at, out_at, n_at = (array.ctypes.data_as(pointer) for array in (slots, counts, out, n))
calls = {
    "kvl_slots": (n_at, N, out_at, None, None),
    "kvl_keep": (counts_at, slots_at),
    "kvl_demote": (1, counts_at, slots_at, 0, 0),
    "kvl_select": (counts_at, slots_at),
}
size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
soft, hard = resource.getrlimit(resource.RLIMIT_AS)
resource.setrlimit(resource.RLIMIT_AS, (size, hard))
for name, arguments in calls.items():
    status = getattr(lib, name)(ctx, 0, 0, *arguments)
    print(name, status, context._native.last_error(), flush=True)
resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
assert (cache.positions(0, 0)[0] == np.arange(N)).all()
assert (cache.slot_formats(0, 0)[0][1000:] == 0).all()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits memory as Linux does")
def test_no_memory_is_an_error_everywhere(tmp_path: Path) -> None:
    tinygguf.write_model(tmp_path / "m.gguf", "llama", n_layer=1, n_head=1, n_head_kv=1, head_dim=32)
    done = subprocess.run(
        [sys.executable, "-c", CODE, str(tmp_path / "m.gguf")],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        # every array a mapping of its own, so that the limit holds
        env={"MALLOC_MMAP_THRESHOLD_": "65536", "PATH": ""},
    )
    assert done.returncode == 0, f"{done.returncode} after {done.stdout}: {done.stderr[-1500:]}"
    lines = done.stdout.splitlines()
    assert len(lines) == 4
    assert all("-3 out of memory" in line for line in lines), lines


def test_pages_beyond_64_gib_of_address_space(open_model: OpenModel, open_context: OpenContext) -> None:
    """A large context names pools that begin far behind the first one; only what is used is committed."""
    model = open_model("llama", n_layer=2, n_head=8, n_head_kv=8, head_dim=256, n_ff=32)
    logits = []
    for n_ctx in (256, 1 << 20):
        context = open_context(model, n_ctx=n_ctx, n_seq_max=5, n_batch=64, formats=("q8", "q4"))
        cache = context.cache
        assert cache is not None
        assert n_ctx == 256 or context.stats().reserved_bytes > 64 << 30
        context.decode(np.arange(3, 63), 0, 4)
        cache.demote(4, 0, [np.arange(30)] * 8, "q8")
        cache.demote(4, 1, [np.arange(30)] * 8, "q4")
        context.decode([7], 60, 4)
        logits.append(context.logits()[0])
    np.testing.assert_array_equal(*logits)


MASS = """
import resource
import sys
from pathlib import Path

import numpy as np

from kvlocal.errors import KVError
from kvlocal.native.context import Context, ContextConfig
from kvlocal.native.model import Model

# 16 heads x 4 sequences x 3 pages: room for 192 pages of mass at first, which the branches fill
context = Context(Model(Path(sys.argv[1])), ContextConfig(8192, n_pool_ctx=64, n_seq_max=4, n_threads=1, mass="sum"))
cache, tokens = context.cache, np.arange(3, 131)
context.decode(tokens[:64], 0, 0)
for seq in (1, 2, 3):
    context.branch(0, seq)
context.decode(tokens[:64], 64, 0)
context.decode(tokens[:32], 64, 1)
context.decode(tokens[:32], 64, 2)
saved = bytes(context.save(0))
action = sys.argv[2]
if action != "decode":
    context.truncate(3, 0)
    context.decode(tokens[:64], 96, 1)
seqs = range(4)
before = [[bytes(context.save(seq)), context.n_seen(seq)] for seq in seqs]
size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
hard = resource.getrlimit(resource.RLIMIT_AS)[1]
resource.setrlimit(resource.RLIMIT_AS, (size, hard))
try:
    {
        "decode": lambda: context.decode(tokens[:32], 64, 3),
        "branch": lambda: context.branch(0, 3),
        "restore": lambda: context.restore(3, saved),
    }[action]()
    print("done")
except KVError as error:
    print("refused:", error)
resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
for seq in seqs:
    assert [bytes(context.save(seq)), context.n_seen(seq)] == before[seq], seq
context.decode(tokens[:1], context.n_seen(3), 3)
assert np.isfinite(context.logits()).all() and np.isfinite(cache.mass(3, 0)).all()
for seq in seqs:
    context.truncate(seq, 0)
assert context.stats().used_bytes == context.stats().allocated_bytes == context.stats().table_bytes == 0
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits memory as Linux does")
@pytest.mark.parametrize("action", ["decode", "branch", "restore"])
def test_no_memory_for_attention_mass_changes_nothing(action: str, tmp_path: Path) -> None:
    """Branches share pages but not what their slots receive, so that there can be more of that than pages."""
    tinygguf.write_model(tmp_path / "m.gguf", "llama", n_layer=2, n_head=8, n_head_kv=8, head_dim=32)
    done = subprocess.run(
        [sys.executable, "-c", MASS, str(tmp_path / "m.gguf"), action],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "refused:" in done.stdout and "address space" in done.stdout
