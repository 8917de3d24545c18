"""What a model is called where people read it."""

from __future__ import annotations

import re
from pathlib import Path

MAX_NAME = 100
"""Characters of a name that are shown."""

_SEQUENCES = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b[\]PX^_].*?(?:\x07|\x1b\\|$)|\x9b[0-?]*[ -/]*[@-~]", re.DOTALL)
_HEX = re.compile(r"(?=.*\d)[0-9a-f]{7,64}|[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_NOTHING = re.compile(
    r"models?|snapshots?|checkpoints?|ckpt|weights|merged?|final|outputs?|out|results?|export(ed)?|converted|latest|best"
    r"|last|main|master|default|unknown|untitled|unnamed|none|null|nan|na|name|te?mp|data|dir|cache|downloads?|blobs?|hf"
    r"|hub|huggingface|local|repo|gguf|ggml|llm|lora|adapter|base|pretrained|finetuned?|safetensors|pytorch|bin|b?fp?16"
    r"|fp?32|the|my|new"
)
"""Words that by themselves name no model; numbers do not either."""
_RUN = re.compile(
    r"(?:ep|epoch|epochs|step|steps|iter|iters|mix|ckpt|checkpoint|seed|run|trial|lc|lr|bs|wd)\d[\dke.-]*"
)
"""Words of a training run's folder, which the converter makes a name of."""
_COPY = re.compile(r"-f32-[0-9a-f]{12}$")
_PART = re.compile(r"-\d{5}-of-\d{5}$")
_REPOSITORY = re.compile(r"models--(?P<user>.+?)--(?P<repo>.+)")


def display_name(path: Path, general_name: str | None) -> str:
    """``general.name`` of a model's file if that is a name, else the file's or the repository's, on one plain line.

    A name is not: nothing, a path, a hash, a number, words such as "Model" or "Snapshot", and the folder of a training
    run ("Smollm2 135M 8k Lc100K Mix1 Ep2") where the file is not called after it.
    """
    stem = plain_line(_PART.sub("", _COPY.sub("", path.stem)))
    name = plain_line(general_name or "")
    if _is_name(name) and not _is_run(name, stem):
        return name
    if _is_name(stem):
        return stem
    repository = next((match for part in path.parts[::-1] if (match := _REPOSITORY.fullmatch(part))), None)
    return plain_line(f"{repository['user']}/{repository['repo']}") if repository else stem or name or "model"


def plain_line(text: str) -> str:
    """One line without escape sequences, control characters and what cannot be written as UTF-8; long ones are cut."""
    text = _SEQUENCES.sub("", text)
    text = "".join(char if char.isprintable() else " " if char.isspace() else "" for char in text)
    text = " ".join(text.split())
    return text if len(text) <= MAX_NAME else f"{text[: MAX_NAME - 1]}…"


def _words(text: str) -> list[str]:
    return [word for word in re.split(r"[^0-9a-z]+", text.lower()) if word]


def _is_name(text: str) -> bool:
    lower = text.lower()
    if re.match(r"[./~\\]|[a-z]:[\\/]", lower) or _HEX.fullmatch(lower):
        return False
    # other alphabets have no such words
    if any(ord(char) > 127 and char.isalpha() for char in text):
        return True
    return not all(
        _NOTHING.fullmatch(word) or word.isdigit() or _HEX.fullmatch(word) or _quant(word) for word in _words(text)
    )


def _quant(word: str) -> bool:
    """Parts of a quantization's name, such as those of Q4_K_M and IQ2_XXS."""
    return re.fullmatch(r"i?q\d|tq\d|mxfp4|[ksml0-9]|x+s|nl", word) is not None


def _is_run(name: str, stem: str) -> bool:
    of_file = set(_words(stem))
    return any(_RUN.fullmatch(word) and word not in of_file for word in _words(name))
