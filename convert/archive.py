"""Torch's files as bytes: where the pickle is, and where each storage. Nothing is unpacked; storages are views.

`torch.save` writes a zip archive whose entries are stored as they are, `NAME/data.pkl` and `NAME/data/KEY`; before 1.6
it wrote pickles one after the other and the storages behind them.
"""

from __future__ import annotations

import io
import mmap
import stat
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

LARGEST_PICKLE = 1 << 26  # bytes: no checkpoint's names and numbers come near it
LOCAL_HEADER = struct.Struct("<4s5H3L2H")  # signature ... lengths of name and extra field
ZIP, TAR = b"PK\x03\x04", b"ustar"


class Refusal(Exception):
    """What is wrong with a file, without its name."""


class Source(Protocol):
    """Where storages come from."""

    def storage(self, key: str, dtype: torch.dtype, count: int) -> Tensor: ...


class Entry(NamedTuple):
    offset: int
    size: int
    crc: int


class ZipArchive:
    """The entries of a zip archive, which has to be one that torch could have written. Raises Refusal."""

    def __init__(self, path: Path, data: mmap.mmap, verify: bool) -> None:
        self.data, self.verify = data, verify
        try:
            with zipfile.ZipFile(path) as archive:
                found = archive.infolist()
        except (zipfile.BadZipFile, OSError, ValueError, struct.error, NotImplementedError, EOFError) as error:
            raise Refusal(f"it is damaged or truncated: {error}") from None
        entries: dict[str, Entry] = {}
        for info in found:
            name = info.orig_filename
            if problem := _problem(info, name):
                raise Refusal(f"{problem}: {name!r:.100}")
            if name in entries:
                raise Refusal(f"two entries have one name: {name!r:.100}")
            entries[name] = self._entry(info, name)
        end = 0
        for name, entry in sorted(entries.items(), key=lambda item: (item[1].offset, item[1].size)):
            if entry.offset < end:
                raise Refusal(f"entries overlap: {name!r:.100}")
            end = entry.offset + entry.size
        tops = {name.partition("/")[0] for name in entries}
        if len(tops) != 1 or (top := tops.pop()) + "/data.pkl" not in entries:
            raise Refusal("it is a zip archive, but not torch's: NAME/data.pkl is not in it")
        if f"{top}/constants.pkl" in entries:
            raise Refusal("it is a TorchScript program, not a checkpoint")
        self.entries = {name.removeprefix(top + "/"): entry for name, entry in entries.items()}
        if "byteorder" in self.entries and bytes(self.read("byteorder")) != b"little":
            raise Refusal("it was written on a big-endian machine")

    def _entry(self, info: zipfile.ZipInfo, name: str) -> Entry:
        """Where the bytes of an entry are, by its own header, which has to agree with the archive's list."""
        start = info.header_offset
        if not 0 <= start <= len(self.data) - LOCAL_HEADER.size:
            raise Refusal(f"an entry lies outside the file: {name!r:.100}")
        signature, *_, name_length, extra_length = LOCAL_HEADER.unpack_from(self.data, start)
        first = start + LOCAL_HEADER.size
        own = self.data[first : first + name_length]
        if signature != ZIP or own != name.encode():
            raise Refusal(f"an entry's own header says otherwise: {name!r:.100}")
        offset = first + name_length + extra_length
        if info.file_size != info.compress_size or offset + info.file_size > len(self.data):
            raise Refusal(f"an entry claims {info.file_size} bytes that are not there: {name!r:.100}")
        return Entry(offset, info.file_size, info.CRC)

    def read(self, name: str) -> memoryview:
        entry = self.entries[name]
        view = memoryview(self.data)[entry.offset : entry.offset + entry.size]
        if self.verify and zlib.crc32(view) != entry.crc:
            raise Refusal(f"it is damaged: the checksum of {name} is wrong")
        return view

    def storage(self, key: str, dtype: torch.dtype, count: int) -> Tensor:
        entry = self.entries.get(f"data/{key}")
        if entry is None:
            raise Refusal(f"storage {key!r:.50} is not in it")
        if count * dtype.itemsize != entry.size:
            raise Refusal(f"storage {key!r:.50} should have {count} elements of {dtype}, and has {entry.size} bytes")
        self.read(f"data/{key}")  # its checksum
        return elements(self.data, entry.offset, dtype, count)


