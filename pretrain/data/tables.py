"""Tab-separated files, also gzip-compressed: found by name, read whole; their lines told by number."""

from __future__ import annotations

import csv
import gzip
import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pretrain.data.names import few
from pretrain.data.sources import DataError


@dataclass(frozen=True)
class Columns:
    """Where a table has its texts, alone (`a`) or in pairs, and their labels: names in its first line, or numbers, from
    1, where that is a line like the others. None given: lines are `label<TAB>text`, whose text may hold tabs."""

    a: str = ""
    b: str = ""
    label: str = ""

    @property
    def named(self) -> bool:
        return not all(name.isdigit() for name in self.given)

    @property
    def given(self) -> list[str]:
        return [name for name in (self.a, self.b, self.label) if name]


PLAIN = Columns()


@dataclass(frozen=True)
class Texts:
    """The rows of a table: texts, the second ones of pairs, and labels as they are written."""

    file: Path
    first: list[str]
    second: list[str] | None
    labels: list[str] | None
    lines: list[int]
    """Where each row ends, counted from 1."""
    left_out: int = 0
    """Lines with another number of fields."""

    def __len__(self) -> int:
        return len(self.first)


def find_table(folder: Path, split: str) -> Path | None:
    """`<split>.tsv` or `<split>.tsv.gz`."""
    files = (folder / f"{split}.tsv", folder / f"{split}.tsv.gz")
    return next((file for file in files if os.path.isfile(file)), None)


def existing_table(folder: Path, split: str) -> Path:
    """`find_table`'s; raises DataError if there is none."""
    if file := find_table(folder, split):
        return file
    there = ", ".join(sorted(entry.name for entry in folder.glob("*.tsv*"))) or "none"
    raise DataError(f"no {split}.tsv or {split}.tsv.gz in {folder}; .tsv files there: {there}")


def read_texts(
    file: Path, columns: Columns, labelled: bool = True, *, quoted: bool = False, ragged: bool = False
) -> Texts:
    """The texts of a table, and with `labelled` their labels.

    Where lines are `label<TAB>text`, those without labels may be text alone. `quoted`: a field may stand in double
    quotes, and then hold tabs, ends of lines and doubled quotes; else quotes are text. `ragged`: lines with another
    number of fields than the first one are left out. Raises DataError, in one line, for a column that is not there and,
    with the numbers of the lines, for what is not UTF-8, has another number of fields, or no label.
    """
    lines = read_lines(file)
    if bad := [number for number, line in enumerate(lines, start=1) if line is None]:
        raise DataError(f"{file} {numbered(bad)}: not UTF-8")
    rows = _rows(file, [line or "" for line in lines], columns, quoted)
    if columns == PLAIN and not labelled:
        rows = [(end, ["", *row][-2:]) for end, row in rows]
    first, width = rows[0][1], 2 if columns == PLAIN else len(rows[0][1])
    places = _places(file, columns, first, labelled)
    every = rows[1:] if columns.named else rows
    rows = [(end, row) for end, row in every if len(row) == width]
    if len(rows) < len(every) and not ragged:
        expected = "not 'label<TAB>text'" if columns == PLAIN else f"not {width} fields, as line 1 has"
        raise DataError(f"{file} {numbered([end for end, row in every if len(row) != width])}: {expected}")
    if not rows:
        raise DataError(f"{file} has no texts")
    a, b, label = (None if place is None else [row[place].strip() for _, row in rows] for place in places)
    assert a is not None
    found = Texts(file, a, b, label, [end for end, _ in rows], len(every) - len(rows))
    if label:
        refuse_empty(found, label, "label")
    return found


def refuse_empty(texts: Texts, fields: Sequence[str], what: str) -> None:
    """Raises DataError, with the lines, if a row has none of `what`."""
    if bad := [line for line, field in zip(texts.lines, fields, strict=True) if not field]:
        raise DataError(f"{texts.file} {numbered(bad)}: no {what}")


def read_lines(file: Path) -> list[str | None]:
    """The lines of a file, without a byte order mark; None for one that is not UTF-8. Raises DataError if there are
    none, or it cannot be read."""
    try:
        content = file.read_bytes()
        content = gzip.decompress(content) if file.suffix == ".gz" else content
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"cannot read {file}: {error}") from error
    content = content.removeprefix(b"\xef\xbb\xbf").removesuffix(b"\n")
    if not content:
        raise DataError(f"{file} is empty")
    return [_decoded(line.removesuffix(b"\r")) for line in content.split(b"\n")]


def numbered(numbers: Sequence[int]) -> str:
    """line 3; lines 3, 4; lines 3, 4, 5, 6, 7 and 12 more"""
    return f"line{'s' * (len(numbers) > 1)} {few(numbers, 5)}"


def _decoded(line: bytes) -> str | None:
    try:
        return line.decode()
    except UnicodeDecodeError:
        return None


def _rows(file: Path, lines: list[str], columns: Columns, quoted: bool) -> list[tuple[int, list[str]]]:
    """(line that it ends in, fields) of every row."""
    if not quoted:
        most = 1 if columns == PLAIN else -1
        return [(number, line.split("\t", most)) for number, line in enumerate(lines, start=1)]
    reader = csv.reader((f"{line}\n" for line in lines), delimiter="\t", strict=True)
    try:
        return [(reader.line_num, row) for row in reader]
    except csv.Error as error:
        raise DataError(f"{file} line {reader.line_num}: {error}") from None


def _places(file: Path, columns: Columns, first: list[str], labelled: bool) -> tuple[int | None, ...]:
    """Of a row's fields, those of `a`, `b` and the label; None for one that is not asked for."""
    if columns == PLAIN:
        return 1, None, 0 if labelled else None
    wanted = (columns.a, columns.b, columns.label if labelled else "")
    there = [name.strip() for name in first] if columns.named else [str(i + 1) for i in range(len(first))]
    if lost := [name for name in wanted if name and name not in there]:
        has = ", ".join(there) if columns.named else f"{len(first)} columns"
        raise DataError(f"{file} has no column {', '.join(lost)}; its first line has {has}")
    return tuple(there.index(name) if name else None for name in wanted)
