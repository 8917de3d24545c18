"""A forked child has none of its parent's threads; whatever would wait for them refuses."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from contexts import OpenContext, OpenModel, random_tokens
from forks import forked

from kvlocal.doctor.selftest import self_test
from kvlocal.engine.engine import Engine, EngineConfig
from kvlocal.native import library
from kvlocal.native.context import Context, ContextConfig
from kvlocal.native.model import Model
from kvlocal.policies import make_policy
from kvlocal.storage.budget import Budget

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")

REFUSED = f"KVError: The native library was loaded in another process ({os.getpid()})"


@pytest.mark.parametrize("paged", [True, False])
def test_what_computes_refuses_after_a_fork(open_model: OpenModel, open_context: OpenContext, paged: bool) -> None:
    model = open_model("llama")
    context = open_context(model, n_threads=2, paged=paged)
    tokens = random_tokens(model, 40)
    context.decode(tokens, 0)  # its threads are there now
    actions: list[Callable[[], Any]] = [
        lambda: context.decode(tokens, 40),
        lambda: Context(model, ContextConfig(64, n_threads=2)),
        lambda: Model(model.path),
        library.load,
        lambda: library.open_library("ggml-cpu"),
        lambda: Engine(EngineConfig(model.path, make_policy("full"), Budget.parse("64"), n_ctx=64)),
    ]
    if context.cache is not None:
        cache = context.cache
        actions += [
            lambda: cache.window_scores(0, 0),
            lambda: cache.keep(0, 0, [np.arange(4, dtype=np.int32)] * cache.layers[0].n_head_kv),
            lambda: cache.value_norms(0, 0),
        ]
    for action in actions:
        said = forked(action)
        assert said.startswith(REFUSED) and "spawn" in said
    # the parent goes on
    context.decode(tokens, 40)


def test_a_started_generation_and_the_self_test_refuse_too(open_model: OpenModel) -> None:
    model = open_model("llama")
    config = EngineConfig(model.path, make_policy("snapkv"), Budget.parse("64"), n_ctx=512, n_threads=2)
    with Engine(config) as engine:
        engine.prefill(random_tokens(model, 100).tolist())
        assert forked(lambda: engine.prefill([5] * 100)).startswith(REFUSED)
        assert forked(lambda: engine.evict()).startswith(REFUSED)
        assert forked(engine.reset).startswith(REFUSED)
        # what belongs to the parent can be let go
        assert forked(engine.close) == "done"

        def tests() -> None:
            assert all("loaded in another process" in test.detail for test in self_test(2))

        assert forked(tests) == "done"
        assert engine.held()[0].max() <= 100


def test_a_worker_that_loads_the_library_itself_may_compute(open_model: OpenModel) -> None:
    code = """
import os, sys
from pathlib import Path
import kvlocal
from kvlocal.native.context import Context, ContextConfig
from kvlocal.native.model import Model
if os.fork() == 0:
    with Context(Model(Path(sys.argv[1])), ContextConfig(64, n_threads=2)) as context:
        context.decode([5] * 8, 0)
    print("computed", flush=True)
    os._exit(0)
os.wait()
"""
    path = open_model("llama").path
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, timeout=60)
    assert done.stdout == "computed\n"
