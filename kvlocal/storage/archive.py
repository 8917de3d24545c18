"""What memory may lose, kept on disk: where, how it is written, and what is brought back of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import platformdirs

from kvlocal.errors import KVError, UsageError
from kvlocal.native.retrieval import ARCHIVE_FORMATS, RECALLS, ArchiveFormat, Recall
from kvlocal.setting import MAX_INT, refusal
from kvlocal.settings import RECALL_BUDGET

ASKING = 32
"""Latest queries of a question whose attention says what is recalled."""


@dataclass(frozen=True)
class Archive:
    """The units of every sequence's text on disk, exact, in a file that is gone when the process ends.

    Attributes:
        folder: where; ``None``: in the user's cache folder.
        storage: how keys and values are written: ``f16`` as they are, or ``q8``, with which they take half of that.
        recall: what is brought back into memory, exact: at every ``turn`` the units that get most of the question's
            attention over all that is on disk, beside all that is held; at every ``step`` these first, and then, token
            by token, what of the units that a retriever reads is missing; ``off``: nothing.
        budget: with ``turn``, tokens per head that are brought back, beside the budget of the policy.
    """

    folder: Path | None = None
    storage: ArchiveFormat = "f16"
    recall: Recall = "turn"
    budget: int = RECALL_BUDGET.default

    def __post_init__(self) -> None:
        for name, allowed in (("storage", ARCHIVE_FORMATS), ("recall", RECALLS)):
            if getattr(self, name) not in allowed:
                raise refusal(f"{name} of an archive", getattr(self, name), ", ".join(allowed))
        if not isinstance(self.budget, int) or not 1 <= self.budget <= MAX_INT:
            raise refusal("budget of an archive", self.budget, "a whole number of at least 1")

    @classmethod
    def parse(
        cls,
        where: str,
        *,
        storage: ArchiveFormat = "f16",
        recall: Recall | None = None,
        budget: int = RECALL_BUDGET.default,
        by_step: bool = False,
    ) -> Archive | None:
        """An archive from how it is written: ``off`` (``None``), ``auto``, or a folder.

        ``by_step``: every token reads a part, so that by default every step recalls.

        Raises:
            UsageError: something is to be recalled from an archive that is off.
        """
        if where == "off":
            if recall not in (None, "off"):
                raise UsageError(f"There is nothing to recall by {recall} without an archive; give --archive auto.")
            return None
        folder = None if where == "auto" else Path(where).expanduser()
        return cls(folder, storage, recall or ("step" if by_step else "turn"), budget)

    def open_folder(self) -> Path:
        """Its folder, made if it is the user's cache folder.

        Raises:
            UsageError: it is no folder. KVError: it cannot be made.
        """
        if self.folder is not None:
            if not self.folder.is_dir():
                raise UsageError(f"There is no folder {self.folder} for an archive; make it, or name another.")
            return self.folder
        folder = platformdirs.user_cache_path("kvlocal") / "archive"
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise KVError(f"No archive can be written in {folder}: {error.strerror or error}.") from error
        return folder
