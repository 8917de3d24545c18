"""Counts what the scheduler copies between main memory and an accelerator for one decoded token.

    python tools/count_transfers.py [--layers 32] [--tokens 1]

A random model with all layers on Vulkan on the CPU, as `make test-device` builds it, reads 200 tokens, evicts raggedly,
and decodes. What is counted are the inputs of every part of the graph that runs on another device than the part before:
each is a copy, with a synchronization of its own.
"""

from __future__ import annotations

import argparse
import os
import re
import tempfile
from pathlib import Path

import numpy as np
from device_tests import environment

SPLIT = re.compile(r"## SPLIT #(\d+): (\S+) # (\d+) inputs(.*)")


def splits(log: str) -> list[tuple[str, list[str]]]:
    """Device and names of inputs of every part of the last graph in the log."""
    out: list[tuple[str, list[str]]] = []
    for number, device, n, names in SPLIT.findall(log):
        if number == "0":
            out = []
        inputs = re.findall(r"\[(.*?) \( *\S+\)\]", names)
        assert len(inputs) == int(n), f"{n} inputs, but {inputs}"
        out.append((device, inputs))
    return out


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--layers", type=int, default=32)
    p.add_argument("--tokens", type=int, default=1, help="decoded in one batch, of one sequence")
    args = p.parse_args()
    os.environ.update(environment(), GGML_SCHED_DEBUG="1")
    # the environment decides which library these find
    from kvlocal.models.random import Shape, write_random_model
    from kvlocal.native import library
    from kvlocal.native.context import Context, ContextConfig
    from kvlocal.native.model import Model

    native = library.load()
    lines: list[str] = []
    # the log of ggml is llama.cpp's; the object must outlive its use
    callback = native.llama.llama_log_callback(
        lambda _level, text, _data: lines.append(text.decode("utf-8", "replace"))
    )
    native.llama.llama_log_set(callback, None)
    shape = Shape("transfers", "llama", args.layers, 256, 4, 2, 64, 256, 300, 10000.0, 4096, tied=True)
    with tempfile.TemporaryDirectory() as folder:
        model = Model(write_random_model(shape, Path(folder) / "model.gguf"), n_gpu_layers=99)
        with Context(model, ContextConfig(1024, n_threads=1)) as context:
            tokens = np.random.default_rng(0).integers(3, 300, 200 + args.tokens)
            context.decode(tokens[:200], 0, 0)
            assert context.cache is not None
            for layer in range(args.layers):
                context.cache.keep(0, layer, [np.arange(100), np.arange(20, 150)])
            del lines[:]
            context.decode(tokens[200:], 200, 0)
            parts = splits("".join(lines))
        model.close()
    there = [name for device, names in parts if device != "CPU" for name in names]
    back = [name for device, names in parts if device == "CPU" for name in names]
    print(f"{args.layers} layers, {args.tokens} tokens: {len(there)} copies to the accelerator, {len(back)} back")
    print(f"to the accelerator: {', '.join(there)}")
    print(f"to main memory: {', '.join(back) or 'none'}")


if __name__ == "__main__":
    main()
