"""Shell completion: the scripts, what is completed, and what is not loaded for it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.shell_completion import ShellComplete
from fake_engine import call, sentence
from kvlocal_cli.main import main
from kvlocal_cli.options import completers

from kvlocal.policies import REGISTRY
from kvlocal.storage.storage import STORAGES


def complete(*words: str) -> list[str]:
    """What is offered for the last word."""
    found = ShellComplete(main, {}, "kvlocal", "_KVLOCAL_COMPLETE").get_completions(list(words[:-1]), words[-1])
    return [item.value if item.type == "plain" else f"<{item.type}>" for item in found]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_each_shell_has_a_script(shell: str) -> None:
    result = call("completion", shell)
    assert result.exit_code == 0
    assert f"_KVLOCAL_COMPLETE={shell}_complete" in result.stdout
    assert 'split ","' not in result.stdout


def test_other_shells_are_refused(tmp_path: Path) -> None:
    assert "is not one of 'bash', 'zsh', 'fish'" in sentence("completion", "cmd")


def test_a_broken_configuration_does_not_matter(tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text("[run")
    assert call("--config", str(file), "completion", "zsh").exit_code == 0


def test_names_are_those_there_are() -> None:
    assert set(completers.POLICIES) == set(REGISTRY)
    assert completers.STORAGES == STORAGES


def test_commands_options_and_values() -> None:
    assert "completion" in complete("c")
    assert complete("run", "--kv-w") == ["--kv-window"]
    assert complete("run", "--policy", "ada") == ["ada-snapkv", "ada-pyramid"]
    assert complete("chat", "--kv", "kv") == ["kv3", "kv2"]
    assert complete("run", "--budget", "2") == ["25%", "2048", "256MiB"]
    assert complete("run", "--prefill", "") == ["exact", "chunked"]
    assert complete("run", "-f", "x") == ["<file>"]


def test_the_last_item_of_a_list() -> None:
    assert complete("bench", "--policy", "full,la") == ["full,ladder"]
    assert complete("bench", "--policy", "pa") == ["paged"]
    assert complete("bench", "--prefill", "exact,") == ["exact,chunked"]
    assert complete("eval", "kld", "--budget", "50%,25") == ["50%,25%", "50%,256MiB"]
    assert complete("eval", "needle", "--kv", "q8,q") == ["q8,q4"]


def test_model_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a.gguf", "A.GGUF", "b.txt", ".hidden.gguf", "deep/c.gguf", "deep/d.txt", "empty/x.txt"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("")
    monkeypatch.chdir(tmp_path)
    assert complete("run", "") == ["A.GGUF", "a.gguf", f"deep{os.sep}", f"empty{os.sep}"]
    # a folder alone would end the word: what is in it comes with it
    assert complete("run", "d") == [f"deep{os.sep}", f"deep{os.sep}c.gguf"]
    assert complete("bench", f"{tmp_path}{os.sep}a") == [f"{tmp_path}{os.sep}a.gguf"]
    assert complete("run", ".h") == [".hidden.gguf"]
    assert complete("run", "nowhere/") == []
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert complete("run", "~/a") == ["~/a.gguf"]


def test_completing_loads_nothing_heavy() -> None:
    code = (
        "import atexit, sys\n"
        "heavy = ('numpy', 'rich', 'prompt_toolkit', 'llama_cpp', 'kvlocal.native.library', 'kvlocal.policies')\n"
        "atexit.register(lambda: print([name for name in heavy if name in sys.modules]))\n"
        "from kvlocal_cli.main import main\n"
        "main(prog_name='kvlocal')\n"
    )
    words = {"_KVLOCAL_COMPLETE": "bash_complete", "COMP_WORDS": "kvlocal run --policy lad", "COMP_CWORD": "3"}
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **words}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["plain,ladder", "[]"]
