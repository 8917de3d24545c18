"""What cannot work ends in one sentence that says why, an exit code, and nothing left behind."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import tinygguf
from processes import Result, call

USAGE, RUNTIME = 2, 1


def refused(code: int, *arguments: object, stdin: str = "hello", env: Mapping[str, str] | None = None) -> str:
    """Run a command that has to fail with this code; return its sentence."""
    return sentence(call(*arguments, stdin=stdin, env=env), code)


def sentence(result: Result, code: int) -> str:
    assert result.stdout == ""
    assert result.stderr.startswith("Error: ")
    assert result.stderr.endswith(".\n") and result.stderr.count("\n") == 1, "one line, one full stop at its end"
    assert "Traceback" not in result.stderr and ".." not in result.stderr
    assert result.code == code, result.stderr
    return result.stderr.removeprefix("Error: ").strip()


def files_below(directory: Path) -> list[Path]:
    return [path for path in directory.rglob("*") if path.is_file() or path.is_symlink()]


#
# model
#


def test_a_missing_file(tmp_path: Path) -> None:
    path = tmp_path / "none.gguf"
    assert str(path) in refused(USAGE, "run", path)
    assert not path.exists()


def test_a_directory(tmp_path: Path, tiny_path: Path) -> None:
    assert "is a directory" in refused(USAGE, "run", tmp_path)
    (tmp_path / "one.gguf").symlink_to(tiny_path)
    assert "one.gguf" in refused(USAGE, "run", tmp_path)


def test_a_file_of_another_kind(tmp_path: Path) -> None:
    path = tmp_path / "notes.gguf"
    path.write_text("These are notes and not a model, whatever the name says.")
    assert "not a GGUF file" in refused(USAGE, "run", path)


# half a header, all metadata but not all tensors, everything but the end
@pytest.mark.parametrize("n_bytes", [10, 100_000, -1000])
def test_a_truncated_file(n_bytes: int, tmp_path: Path, tiny_path: Path) -> None:
    path = tmp_path / "part.gguf"
    path.write_bytes(tiny_path.read_bytes()[:n_bytes])
    message = refused(RUNTIME, "run", path)
    assert str(path) in message and "again" in message


def test_an_architecture_that_cannot_be_paged(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    tinygguf.write_model(path, "mamba")
    message = refused(USAGE, "run", path)
    assert "'mamba'" in message and "--policy full" in message


#
# policy and budget
#


def test_an_unknown_policy(tiny_path: Path) -> None:
    message = refused(USAGE, "run", tiny_path, "--policy", "snapvk")
    assert "'snapvk'" in message and "did you mean 'snapkv'?" in message and "ada-pyramid" in message


@pytest.mark.parametrize(
    ("pair", "what"),
    [
        ("windo=16", "did you mean 'window'?"),
        ("window=many", "whole number"),
        ("alpha=1.5", "0 to 1"),
    ],
)
def test_an_unknown_parameter_or_value(pair: str, what: str, tiny_path: Path) -> None:
    assert what in refused(USAGE, "run", tiny_path, "--policy-arg", pair)


@pytest.mark.parametrize(
    ("budget", "what"),
    [
        ("0", "keeps nothing"),
        ("-5", "negative"),
        ("101%", "100%"),
        ("900TiB", "larger than the memory"),
        ("33parsecs", "'parsecs'"),
    ],
)
def test_an_impossible_budget(budget: str, what: str, tiny_path: Path) -> None:
    assert what in refused(USAGE, "run", tiny_path, "--budget", budget)


@pytest.mark.parametrize(
    ("options", "minimum"),
    [
        ("--budget 20", "at least 32"),
        ("--budget 40 --kv-window 40 --kv-sink 4", "at least 64"),
        ("--budget 4 --policy streaming", "at least 5"),
        # 32 tokens per head, 2 KiB each
        ("--budget 2KiB", "64 KiB"),
    ],
)
def test_a_budget_below_what_is_always_kept_names_the_minimum(options: str, minimum: str, tiny_path: Path) -> None:
    assert minimum in refused(USAGE, "run", tiny_path, *options.split())


#
# prompt
#


@pytest.mark.parametrize("policy", ["full", "ada-snapkv"])
def test_a_prompt_longer_than_the_context(policy: str, tiny_path: Path) -> None:
    options = f"-t 1 -c 1024 --no-chat-template --policy {policy} --budget 64"
    message = refused(USAGE, "run", tiny_path, *options.split(), stdin="a " * 1500)
    assert "1023" in message and "--prefill chunked" in message and "-c" in message
    n_tokens = int(message.split("has ")[1].split()[0])
    assert 1500 <= n_tokens <= 3001


def test_a_turn_longer_than_the_context(tiny_path: Path) -> None:
    options = "-t 1 -c 1024 --budget 64"
    message = refused(USAGE, "chat", tiny_path, *options.split(), stdin="a " * 1500 + "\n")
    assert "1023" in message and "--prefill chunked" in message


def test_what_is_advised_for_a_long_prompt_works(tiny_path: Path) -> None:
    # trained for 4,096: chunks would be refused as well
    options = ("-t", "1", "-c", "1024", "--budget", "64", "--no-chat-template")
    message = refused(USAGE, "run", tiny_path, *options, stdin="a " * 5000)
    assert "chunked" not in message and "trained for 4096" in message and "-c" in message
    # a budget and a chunk that do not fit into the context, likewise
    message = refused(USAGE, "run", tiny_path, "-c", "512", "--budget", "64", stdin="a " * 1000)
    assert "chunked" not in message and "-c" in message


def test_a_context_beyond_the_training_is_warned_of(tiny_path: Path) -> None:
    result = call("run", tiny_path, "-t", "1", "-c", "12000", "-p", "Hello", "-n", "1")
    assert result.code == 0 and "12,000 tokens is larger than the 4,096" in " ".join(result.stderr.split())
    result = call("run", tiny_path, "-t", "1", "-c", "1024", "--budget", "64", "-p", "Hello", "-n", "1")
    assert result.code == 0 and "larger" not in result.stderr


def test_an_empty_prompt(tiny_path: Path) -> None:
    assert "prompt is empty" in refused(USAGE, "run", tiny_path, stdin="")
    assert "prompt is empty" in refused(USAGE, "run", tiny_path, "-p", " ", stdin="\n\n")


def test_a_prompt_file_that_is_missing_or_no_text(tmp_path: Path, tiny_path: Path) -> None:
    assert "none.txt" in refused(USAGE, "run", tiny_path, "-f", tmp_path / "none.txt")
    path = tmp_path / "latin.txt"
    path.write_bytes("café".encode("latin-1"))
    message = refused(USAGE, "run", tiny_path, "-f", path)
    assert "not UTF-8" in message and "0xe9" in message and "offset 3" in message


def test_a_model_without_a_chat_template(tmp_path: Path) -> None:
    path = tmp_path / "plain.gguf"
    tinygguf.write_model(path, "llama")
    assert "--no-chat-template" in refused(USAGE, "run", path, "-t", "1")


#
# network
#

NOWHERE = "http://127.0.0.1:9"


def no_network(tmp_path: Path) -> dict[str, str]:
    """An environment whose caches are empty and whose servers refuse the connection."""
    proxies = dict.fromkeys(["HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"], "")
    return proxies | {
        "HF_HOME": str(tmp_path / "hf"),
        "HF_ENDPOINT": NOWHERE,
        "KVLOCAL_CACHE": str(tmp_path / "cache"),
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_INDEX_URL": f"{NOWHERE}/simple",
        "PIP_EXTRA_INDEX_URL": "",
        "PIP_FIND_LINKS": "",
        "PIP_CACHE_DIR": str(tmp_path / "pip"),
        "PIP_RETRIES": "0",
    }


def test_the_default_model_without_a_network(tmp_path: Path) -> None:
    message = refused(RUNTIME, "run", env=no_network(tmp_path))
    assert "default model" in message and "network" in message
    assert files_below(tmp_path / "cache") == []


@pytest.mark.parametrize("spec", ["hf:someone/something", "hf:someone/something:some.gguf"])
def test_a_repository_without_a_network(spec: str, tmp_path: Path) -> None:
    message = refused(RUNTIME, "run", spec, env=no_network(tmp_path) | {"HF_HUB_OFFLINE": "1"})
    assert "someone/something" in message and "network" in message
    assert files_below(tmp_path) == []


@pytest.mark.parametrize("spec", ["hf:someone/something", "hf:someone/something:some.gguf"])
def test_a_repository_whose_server_refuses(spec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attempts included: the hub waits between them, here it does not."""
    impatient = "import time; time.sleep = lambda s: None; from kvlocal_cli.main import main; main()"
    monkeypatch.setattr("processes.COMMAND", (sys.executable, "-c", impatient))
    message = refused(RUNTIME, "run", spec, env=no_network(tmp_path))
    assert "someone/something" in message and "network" in message
    assert files_below(tmp_path) == []


def test_a_repository_that_is_none(tmp_path: Path) -> None:
    assert "hf:USER/REPO" in refused(USAGE, "run", "hf:something", env=no_network(tmp_path))


#
# options
#


@pytest.mark.parametrize("options", ["--no-such-option", "--top-p 0", "--chunk 64", "-hf someone/something"])
def test_impossible_options(options: str, tiny_path: Path) -> None:
    refused(USAGE, "run", tiny_path, *options.split())
