"""Waiting threads: what the OpenMP library was told when it was loaded, and ggml's own threads where there is none."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
from contexts import OpenContext, OpenModel, random_tokens

from kvlocal.native import library
from kvlocal.native.context import Context, ContextConfig
from kvlocal.native.spinning import SPINS

LOAD = """
import os
from kvlocal.native.library import load
print(load().spinning.source, load().spinning.setting, os.environ.get("GOMP_SPINCOUNT"))
"""


def in_a_process(code: str, **variables: str) -> tuple[str, str]:
    """Standard output and standard error of a process that runs ``code``."""
    env = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")} | variables
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


@pytest.fixture(scope="module")
def gnu() -> str:
    runtime = library.load().spinning.runtime
    if "libgomp" not in runtime:
        pytest.skip("the library was not built with GNU's OpenMP")
    return runtime


def test_openmp_is_told_to_spin_a_little(gnu: str) -> None:
    said, shown = in_a_process(LOAD, OMP_DISPLAY_ENV="VERBOSE")
    assert said == f"kvlocal GOMP_SPINCOUNT={SPINS} None\n"
    assert f"GOMP_SPINCOUNT = '{SPINS}'" in shown


def test_a_value_of_the_users_own_stands(gnu: str) -> None:
    said, shown = in_a_process(LOAD, OMP_DISPLAY_ENV="VERBOSE", GOMP_SPINCOUNT="77")
    assert said == "environment GOMP_SPINCOUNT=77 77\n" and "GOMP_SPINCOUNT = '77'" in shown
    said, shown = in_a_process(LOAD, OMP_DISPLAY_ENV="VERBOSE", OMP_WAIT_POLICY="passive")
    assert said == "environment OMP_WAIT_POLICY=passive None\n" and "GOMP_SPINCOUNT = '0'" in shown


def test_a_library_that_was_there_before_is_noticed(gnu: str) -> None:
    said, _ = in_a_process(f"import ctypes; ctypes.CDLL({gnu!r}){LOAD}")
    assert said == "earlier  None\n"


def test_threads_of_ggmls_own_can_be_attached(open_model: OpenModel, open_context: OpenContext) -> None:
    model = open_model("llama")
    tokens = random_tokens(model, 30)
    plain, pooled = open_context(model, n_threads=2), Context(model, ContextConfig(1024, n_threads=2))
    pool = pooled._make_pool()
    pooled._pools.append(pool)
    for context in (plain, pooled):
        context.decode(tokens, 0)
    assert np.array_equal(plain.logits(), pooled.logits())
    pooled.close()
    assert pool.closed
