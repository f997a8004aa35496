"""Documents of text files, read as a stream of pieces of bounded size.

Plain text (.txt) and JSON lines (.jsonl, the text under "text"), each also as .gz, .xz or .bz2, in UTF-8.
"""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

from pretrain.data.sources import DataError

Documents = Literal["line", "blank", "file"]

PIECE = 1 << 20  # bytes
JSON_LINE = 1 << 26  # bytes

NOT_UTF8 = "lines that are not UTF-8"
NOT_JSON = 'lines that are no JSON object with a "text"'
LONG_JSON = f"JSON lines above {JSON_LINE >> 20} MiB"
NUL = "NUL characters"
EMPTY = "empty documents"

_OPENERS: dict[str, Any] = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}
_ENDINGS = tuple(kind + packed for kind in (".txt", ".jsonl") for packed in ("", *_OPENERS))
_NO_TEXT = {
    b"\x28\xb5\x2f\xfd": "Zstandard",
    b"PK\x03\x04": "a zip archive",
    b"PAR1": "Parquet",
    b"MMID": "a tokenised corpus",
    b"\x1f\x8b": "gzip without .gz in its name",
    b"\xfd7zXZ": "xz without .xz in its name",
}


class Piece(NamedTuple):
    """Some text of one document, whitespace at the document's ends removed; may be empty."""

    text: str
    last: bool
    """Whether its document ends here."""
    where: str
    """`file line 7`, the last one read for it."""


