"""How a device's backend knows its operators (kvl-tags.h), compiled for the host with the tables of CUDA and Metal."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from kvlocal.native.library import installed

REPO = Path(__file__).resolve().parents[3]
OVERLAY = REPO / "patches" / "overlay"
GGML = REPO / "vendor" / "llama.cpp" / "ggml"


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("tags") / "tags"
    sources = [Path(__file__).with_name("tags.cpp"), OVERLAY / "ggml-metal/kvl-metal.cpp"]
    # without kernels this file is plain C++
    sources.append(OVERLAY / "ggml-cuda/kvl-cuda.cu")
    folders = [OVERLAY / name for name in ("include", "ggml-cuda", "ggml-metal")]
    folders += [GGML / "include", GGML / "src", GGML / "src/ggml-metal"]
    lib = installed("lib")
    command = [os.environ.get("CXX", "c++"), "-std=c++17", "-O2", "-o", target, *(f"-I{path}" for path in folders)]
    if shutil.which("ld.gold"):
        # a linker that gives equal functions one address, as MSVC's does: tags must differ
        command += ["-ffunction-sections", "-fuse-ld=gold", "-Wl,--icf=all"]
    command += ["-x", "c++", *sources, "-x", "none", f"-L{lib}", "-lggml-base", f"-Wl,-rpath,{lib}"]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return target


@pytest.fixture(scope="module")
def said(program: Path) -> dict[str, str]:
    done = subprocess.run([program], capture_output=True, text=True, check=True)
    return dict(line.split(": ", 1) for line in done.stdout.splitlines())


def test_a_node_is_the_operator_of_its_tag(said: dict[str, str]) -> None:
    assert said["first"] == "first there"
    assert said["second"] == "second there"
    assert said["in place, with parameters"] == "second there"


def test_nodes_of_others_are_none(said: dict[str, str]) -> None:
    """Another backend's tag of the same name, a function of the CPU's, a node that only looks like one."""
    assert said["another backend's"] == "none"
    assert said["the host's"] == "none"
    assert said["no custom node"] == "none"


def test_tags_go_by_names(said: dict[str, str]) -> None:
    tags = {name: said[f'tag of "{name}"'] for name in ("kvl_attn_compute", "kvl_pages_move", "kvl_attn_mass", "")}
    assert list(tags.values()) == ["first", "second", "none", "none"]


@pytest.mark.parametrize("backend", ["CUDA", "Metal"])
def test_a_backend_supports_what_it_names_and_nothing_else(said: dict[str, str], backend: str) -> None:
    """A table without tags supports nothing, and pages on its devices take the portable path."""
    assert said[backend] == "0 tags, 0 supported, others: 0, unknown name: 0"


def test_a_tag_that_is_called_says_whose_it_is(program: Path) -> None:
    environment = dict(os.environ, GGML_NO_BACKTRACE="1")
    done = subprocess.run([program, "call"], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "a node: kvl_attn_compute of Here cannot run on the CPU" in done.stderr
