"""Tab-separated files, also gzip-compressed: found by name, read whole; their lines told by number."""

from __future__ import annotations

import gzip
import os
import zlib
from collections.abc import Sequence
from pathlib import Path

from pretrain.data.sources import DataError


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


def read_lines(file: Path) -> list[str | None]:
    """The lines of a file, without a byte order mark; None for one that is not UTF-8. Raises DataError if there are
    none, or it cannot be read."""
    try:
        content = file.read_bytes()
        content = gzip.decompress(content) if file.suffix == ".gz" else content
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"cannot read {file}: {error}") from error
    lines = [_decoded(line) for line in content.removeprefix(b"\xef\xbb\xbf").splitlines()]
    if not lines:
        raise DataError(f"{file} is empty")
    return lines


def numbered(numbers: Sequence[int]) -> str:
    """line 3; lines 3, 4; lines 3, 4, 5, 6, 7 and 12 more"""
    more = f" and {len(numbers) - 5:,} more" if len(numbers) > 5 else ""
    return f"line{'s' * (len(numbers) > 1)} {', '.join(map(str, numbers[:5]))}{more}"


def _decoded(line: bytes) -> str | None:
    try:
        return line.decode()
    except UnicodeDecodeError:
        return None
