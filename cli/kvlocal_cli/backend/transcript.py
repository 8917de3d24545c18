"""The file of `chat --transcript`."""

from __future__ import annotations

from kvlocal.errors import KVError
from kvlocal_cli.terminal.prompt import file_path


class Transcript:
    """A Markdown file that what is said is appended to, turn by turn; nothing without a name."""

    def __init__(self, name: str | None) -> None:
        self._path = None if name is None else file_path(name)
        self._append("")  # says at once if it cannot be written

    def turn(self, question: str | None, answer: str) -> None:
        """``question``: ``None`` if it is the last one, answered again."""
        asked = "(again)" if question is None else question
        self._append(f"**You:** {asked}\n\n{answer.strip()}\n\n")

    def note(self, text: str) -> None:
        """What happened between two turns."""
        self._append(f"*{text}*\n\n")

    def _append(self, text: str) -> None:
        if self._path is None:
            return
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(text)
        except OSError as error:
            raise KVError(f"The transcript cannot be written to {self._path}: {error.strerror or error}.") from error