class TextReader:
    """The documents of text files, in order, as pieces of at most `piece` bytes whatever the lines are like.

    A document is a line, the lines up to a blank one, or a file; in JSON lines it is a record. A longer one comes in
    several pieces, cut before whitespace if there is any. What cannot be used is left out and counted.

    Iterating raises `DataError` for files that cannot be read.
    """

    def __init__(self, files: Sequence[Path], documents: Documents = "line", piece: int = PIECE) -> None:
        self.files, self.documents, self.piece = files, documents, piece
        self.bytes = sum(os.path.getsize(file) for file in files)
        """Size of all files as they are stored."""
        self.skipped: Counter[str] = Counter()
        """What was left out so far: reason -> how often."""
        self.first: dict[str, str] = {}
        """Reason -> `file line 7`, where it was met first."""
        self._before = 0
        self._raw: BinaryIO | None = None

    @property
    def consumed(self) -> int:
        """How many of `bytes` have been read."""
        return self._before + (self._raw.tell() if self._raw else 0)

    def skip(self, reason: str, where: str, count: int = 1) -> None:
        self.skipped[reason] += count
        self.first.setdefault(reason, where)

    def summary(self) -> str:
        """What was left out, for one line: `2 empty documents (first: a.txt line 7), 1 ...`; empty if nothing."""
        return ", ".join(f"{n:,} {reason} (first: {self.first[reason]})" for reason, n in self.skipped.items())

    def __iter__(self) -> Iterator[Piece]:
        for path in self.files:
            try:
                with ExitStack() as stack:
                    self._raw = raw = stack.enter_context(open(path, "rb"))
                    start = raw.peek(8)
                    strange = next((kind for magic, kind in _NO_TEXT.items() if start.startswith(magic)), None)
                    opener = _OPENERS.get(path.suffix)
                    if strange and not opener:
                        raise DataError(f"{path} is {strange}, not text: give {', '.join(_ENDINGS)}")
                    file = stack.enter_context(opener(raw)) if opener else raw
                    if path.name.removesuffix(path.suffix if opener else "").endswith(".jsonl"):
                        yield from self._records(file, path)
                    else:
                        yield from self._pieces(file, str(path), self.documents)
                    self._before, self._raw = self.consumed, None
            except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
                raise DataError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error

    def _records(self, file: BinaryIO, path: Path) -> Iterator[Piece]:
        number = 0
        while line := file.readline(JSON_LINE):
            number += 1
            where = f"{path} line {number}"
            if len(line) == JSON_LINE and not line.endswith(b"\n"):
                while (rest := file.readline(JSON_LINE)) and not rest.endswith(b"\n"):
                    pass
                self.skip(LONG_JSON, where)
                continue
            if line.isspace():
                continue
            try:
                text = json.loads(line)["text"].encode()
            except UnicodeError:
                self.skip(NOT_UTF8, where)
            except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
                self.skip(NOT_JSON, where)
            else:
                yield from self._pieces(io.BytesIO(text), where, "file", one_line=True)

    def _pieces(self, file: BinaryIO, name: str, documents: Documents, one_line: bool = False) -> Iterator[Piece]:
        parts: list[str] = []
        size = 0
        begun = False  # whether a piece of the present document has been given already

        def piece(last: bool) -> Piece:
            nonlocal begun, size
            text = "".join(parts)
            text = text if begun else text.lstrip()
            text = text.rstrip() if last else text
            parts.clear()
            begun, size = not last, 0
            return Piece(text, last, where)

        where = name  # there may be no line at all
        spoilt = 0  # the number of the line whose rest is left out
        for number, data, whole, ended in self._chunks(file):
            where = name if one_line else f"{name} line {number}"
            text = None if number == spoilt else self._decode(data, where)
            spoilt = number if text is None else 0
            if documents == "blank" and whole and text is not None and not text.strip():
                if parts or begun:
                    yield piece(last=True)
                continue
            if parts and size + len(data) > self.piece:
                yield piece(last=False)
            if text is not None:
                parts.append(text)
                size += len(data)
            if documents == "line" and ended and (parts or begun):
                yield piece(last=True)
        if parts or begun or documents == "file":
            yield piece(last=True)

    def _chunks(self, file: BinaryIO) -> Iterator[tuple[int, bytes, bool, bool]]:
        """Yield (line number, bytes, whether they are a whole line, whether the line ends with them)."""
        number, rest, whole = 1, b"", True
        while data := file.readline(self.piece - len(rest)):
            data, rest = rest + data, b""
            ended = data.endswith(b"\n") or len(data) < self.piece
            if number == 1 and whole:
                data = data.removeprefix(b"\xef\xbb\xbf")
            if not ended:
                cut = _cut(data)
                data, rest = data[:cut], data[cut:]
            yield number, data, whole and ended, ended
            whole = ended
            number += ended
        if rest:
            yield number, rest, False, True

    def _decode(self, data: bytes, where: str) -> str | None:
        try:
            text = data.decode().replace("\r\n", "\n")
        except UnicodeDecodeError:
            self.skip(NOT_UTF8, where)
            return None
        if "\0" in text:
            self.skip(NUL, where, text.count("\0"))
            text = text.replace("\0", "")
        return text


def find_text(paths: Sequence[str | Path]) -> list[Path]:
    """The files among `paths`, and the text files at any depth of the folders among them, sorted by folder.

    Raises `DataError` if a path does not exist or a folder holds no text.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = [file for file in sorted(path.rglob("*")) if file.name.endswith(_ENDINGS) and file.is_file()]
            inside = [file for file in inside if not any(p.startswith(".") for p in file.relative_to(path).parts)]
            if not inside:
                raise DataError(f"no text in {path}: it has to hold {', '.join(_ENDINGS)}")
            found += inside
        elif path.is_file():
            found.append(path)
        else:
            raise DataError(f"{path} does not exist: give text files or folders of them")
    return found


def _cut(data: bytes) -> int:
    """Where to cut: before the last whitespace between words, else between characters."""
    words = data.rstrip()
    space = max(words.rfind(blank) for blank in (b" ", b"\t", b"\r"))
    if space > 0:
        return space
    for back in range(1, 4):
        if data[-back] < 0x80:
            break
        if data[-back] >= 0xC0:  # begins a character that may not end here
            return len(data) - back
    return len(data)
