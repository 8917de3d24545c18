"""Text that comes in pieces, broken into lines between words."""

from __future__ import annotations

from collections.abc import Callable

from rich.cells import cell_len

_JOINER = "\u200d"
# no line begins with these
_CLOSING = frozenset("、。，．・：；？！）」』】〉》〕］｝〜ー々…’”%!?,.;:)]}")
_FLAGS = frozenset(map(chr, range(0x1F1E6, 0x1F200)))  # two letters are one flag
_MODIFIERS = frozenset(map(chr, range(0x1F3FB, 0x1F400)))  # colours of skin
_TAB = 8


class Wrapper:
    """Breaks lines where the next word does not fit; spaces at a break are dropped, all others and line ends stay.

    A word is held back until it has ended, so that nothing that was written has to be taken back.
    """

    def __init__(self, width: Callable[[], int]) -> None:
        """`width`: columns of the window; asked again and again, since the window may change."""
        self._width = width
        self._column = 0
        self._gap = ""  # spaces that are written only before a word of the same line
        self._word = ""
        self._long = False  # in a word that is longer than a line: it is written as it comes

    def feed(self, text: str) -> str:
        """What of the text can be written already."""
        out: list[str] = []
        for char in text:
            if char in " \t\n":
                out.append(self._end_word())
                self._long = False
                self._gap += char
                if char == "\n":
                    out.append(self._end_line())
            elif self._long:
                out.append(self._put(char))
            else:
                if self._word and _may_break(self._word, char):
                    out.append(self._end_word())
                self._word += char
                if cell_len(self._word) > self._width():
                    out.append(self._end_word())
                    self._long = True
        return "".join(out)

    def end(self) -> str:
        """What was held back."""
        return self._end_word() + self._end_line()

    def _end_word(self) -> str:
        word, self._word = self._word, ""
        if not word:
            return ""
        gap, self._gap = self._gap, ""
        column = _after(gap, self._column) + cell_len(word)
        if column <= self._width():
            self._column = column
            return gap + word
        line_end = "\n" if self._column else ""
        self._column = 0
        if cell_len(word) > self._width():
            return line_end + "".join(map(self._put, word))
        self._column = cell_len(word)
        return line_end + word

    def _put(self, char: str) -> str:
        """A character of a word that is longer than a line."""
        cells = cell_len(char)
        if self._column and self._column + cells > self._width():
            self._column = cells
            return f"\n{char}"
        self._column += cells
        return char

    def _end_line(self) -> str:
        gap, self._gap = self._gap, ""
        ended = gap.endswith("\n")
        spaces = gap.removesuffix("\n")
        column = _after(spaces, self._column)
        fits = column <= self._width()
        self._column = 0 if ended else column if fits else self._column
        return (spaces if fits else "") + ("\n" if ended else "")


def _after(spaces: str, column: int) -> int:
    """The column after spaces and tabs."""
    for char in spaces:
        column += _TAB - column % _TAB if char == "\t" else 1
    return column


def _may_break(word: str, char: str) -> bool:
    """Whether a line may end between a word and the next character: beside wide ones, as East Asian text has it."""
    if char in _CLOSING or char in _MODIFIERS or cell_len(char) == 0 or word.endswith(_JOINER):
        return False
    if word[-1] in _FLAGS and char in _FLAGS:
        return False
    return cell_len(char) == 2 or cell_len(word[0]) == 2
