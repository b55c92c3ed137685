"""What a model said, taken apart: blocks with labels and boxes, pages, and the text without its tags.

    V1, V2   <|ref|>LABEL<|/ref|><|det|>[[x1, y1, x2, y2], ...]<|/det|>  newline, content
    UL       <|det|>LABEL [x1, y1, x2, y2]<|/det|>content                <PAGE> before every page

Box numbers are 0 .. 999 of the whole picture, whatever its size.  The words are a model's, so anything can stand there: what is no
box is left out and its tag removed; nothing here fails, and nothing is evaluated.  Tables (HTML), formulas and Markdown are kept.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from optmem.errors import InputError
from optmem.text.tokenizer import DET, DET_END, EOS, REF, REF_END

PAGE = "<PAGE>"
SCALE = 999  # the number of the right and the lower edge
MAX_BOXES = 10_000  # of one block; a model that repeats itself writes more

_NAMED = REF_END + DET  # with at most blanks between them, one tag: only then is what stands before it a label
_NAMES = "|".join([rf"{re.escape(REF_END)}\s*{re.escape(DET)}", *map(re.escape, (REF, REF_END, DET, DET_END, EOS))])
_TAG, _TAG_OR_PAGE = re.compile(_NAMES), re.compile(f"{_NAMES}|{PAGE}")
_ENDS = {REF: REF_END, DET: DET_END}
_BRACKETS = re.compile(r"\[([^\[\]]*)\]")
_NUMBER = re.compile(r"\s*([0-9]{1,4})(?:\.[0-9]{0,6})?\s*")  # what stands behind the point is dropped
# Boxes whose end never came: up to the end of the answer, up to their bracket, or two brackets that nobody closed.
_OPEN_BOXES = re.compile(r"\A\s*(?:\[[\s\[\]0-9,.]*\Z|\[[\s\[\]0-9,.]*\]|\[\[[\s\[\]0-9,.]*)\s*")
_SYMBOLS = {"\\coloneqq": ":=", "\\eqqcolon": "=:"}
_MANY_NEWLINES = re.compile(r"\n{3,}")
# A fenced block, up to a fence of as many marks or the end of the text.
_CODE = re.compile(r"^[ \t]*(`{3,}|~{3,})(?![`~])[^`\n]*$.*?(?:^[ \t]*\1[`~]*[ \t]*$|\Z)", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangle in pixels of the original picture; right and bottom are not less than left and top."""

    left: int
    top: int
    right: int
    bottom: int


@dataclass(frozen=True, slots=True)
class Region:
    """A block of a page: what it is, where it is, what it says."""

    label: str  # title, text, image, table, ...; empty where the text stood before any tag
    boxes: tuple[Box, ...]
    text: str
    page: int = 0


@dataclass(frozen=True, slots=True)
class Reading:
    """A whole answer: its regions in reading order, and its text without tags."""

    text: str
    regions: tuple[Region, ...]
    num_pages: int
    num_malformed: int  # tags and boxes that could not be read


def parse_output(text: str, sizes: Sequence[tuple[int, int]], *, has_pages: bool = False) -> Reading:
    """Take an answer apart.

    sizes       width and height in pixels of the original picture of each page; the last one serves for all further pages
    has_pages   whether <PAGE> begins a page, as UL writes it; to the other families it is a word like any other
    """
    if not sizes or any(min(size) < 1 for size in sizes):
        raise InputError(f"an answer is about pictures of at least one pixel, got sizes {list(sizes)[:5]}")
    parser = _Parser(sizes)
    for tag, words in _pieces(text, _TAG_OR_PAGE if has_pages else _TAG):
        parser.take(tag, words)
    return parser.reading()


def plain_text(text: str, *, has_pages: bool = False) -> str:
    """The answer without its tags and boxes, symbols and empty lines cleaned up."""
    return parse_output(text, [(1, 1)], has_pages=has_pages).text


def clean(text: str) -> str:
    """Symbols that Markdown readers do not know, and runs of empty lines; fenced code is kept as it stands."""
    parts, start = [], 0
    for code in _CODE.finditer(text):
        parts += [_clean_prose(text[start : code.start()]), code[0]]
        start = code.end()
    return "".join(parts) + _clean_prose(text[start:])


def _clean_prose(text: str) -> str:
    for symbol, plain in _SYMBOLS.items():
        text = text.replace(symbol, plain)
    return _MANY_NEWLINES.sub("\n\n", text)


