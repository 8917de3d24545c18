"""What a model is called: general.name where it is a name, else the file or the repository."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kvlocal.native.names import MAX_NAME, display_name, plain_line

HUB = "/h/models--bartowski--Qwen2.5-1.5B-Instruct-GGUF/snapshots/0123456789abcdef0123456789abcdef01234567"


NAMES = """
Llama 3.2 1B Instruct|kvlocal-tiny|Qwen2.5 7B Instruct|gemma-3-270m-it|Mixtral 8x7B v0.1|通义千问|Модель
meta-llama/Llama-3.2-1B|Phi 3 Mini 4k Instruct|TinyLlama 1.1B Chat v1.0|Codestral|random llama-1b|Falcon 7B
Base Model of Mine|DeepSeek R1 Distill Qwen 1.5B
"""
NO_NAMES = """
Model|model|Models|Snapshot|Snapshots|Checkpoint 1000|Hf Model|F16|checkpoint-2500|Final|Merged Model|Output|Tmp|42|1.0
./out|/workspace/out|..|~/x|C:\\models\\x|Ggml Model F16|Ggml Model Q4_0|9Fc3B2A41D7E|Unknown|None
Snapshot 7ae557604adf67be50417f59c2c2f167|7ae557604adf67be50417f59c2c2f167def9a775
550e8400-e29b-41d4-a716-446655440000|Smollm2 135M 8k Lc100K Mix1 Ep2|Llama Run3 Epoch2|My Model Step5000
"""


def split(text: str) -> list[str]:
    return [name for line in text.split("\n") if line for name in line.split("|")]


@pytest.mark.parametrize("name", split(NAMES))
def test_a_name_is_shown(name: str) -> None:
    assert display_name(Path("/m/some-file.Q4_K_M.gguf"), name) == name


@pytest.mark.parametrize("name", [None, "", "  ", "\x00", "\x1b[31m\x1b[0m", *split(NO_NAMES)])
def test_what_is_no_name_is_the_file_instead(name: str | None) -> None:
    assert display_name(Path("/m/SmolLM2-135M-Instruct.Q4_1.gguf"), name) == "SmolLM2-135M-Instruct.Q4_1"


def test_a_run_that_the_file_is_called_after_stays() -> None:
    assert display_name(Path("pythia-70m-step143000.gguf"), "Pythia 70m Step143000") == "Pythia 70m Step143000"


@pytest.mark.parametrize(
    ("path", "shown"),
    [
        (f"{HUB}/model.gguf", "bartowski/Qwen2.5-1.5B-Instruct-GGUF"),
        (f"{HUB}/ggml-model-Q4_K_M.gguf", "bartowski/Qwen2.5-1.5B-Instruct-GGUF"),
        (f"{HUB}/sub/0123456789abcdef0123.gguf", "bartowski/Qwen2.5-1.5B-Instruct-GGUF"),
        (f"{HUB}/qwen2.5-q8_0.gguf", "qwen2.5-q8_0"),
        ("/m/model.gguf", "model"),
        ("/m/big-Q8_0-00001-of-00003.gguf", "big-Q8_0"),
        ("/m/SmolLM2.Q4_1-f32-9cf645d1aca3.gguf", "SmolLM2.Q4_1"),
    ],
)
def test_the_file_or_the_repository(path: str, shown: str) -> None:
    assert display_name(Path(path), "Model") == shown


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("Nice\x1b]52;c;cm0gLXJm\x07 Model\x1b[2J", "Nice Model"),
        ("A\nB\tC\rD", "A B C D"),
        ("Nice\x9b31m One", "Nice One"),
        ("\x1bPq#0\x1b\\Nice", "Nice"),
        ("Nice\x1b]0;title", "Nice"),
        ("Ni\u202ece\u200b\x7f\x85 One", "Nice One"),
    ],
)
def test_control_characters_never_arrive(name: str, shown: str) -> None:
    assert display_name(Path("x.gguf"), name) == shown


def test_a_long_name_is_cut_and_odd_bytes_of_a_path_can_be_written() -> None:
    assert len(display_name(Path("x.gguf"), "Llama " * 1000)) == MAX_NAME
    name = display_name(Path(os.fsdecode(b"/m/bad\xff\x1b[31mname.gguf")), None)
    assert name == "badname" and name.encode()
    assert plain_line("a\ud800b") == "ab"
