"""Where text to train on comes from: what a Debian machine installs, under licences that let a model trained on it be shipped.

Every source is a row of SOURCES: a licence, a place, and how its files are read.  A source that is not here gives nothing; the
standard library of Python always is.  docs/training-data.md lists them for readers.
"""

from __future__ import annotations

import ast
import gzip
import re
import sysconfig
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from optmem.train.html_text import read_html, read_program

TextKind = Literal["prose", "code"]
MIN_LENGTH = 200  # characters; a shorter document says nothing
MIN_DOCSTRING = 120
_MANY_BLANK = re.compile(r"\n(?:[ \t]*\n){2,}")
MIN_REPEATED = 24  # characters; a line as long as this is kept once in all documents together
DOC = Path("/usr/share/doc")
WORD_LIST = Path("/usr/share/dict/american-english")


@dataclass(frozen=True, slots=True)
class Document:
    """One text.  The name decides whether it is held out, so it does not depend on the machine."""

    name: str  # source and path inside it
    kind: TextKind
    text: str


@dataclass(frozen=True, slots=True)
class Source:
    """Files of one origin and licence."""

    name: str
    licence: str
    package: str  # of Debian
    folder: Path
    patterns: tuple[str, ...]
    kind: TextKind
    read: Callable[[str], str]
    skip: tuple[str, ...] = ()  # parts of paths

    def documents(self) -> Iterator[Document]:
        """Its documents, in the order of their names."""
        files = {path for pattern in self.patterns for path in self.folder.glob(pattern) if path.is_file()}
        for path in sorted(files):
            inside = path.relative_to(self.folder).as_posix()
            if any(part in inside for part in self.skip):
                continue
            text = self.read(_read(path)).replace("\r\n", "\n").replace("\0", "")
            if len(text) >= MIN_LENGTH:
                yield Document(f"{self.name}/{inside}", self.kind, text)


def _read(path: Path) -> str:
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return data.decode("utf-8", "replace")


def as_it_is(text: str) -> str:
    """A file that needs no reading."""
    return text


def read_docstrings(program: str) -> str:
    """The long strings of a Python file: documentation, help texts, templates."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)
            tree = ast.parse(program)
    except (SyntaxError, ValueError):
        return ""
    strings = (node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str))
    return "\n\n".join(_dedented(said) for said in strings if len(said) >= MIN_DOCSTRING and " " in said)


def _dedented(docstring: str) -> str:
    lines = docstring.expandtabs().strip("\n").split("\n")
    indents = [len(line) - len(line.lstrip()) for line in lines[1:] if line.strip()]
    indent = min(indents, default=0)
    return "\n".join([lines[0].strip(), *(line[indent:].rstrip() for line in lines[1:])]).rstrip()


_STDLIB = Path(sysconfig.get_path("stdlib"))
_NOT_PSF = ("site-packages/", "dist-packages/", "test/", "tests/", "_bundled/", "idlelib/", "sitecustomize", "_sysconfigdata")
_RUST = DOC / "rust-doc/html"
_RUST_BOOKS = ("book", "reference", "rust-by-example", "nomicon", "edition-guide", "embedded-book", "rustc")
_RUST_LICENCE = "MIT or Apache-2.0"

SOURCES: tuple[Source, ...] = (
    Source("python", "PSF-2.0", "python3", _STDLIB, ("**/*.py",), "prose", read_docstrings, _NOT_PSF),
    Source("python", "PSF-2.0", "python3", _STDLIB, ("**/*.py",), "code", as_it_is, (*_NOT_PSF, "pydoc_data/", "encodings/")),
    Source("python-manual", "PSF-2.0", "python3.11-doc", DOC / "python3.11/html/_sources", ("**/*.txt",), "prose", as_it_is),
    Source("sqlite-manual", "public domain", "sqlite3-doc", DOC / "sqlite3", ("**/*.html",), "prose", read_html),
    Source("postgresql-manual", "PostgreSQL", "postgresql-doc-15", DOC / "postgresql-doc-15/html", ("*.html",), "prose", read_html),
    Source(
        "rust-books",
        _RUST_LICENCE,
        "rust-doc",
        _RUST,
        tuple(f"{book}/**/*.html" for book in _RUST_BOOKS),
        "prose",
        read_html,
        ("print.html", "/toc.html"),
    ),
    Source("rust-manual", _RUST_LICENCE, "rust-doc", _RUST, ("std/**/*.html",), "prose", read_html, ("std/arch", "/all.html")),
    Source("rust-code", _RUST_LICENCE, "rust-doc", _RUST, ("src/*/**/*.html",), "code", read_program, ("stdarch", "/unicode_data")),
    Source("jargon-file", "public domain", "jargon-text", DOC / "jargon-text", ("jargon.txt.gz",), "prose", as_it_is),
)


def drop_repeated_lines(documents: Iterable[Document]) -> Iterator[Document]:
    """The documents without the long lines of earlier ones: what generators of documentation repeat on every page."""
    seen = set[int]()
    for document in documents:
        kept = []
        for line in document.text.split("\n"):
            key = hash(line) if len(line) >= MIN_REPEATED else None
            if key is None or key not in seen:
                kept.append(line)
            if key is not None:
                seen.add(key)
        text = _MANY_BLANK.sub("\n\n", "\n".join(kept))
        if len(text.strip()) >= MIN_LENGTH:
            yield Document(document.name, document.kind, text)


def collect(sources: Iterable[Source] = SOURCES) -> list[Document]:
    """All documents of all sources that are here, by name, nothing long twice."""
    found = [document for source in sources for document in source.documents()]
    kinds: tuple[TextKind, ...] = ("prose", "code")
    return [kept for kind in kinds for kept in drop_repeated_lines(document for document in found if document.kind == kind)]


def read_words(path: Path = WORD_LIST) -> list[str]:
    """The word list of this machine without possessives; empty where there is none."""
    if not path.is_file():
        return []
    return [word for word in path.read_text(encoding="utf-8").split() if not word.endswith("'s")]
