"""Writes ``licenses/``: the licences of all that is compiled into or installed with the package, from its source.

Run by fetch.py whenever it has fetched; what changes then is to be committed, since a source distribution has these
files without the source they come from.
"""

from __future__ import annotations

import re
from pathlib import Path

FOLDER = Path(__file__).resolve().parent.parent / "licenses"

SGEMM = "ggml/src/ggml-cpu/llamafile/sgemm.cpp"
ROPE = "ggml/src/ggml-cpu/ops.cpp"
VECTORS = "ggml/src/ggml-cpu/vec.h"
TOKENIZER = "src/llama-vocab.cpp"


def texts(tree: Path, binding: Path) -> dict[str, str]:
    """File name to text, from the fetched llama.cpp and its Python binding.

    Raises:
        LookupError: a notice is not where it was in the source; see what became of that code.
    """
    license = (tree / "LICENSE").read_text("utf-8")
    start = license.find("Permission is hereby granted")
    if start < 0:
        raise LookupError("LICENSE of llama.cpp is not the MIT license.")
    permission = license[start:]

    def mit(file: str, pattern: str) -> str:
        """A notice in the source that only names the MIT license, with its text."""
        return f"Notice in {file}:\n\n{_comment(tree / file, pattern)}\n\n{permission}"

    return {
        "llama.cpp.txt": license,
        "llama-cpp-python.txt": (binding / "LICENSE.md").read_text("utf-8"),
        "llamafile-sgemm.txt": f"Notice in {SGEMM}:\n\n{_comment(tree / SGEMM, 'Copyright .* Mozilla')}\n",
        "yarn.txt": mit(ROPE, "YaRN algorithm based on"),
        "ggllm-bpe.txt": mit(TOKENIZER, r"ggllm\.cpp"),
        # llama.cpp's source names no license here beyond its own
        "arm-optimized-routines.txt": (
            f"Notice in {VECTORS}:\n\n{_comment(tree / VECTORS, 'arm limited optimized routine')}\n"
        ),
    }


def _comment(path: Path, pattern: str) -> str:
    """The block of ``//`` lines of a file that holds a line with ``pattern``."""
    lines = path.read_text("utf-8").splitlines()
    found = next((i for i, line in enumerate(lines) if line.startswith("//") and re.search(pattern, line)), None)
    if found is None:
        raise LookupError(f"{path} has no comment with {pattern!r}.")
    first, last = found, found
    while first > 0 and lines[first - 1].startswith("//"):
        first -= 1
    while last + 1 < len(lines) and lines[last + 1].startswith("//"):
        last += 1
    return "\n".join(line.removeprefix("//").strip() for line in lines[first : last + 1]).strip()


def write(tree: Path, binding: Path, folder: Path = FOLDER) -> None:
    """Write all of them; a file that is as it should be is left alone."""
    folder.mkdir(exist_ok=True)
    for name, text in texts(tree, binding).items():
        text = text.rstrip() + "\n"
        path = folder / name
        if not path.exists() or path.read_text("utf-8") != text:
            path.write_text(text, "utf-8")
