"""Counts what is copied between main memory and an accelerator for a decoded token and for a batch of a prompt.

    python tools/count_transfers.py [--layers 32]

A context of a random model, all layers on Vulkan on the CPU as `make test-device` builds it, plans its graphs when it
is made; nothing is computed. What is counted are the inputs of the parts of a graph that run on another device than the
part before: each is a copy, with a synchronization of its own.
"""

from __future__ import annotations

import argparse
import os
import re
import tempfile
from pathlib import Path

from device_tests import environment

SPLIT = re.compile(r"## SPLIT #(\d+): (\S+) # (\d+) inputs(.*)")


Part = tuple[str, list[str]]
"""A part of a graph: its device, and the names of its inputs."""


def graphs(log: str) -> list[list[Part]]:
    """The parts of every graph in the log."""
    out: list[list[Part]] = []
    for number, device, n, names in SPLIT.findall(log):
        if number == "0":
            out.append([])
        inputs = re.findall(r"\[(.*?) \( *\S+\)\]", names)
        assert len(inputs) == int(n), f"{n} inputs, but {inputs}"
        out[-1].append((device, inputs))
    return out


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--layers", type=int, default=32)
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
        with Context(model, ContextConfig(1024, n_threads=1)):
            # the last two are those of a token and of the largest batch
            token, batch = graphs("".join(lines))[-2:]
        model.close()
    for what, parts in (("a token", token), ("a batch of 512 tokens", batch)):
        there = [name for device, names in parts if device != "CPU" for name in names]
        back = [name for device, names in parts if device == "CPU" for name in names]
        print(f"{args.layers} layers, {what}: {len(there)} copies to the accelerator, {len(back)} to main memory")
        print(f"    {', '.join(there + back)}")


if __name__ == "__main__":
    main()
