"""The file of `chat --session`: read at the start, written after every turn."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from kvlocal.errors import KVError, UsageError
from kvlocal_cli.terminal.interrupt import Interrupt
from kvlocal_cli.terminal.prompt import file_path

if TYPE_CHECKING:
    from kvlocal.engine.chat import Chat


class SessionFile:
    """A saved conversation that goes on. Without a name there is none."""

    def __init__(self, name: str | None, chat: Chat, interrupt: Interrupt) -> None:
        """Load the file if it is there; a system prompt that `chat` has already holds from now on.

        Raises:
            UsageError: its folder is missing, or it is the file of something else.
        """
        self._chat = chat
        self._interrupt = interrupt
        self._path = self._find(name)
        self.loaded = False
        system = chat.system
        if self._path is not None and self._path.exists():
            chat.load(self._path)
            self.loaded = True
            if system is not None and chat.system != system:
                chat.set_system(system)
        self._saved = self._messages()

    def save(self) -> None:
        """Write what was said since the last time; no signal interrupts it.

        Raises:
            KVError: it cannot be written; what was there is as before.
        """
        messages = self._messages()
        if self._path is None or not messages or messages == self._saved:
            return
        with self._interrupt.raising_from(0):
            try:
                self._chat.save(self._path)
            except OSError as error:
                raise KVError(f"The session cannot be written to {self._path}: {error.strerror or error}.") from error
            self._saved = messages

    def _messages(self) -> list[dict[str, str]]:
        return [dict(message) for message in self._chat.messages]

    @staticmethod
    def _find(name: str | None) -> Path | None:
        if name is None:
            return None
        path = file_path(name)
        if not path.parent.is_dir():
            raise UsageError(f"There is no folder '{path.parent}' for the session {name}.")
        return path
