"""Files that are called or made oddly: names that are not UTF-8, names inside that are none, pipes for models."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
from gguf import GGUFReader, GGUFWriter
from processes import COMMAND, TIMEOUT_S, environment
from tinygguf import write_model

TEXT = "The code of the lantern is 48213."


def run(*args: str | bytes) -> tuple[int, bytes, bytes]:
    done = subprocess.run([*COMMAND, *args], env=environment(), capture_output=True, timeout=TIMEOUT_S, check=False)
    assert b"Traceback" not in done.stderr, done.stderr.decode(errors="replace")
    return done.returncode, done.stdout, done.stderr


@pytest.fixture
def odd(tiny_path: Path, tmp_path: Path) -> bytes:
    """The tiny model under a name that is not UTF-8."""
    path = os.fsencode(tmp_path) + b"/bad\xff\x1b[31mname.gguf"
    os.link(tiny_path, path) if os.stat(tiny_path).st_dev == os.stat(tmp_path).st_dev else os.symlink(tiny_path, path)
    return path


def test_a_model_whose_path_is_not_utf8(odd: bytes, tmp_path: Path) -> None:
    session = os.fsencode(tmp_path) + b"/s\xfe.kvl"
    code, out, err = run("run", odd, "-p", TEXT, "-n", "4", "-t", "1", "--prompt-cache", session, "--json")
    assert code == 0, err
    assert json.loads(out)["model"] == "kvlocal-tiny" and os.path.exists(session)
    assert run("run", odd, "-p", TEXT, "-n", "4", "-t", "1", "--prompt-cache", session)[0] == 0
    assert json.loads(run("plan", odd, "-c", "512", "--json")[1])["model"] == "kvlocal-tiny"
    document, results = os.fsencode(tmp_path) + b"/d\xfd.txt", os.fsencode(tmp_path) + b"/r\xfc.jsonl"
    Path(os.fsdecode(document)).write_text(TEXT)
    assert run("batch", odd, document, "-o", results, "--task", "summarize", "-n", "4", "-t", "1")[0] == 0
    assert json.loads(Path(os.fsdecode(results)).read_text("utf-8"))["error"] is None
    code, out, err = run("run", odd + b"x", "-p", TEXT)
    assert code == 2 and b"there is no model file" in err


def test_a_name_inside_that_is_none_or_holds_escape_codes(tmp_path: Path) -> None:
    plain = write_model(tmp_path / "plain.gguf", "llama", n_head=2, n_head_kv=1, head_dim=32).path
    for inside, shown in (("Model", "my-file"), ("Nice\x1b]52;c;cm0gLXJm\x07 One", "Nice One")):
        path = renamed(plain, tmp_path / "my-file.gguf", inside)
        code, out, err = run("plan", str(path), "-c", "256", "--json")
        assert code == 0, err
        assert json.loads(out)["model"] == shown
        code, out, err = run("bench", str(path), "-d", "0", "-p", "0", "-n", "1", "-r", "1", "-t", "1")
        assert code == 0 and shown.encode() in out and b"\x1b]" not in out + err


def test_a_pipe_is_no_model(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "m.gguf")
    code, _, err = run("run", str(tmp_path / "m.gguf"), "-p", "hi")
    assert code == 2 and b"is not a regular file" in err


def renamed(source: Path, target: Path, name: str) -> Path:
    """A copy with another general.name."""
    reader = GGUFReader(source)
    writer = GGUFWriter(target, reader.fields["general.architecture"].contents())
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key not in ("general.architecture", "general.name"):
            value = field.contents()
            if value != []:
                writer.add_key_value(key, value, field.types[0], field.types[1] if len(field.types) > 1 else None)
    writer.add_name(name)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target
