"""What every document of a batch is asked, as tokens before and after it."""

from __future__ import annotations

from dataclasses import dataclass

from kvlocal.batch.documents import Document
from kvlocal.errors import UsageError
from kvlocal.models.messages import Message
from kvlocal.models.template import chat_pieces, chat_template, piece_tokens, split_pieces
from kvlocal.native.model import Model

_DOCUMENT = "kvlocaldocument"  # stands for a document while the template is rendered


@dataclass(frozen=True)
class Frame:
    """What stands around every document.

    Attributes:
        before: tokens before it, the same for all documents.
        after: the template's text after it.
        trims: the template takes white space around a text away; ``starts``: a document begins its message.
        note: what the user should know of how the chat template takes the messages.
    """

    before: list[int]
    after: list[tuple[str, bool]]
    trims: bool = False
    starts: bool = False
    note: str | None = None


@dataclass(frozen=True)
class Prompt:
    """Where a document stands in a conversation; no text of people becomes a control token.

    Attributes:
        raw: the text is continued as it is, without a chat template.
    """

    system: str | None = None
    instruction: str = ""
    raw: bool = False

    def frame(self, model: Model) -> Frame:
        """What stands around every document.

        Raises:
            UsageError: the model has no chat template, or one that leaves the document out.
        """
        before = f"{self.instruction}\n\n" if self.instruction else ""
        if self.raw:
            return Frame(model.tokenize(before) if before else [], [])
        messages: list[Message] = [{"role": "user", "content": f"{before}{_DOCUMENT}\n"}]
        if self.system is not None:
            messages.insert(0, {"role": "system", "content": self.system})
        found = split_pieces(chat_pieces(model, messages), _DOCUMENT)
        if found is None:
            raise UsageError(f"The chat template of {model.name} leaves out the text; use --no-chat-template.")
        head, tail = found
        trims = not tail or tail[0].control
        after = [(piece.text, piece.control) for piece in (tail if trims else tail[1:])]
        starts = not head or head[-1].control
        return Frame(piece_tokens(model, head), after, trims, starts, chat_template(model).note(messages))

    def tokens(self, model: Model, document: Document, frame: Frame) -> list[int]:
        """What follows the common tokens."""
        text = f"{document.text}\n\n{document.question}" if document.question else document.text
        if frame.trims:
            text = text.strip() if frame.starts else text.rstrip()
        parts = [(text, False), *frame.after]
        out = model.tokenize_parts(
            parts, add_special=not frame.before, after=frame.before[-1] if frame.before else None
        )
        return [token for part in out for token in part]