def _problem(info: zipfile.ZipInfo, name: str) -> str:
    """Why an entry cannot be torch's; empty if it can."""
    parts = name.split("/")
    mode = info.external_attr >> 16
    rules = (
        (".." in parts or "" in parts or "\\" in name or ":" in parts[0] or "\0" in name, "an entry leaves its folder"),
        (bool(info.flag_bits & 0x1), "an entry is encrypted"),
        (stat.S_ISLNK(mode), "an entry is a symbolic link"),
        (info.compress_type != zipfile.ZIP_STORED, "an entry is compressed, which torch.save never does"),
        (parts[-1] == "data.pkl" and info.file_size > LARGEST_PICKLE, "an entry is too large for a pickle"),
    )
    return next((problem for wrong, problem in rules if wrong), "")


class LegacyArchive:
    """Storages behind the pickles. `counts`: how many elements of which type the pickle says that each has."""

    def __init__(
        self, data: mmap.mmap, keys: list[str], first: int, counts: dict[str, tuple[torch.dtype, int]]
    ) -> None:
        self.data, self.offsets = data, {}
        for key in keys:
            dtype, count = counts[key]
            size = count * dtype.itemsize
            if first + 8 + size > len(data) or struct.unpack_from("<q", data, first)[0] != count:
                raise Refusal(f"storage {key!r:.50} should have {count} elements of {dtype}, which are not there")
            self.offsets[key] = first + 8
            first += 8 + size

    def storage(self, key: str, dtype: torch.dtype, count: int) -> Tensor:
        if key not in self.offsets:
            raise Refusal(f"storage {key!r:.50} is not in it")
        return elements(self.data, self.offsets[key], dtype, count)


class Counted:
    """Stands for storages until it is known where they are."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.counts: dict[str, tuple[torch.dtype, int]] = {}

    def storage(self, key: str, dtype: torch.dtype, count: int) -> Tensor:
        if count * dtype.itemsize > self.size or self.counts.setdefault(key, (dtype, count)) != (dtype, count):
            raise Refusal(f"storage {key!r:.50} cannot have {count} elements of {dtype}")
        return torch.empty(count, dtype=dtype, device="meta")


class Nothing:
    """Where no storages may be."""

    def storage(self, key: str, dtype: torch.dtype, count: int) -> Tensor:
        raise Refusal(f"storage {key!r:.50} is named where none can be")


def elements(data: mmap.mmap, offset: int, dtype: torch.dtype, count: int) -> Tensor:
    """`count` elements at `offset`, without a copy where they are aligned."""
    if not count:
        return torch.empty(0, dtype=dtype)
    if offset % dtype.itemsize:
        return torch.frombuffer(bytearray(data[offset : offset + count * dtype.itemsize]), dtype=dtype)
    return torch.frombuffer(data, dtype=dtype, count=count, offset=offset)


def mapped(path: Path) -> mmap.mmap:
    """The file's bytes; what is written to them stays in memory. Raises Refusal."""
    try:
        with path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    except (OSError, ValueError) as error:
        raise Refusal(f"it cannot be read: {getattr(error, 'strerror', None) or error}") from None


def read_with(path: Path, run: Callable[[io.BytesIO, Source], Any], verify: bool) -> Any:
    """What `run` makes of the pickle and the storages of a file. Raises Refusal."""
    data = mapped(path)
    if data[:4] == ZIP:
        archive = ZipArchive(path, data, verify)
        return run(io.BytesIO(archive.read("data.pkl")), archive)
    if data[257:262] == TAR:
        raise Refusal("it is a tar archive, as torch before 0.2 wrote them; save it again with a newer one")
    if data[:1] != b"\x80":
        raise Refusal("it is no torch file: neither a zip archive nor a pickle")
    stream = io.BytesIO(data[:LARGEST_PICKLE])
    if run(stream, Nothing()) != MAGIC:
        raise Refusal("it is a pickle, but not one of torch.save's")
    run(stream, Nothing())  # the format's version
    run(stream, Nothing())  # the writer's number sizes
    start, counted = stream.tell(), Counted(len(data))
    run(stream, counted)
    keys = run(stream, Nothing())
    if not isinstance(keys, list) or sorted(map(str, keys)) != sorted(counted.counts):
        raise Refusal("it is damaged: its storages are not those that its tensors want")
    legacy = LegacyArchive(data, keys, stream.tell(), counted.counts)
    stream.seek(start)
    return run(stream, legacy)


MAGIC = 0x1950A86A20F9469CFC6C