def _pieces(text: str, tags: re.Pattern[str]) -> Iterator[tuple[str, str]]:
    """Every tag with the words behind it, in order; before the first tag the tag is empty."""
    tag, start = "", 0
    for match in tags.finditer(text):
        yield tag, text[start : match.start()]
        is_named = match[0].startswith(REF_END) and match[0].endswith(DET)
        tag, start = _NAMED if is_named else match[0], match.end()
    yield tag, text[start:]


class _Parser:
    """Walks over the tags once.  A region is open from its label on; its words are collected until the next begins."""

    def __init__(self, sizes: Sequence[tuple[int, int]]) -> None:
        self._sizes = sizes
        self._regions: list[Region] = []
        self._label = ""  # this and the next two are of the open region
        self._boxes: tuple[Box, ...] = ()
        self._said: list[str] = []
        self._page = -1  # before the first <PAGE>
        self._waiting: tuple[str, str] | None = None  # a tag and the words behind it, until its end comes
        self._wants_box = False  # the open region has its label from <|ref|>, and its boxes are waiting
        self._num_malformed = 0

    def take(self, tag: str, words: str) -> None:
        """One tag and the words behind it."""
        self._settle(tag)
        if tag in (REF, DET, _NAMED):
            self._waiting = (REF if tag == REF else DET, words)
            return
        if tag == PAGE:
            self._begin("", ())
            self._page += 1
        self._said.append(words)

    def _settle(self, tag: str) -> None:
        """What the waiting tag means, now that the next one is known; without its end, its words are text."""
        waiting, self._waiting = self._waiting, None
        if waiting is None:
            self._num_malformed += tag in (REF_END, DET_END, _NAMED)  # an end without a beginning
        elif waiting[0] == REF and tag == _NAMED:
            self._begin(_one_line(waiting[1]), ())
            self._wants_box = True
        elif waiting[0] == DET and tag == DET_END:
            self._take_boxes(waiting[1])
        else:
            self._num_malformed += tag != _ENDS[waiting[0]]  # with its end, but no box behind it, a label is a word of the text
            self._said.append(_OPEN_BOXES.sub("", waiting[1]) if waiting[0] == DET else waiting[1])
            self._wants_box = False

    def _take_boxes(self, words: str) -> None:
        width, height = self._sizes[min(max(self._page, 0), len(self._sizes) - 1)]
        read = [_pixels(match[1], width, height) for match in _BRACKETS.finditer(words)]
        boxes = tuple(box for box in read if box is not None)[:MAX_BOXES]
        self._num_malformed += max(len(read) - len(boxes), 0 if boxes else 1)
        if self._wants_box:
            self._boxes, self._wants_box = boxes, False
        else:
            self._begin(_one_line(words.partition("[")[0]), boxes)

    def _begin(self, label: str, boxes: tuple[Box, ...]) -> None:
        """End the open region and open the next."""
        said = clean("".join(self._said)).strip("\n")
        if said.strip() or self._boxes or self._label:
            self._regions.append(Region(self._label, self._boxes, said, max(self._page, 0)))
        self._label, self._boxes, self._said = label, boxes, []
        self._wants_box = False

    def reading(self) -> Reading:
        """Everything taken so far."""
        self._settle("")
        self._begin("", ())
        texts = [region.text for region in self._regions if region.text.strip()]
        num_pages = max((region.page for region in self._regions), default=0) + 1  # behind the last <PAGE> may stand nothing
        return Reading("\n\n".join(texts), tuple(self._regions), num_pages, self._num_malformed)


def _pixels(words: str, width: int, height: int) -> Box | None:
    """A box in pixels; None where there are not four numbers, one is out of range, or the corners are crossed."""
    found = [_NUMBER.fullmatch(word) for word in words.split(",", 4)]
    numbers = [int(match[1]) for match in found if match]
    if len(numbers) != 4 or len(found) != 4 or max(numbers) > SCALE + 1 or numbers[2] < numbers[0] or numbers[3] < numbers[1]:
        return None
    shares = [min(number, SCALE) / SCALE for number in numbers]  # 1000 is the edge too: UL's paper counts to it
    # int() of the float product, as in the public scripts: an exact quotient differs from it by a pixel here and there.
    left, right = int(shares[0] * width), int(shares[2] * width)
    top, bottom = int(shares[1] * height), int(shares[3] * height)
    return Box(left, top, right, bottom)


def _one_line(words: str) -> str:
    return " ".join(words.split())
