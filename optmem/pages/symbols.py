"""What a cell can say.

A symbol is a code point that stands for one cell of a page.  Printable characters stand for themselves.  Everything a page says
beyond them (the end of a line, a tab, the escape of a character that cannot be drawn, a label that no text can forge) is a symbol
from the private use area.  Text that itself holds private code points is escaped, so the two never meet: `read_symbols` turns the
symbols of a page back into exactly the text that was put in.

    character                        drawn as
    \\n                               a return arrow
    \\t                               a tab arrow
    other C0 controls, DEL           ^M in white on black, two cells (caret notation)
    not drawable, or in no font      U+6F22 in white on black
    a wide character at a row's end  a filler cell before it, on the next row the character
"""

from __future__ import annotations

import re
import sys
import unicodedata

LINE_END = "\ue000"
TEXT_END = "\ue001"
TAB = "\ue002"
FILL = "\ue003"  # the last cell of a row that a wide character did not fit in
WIDE_REST = "\ue004"  # the right half of a wide character
MARKS = LINE_END + TEXT_END + TAB + FILL + WIDE_REST

_INVERSE = 0xE000  # the inverse of the ASCII character c is the symbol 0xE000 + c
PRINTABLE_ASCII = "".join(map(chr, range(0x20, 0x7F)))

# Controls, formats, surrogates, private and unassigned code points, all blanks but the space, and marks that need a base.
_UNDRAWABLE = {"Cc", "Cf", "Cs", "Co", "Cn", "Zs", "Zl", "Zp", "Mn", "Me"}


def inverse(text: str) -> str:
    """The symbols of printable ASCII drawn white on black."""
    return "".join(chr(_INVERSE + ord(char)) for char in text)


def plain(symbols: str) -> str:
    """The ASCII of inverse symbols."""
    return "".join(chr(ord(symbol) - _INVERSE) for symbol in symbols)


def is_drawable(code: int) -> bool:
    """Whether a code point has a visible form of its own, given a font for it."""
    return code == 0x20 or unicodedata.category(chr(code)) not in _UNDRAWABLE


def escape(code: int) -> str:
    """The symbols that name a code point which is not drawn: caret notation for controls, U+XXXX for the rest."""
    if code < 0x20 or code == 0x7F:
        return inverse("^" + chr(code ^ 0x40))
    return inverse(f"U+{code:04X}")


_INVERSE_SYMBOL = f"[{chr(_INVERSE + 0x20)}-{chr(_INVERSE + 0x7E)}]"
_HEX_DIGIT = f"[{inverse('0')}-{inverse('9')}{inverse('A')}-{inverse('F')}]"
_SAID = re.compile(
    f"{inverse('^')}(?P<control>{_INVERSE_SYMBOL})"
    f"|{inverse('U+')}(?P<code>{_HEX_DIGIT}+)"
    f"|(?P<label>{inverse('[')}{_INVERSE_SYMBOL}*?{inverse(']')})"
    f"|(?P<mark>[{MARKS}])"
    f"|(?P<stray>{_INVERSE_SYMBOL})"
)


def _meaning(said: re.Match[str]) -> str:
    if said["control"]:
        return chr(ord(plain(said["control"])) ^ 0x40)
    if said["code"]:
        code = int(plain(said["code"]), 16)
        return chr(code) if code <= sys.maxunicode else plain(said[0])  # a reader may misread a digit: what it said is kept
    if said["label"] or said["stray"]:  # white on black without its bracket: no drawing makes it, and no user can read its code
        return plain(said[0])
    return {LINE_END: "\n", TAB: "\t"}.get(said["mark"], "")


def read_symbols(symbols: str) -> str:
    """The text that these symbols say: the inverse of drawing.  Nothing but blanks stands behind the end-of-text mark.

    Symbols that no drawing makes, as a reader may say them, are read as well as they can be, and never raise.
    """
    said, end, rest = symbols.rpartition(TEXT_END)
    return _SAID.sub(_meaning, said if end and not rest.strip(" ") else symbols)
