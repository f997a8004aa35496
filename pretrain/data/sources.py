"""Where images lie: folders, WebDataset tar shards and idx files, told apart by `open_images`.

Also what sources of every modality share: walks, splits, labels, and stand-ins for broken samples.
"""

from __future__ import annotations

import glob
import gzip
import io
import math
import os
import re
import tarfile
import zlib
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import BinaryIO, Protocol, TypeVar

import numpy as np
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from pretrain.data.names import FolderLabels, Names, digest

_SUFFIXES = "jpg jpeg png bmp gif webp tif tiff ppm pgm jp2 avif"
_EXTENSIONS = tuple(f".{name}" for name in _SUFFIXES.split())
_FORMATS = ("JPEG", "PNG", "BMP", "DIB", "GIF", "WEBP", "TIFF", "PPM", "JPEG2000", "AVIF")
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")
_COMPRESSED_NAME = re.compile(r".*\.(tgz|tar\.\w+)")
_IDX_IMAGES = re.compile(r"(train|t10k)-images[-.]idx3-ubyte(\.gz)?")
_OPEN_SHARDS = 64
HELD_OUT = ("test", "val", "valid", "validation", "dev")
_ATTEMPTS = 16
_REPLACEMENT_STREAM = 0x7265706C

Read = TypeVar("Read")


class DataError(ValueError):
    """Data that cannot be used; the message is one clear line for the user."""


@dataclass(frozen=True)
class Sample:
    """What every modality's data set yields. `index` is the one asked for, also when another file stood in for it."""

    inputs: Tensor
    """uint8 (channels, size, size) of an image, float32 (samples,) of a waveform, int64 (tokens,) of text."""
    epoch: int
    index: int
    failures: tuple[str, ...] = ()
    """`name: reason` of every file that could not be used on the way."""


class ImageSource(Protocol):
    """Numbered images, wherever they lie. Picklable; safe to fork or spawn with."""

    labels: np.ndarray | None
    """int64 (n,), indices into `classes`; None if unlabelled."""
    classes: list[str]
    """Sorted class names; empty if unlabelled."""

    def __len__(self) -> int: ...

    def fingerprint(self) -> str:
        """Tells these images from others, wherever they lie, without decoding them."""

    def name(self, index: int) -> str:
        """Where image `index` lies, for logs: a path, `shard.tar:member` or `file.gz[17]`."""

    def read(self, index: int) -> Image.Image:
        """Open image `index`, not necessarily decoded yet; may raise any decoding error."""


class FolderSource:
    """Images at any depth below `root`, in byte order of their names at each level.

    Labelled by first-level folder if there are two or more of them with images and no image beside them.
    """

    def __init__(self, root: str) -> None:
        self._root = root
        self._names = Names()
        labels = FolderLabels()
        for name in walk(root, _EXTENSIONS):
            self._names.append(name)
            labels.append(name)
        self.labels, self.classes = labels.finish()

    def __len__(self) -> int:
        return len(self._names)

    def fingerprint(self) -> str:
        return digest(*self._names.packed)

    def name(self, index: int) -> str:
        return os.path.join(self._root, self._names[index])

    def read(self, index: int) -> Image.Image:
        return _open(self.name(index))


class TarSource:
    """Images in uncompressed tar shards, indexed once and then read by position.

    Labelled if every image has a sibling `.cls` member of the same stem that holds a number.
    Raises `DataError` for a shard that is missing, compressed, truncated or damaged, or if none holds images.
    """

    def __init__(self, shards: Sequence[str]) -> None:
        self._shards = list(shards)
        self._names = Names()
        self._handles: dict[int, io.FileIO] = {}
        places, labels = array("q"), array("q")
        for number, shard in enumerate(self._shards):
            for name, offset, size, label in _index_shard(shard):
                self._names.append(name)
                places.extend((number, offset, size))
                if label is not None:
                    labels.append(label)
        if not self._names:
            raise DataError(f"no images in {len(self._shards)} tar shard(s), the first is {self._shards[0]}")
        self._places = np.array(places, np.int64).reshape(-1, 3)
        self.labels: np.ndarray | None = None
        self.classes: list[str] = []
        if len(labels) == len(self._names):
            self.labels = np.array(labels, np.int64)
            self.classes = [str(label) for label in range(max(labels) + 1)]

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_handles": {}}

    def __len__(self) -> int:
        return len(self._names)

    def fingerprint(self) -> str:
        return digest(*self._names.packed, self._places)

    def name(self, index: int) -> str:
        return f"{self._shards[self._places[index, 0]]}:{self._names[index]}"

    def read(self, index: int) -> Image.Image:
        shard, offset, size = self._places[index].tolist()
        # pread leaves the file position alone, which forked workers share.
        data = os.pread(self._handle(shard).fileno(), size, offset)
        if len(data) != size:
            raise OSError("the shard became shorter since it was indexed")
        return _open(io.BytesIO(data))

    def _handle(self, shard: int) -> io.FileIO:
        handle = self._handles.pop(shard, None) or io.FileIO(self._shards[shard])
        if len(self._handles) >= _OPEN_SHARDS:
            oldest = next(iter(self._handles))
            self._handles.pop(oldest).close()
        self._handles[shard] = handle
        return handle


class IdxSource:
    """Grey images in an idx3-ubyte file, plain (memory-mapped) or .gz, as of MNIST and Fashion-MNIST.

    Labelled if the idx1-ubyte file of the same name lies beside it.
    Raises `DataError` if a file is unreadable, of another kind or size, or holds no images.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._images = _read_idx(path, dims=3)
        if 0 in self._images.shape:
            raise DataError(f"no images in {path}: its header says {self._images.shape}")
        self.labels: np.ndarray | None = None
        self.classes: list[str] = []
        folder, file = os.path.split(path)
        plain = re.sub(r"images([-.])idx3", r"labels\1idx1", file).removesuffix(".gz")
        for labels_file in (plain, plain + ".gz"):
            labels_path = os.path.join(folder, labels_file)
            if plain != file.removesuffix(".gz") and os.path.isfile(labels_path):
                self.labels = _read_idx(labels_path, dims=1).astype(np.int64)
                if len(self.labels) != len(self):
                    raise DataError(f"{labels_path} has {len(self.labels)} labels for {len(self)} images")
                self.classes = [str(label) for label in range(max(10, self.labels.max() + 1))]
                break

    def __reduce__(self) -> tuple:
        return IdxSource, (self._path,)

    def __len__(self) -> int:
        return len(self._images)

    def fingerprint(self) -> str:
        return digest(np.array(self._images.shape), self._images[:: -(-len(self) // 64)])

    def name(self, index: int) -> str:
        return f"{self._path}[{index}]"

    def read(self, index: int) -> Image.Image:
        return Image.fromarray(self._images[index])


def open_images(path: str, split: str = "train") -> ImageSource:
    """The images of `split` at `path`, whose layout is told from what lies there.

    `path` is a folder (of class folders, of images at any depth, of tar shards or of idx files), one .tar,
    a glob or brace pattern of tars (`dir/shard-{000..010}.tar`), or one idx3-ubyte file. A subfolder named
    like the split is used if there is one; a test split may be called test, val, valid or validation.

    Raises `DataError` if there is nothing there, nothing usable, or more than one kind of data.
    """
    path = os.path.expanduser(path)
    if os.path.isfile(path):
        return _open_file(path)
    if not os.path.isdir(path):
        if re.search(r"[*?\[{]", path):
            return TarSource(_expand(path))
        raise DataError(f"{path} does not exist: give a folder of images, tar shards or idx files")
    folder = split_folder(path, split)
    files = [entry.name for entry in listing(folder) if entry.is_file()]
    tars = [os.path.join(folder, file) for file in files if file.endswith(".tar")]
    idx = [file for file in files if _IDX_IMAGES.fullmatch(file)]
    images = FolderSource(folder)
    found = {"image files": len(images), "tar shards": len(tars), "idx files": len(idx)}
    found = {kind: count for kind, count in found.items() if count}
    if not found:
        packed = next((file for file in files if _COMPRESSED_NAME.fullmatch(file)), None)
        hint = f"unpack {packed} to .tar" if packed else "give image files, .tar or idx files"
        raise DataError(f"no images in {folder}: {hint}")
    if len(found) > 1:
        mixture = " and ".join(f"{count} {kind}" for kind, count in found.items())
        raise DataError(f"{folder} mixes {mixture}: keep one kind in a folder")
    if idx:
        prefix = "train" if split == "train" else "t10k"
        file = next((file for file in idx if file.startswith(prefix)), None)
        if file is None:
            raise DataError(f"no {prefix}-images-idx3-ubyte[.gz] in {folder}, which the {split} split needs")
        return IdxSource(os.path.join(folder, file))
    return TarSource(tars) if tars else images


def read_or_replace(
    read: Callable[[int], Read],
    name: Callable[[int], str],
    index: int,
    *,
    instead: Sequence[int] | np.ndarray,
    seed: int,
    kind: str,
) -> tuple[Read, tuple[str, ...]]:
    """`read(index)`, or if that raises the same of one of `instead`, chosen by a hash of (seed, index, attempt).

    Also returns `name: reason` of every sample that failed. Raises `DataError` after 16 failures; `kind` is its noun.
    """
    failures: list[str] = []
    for attempt in range(_ATTEMPTS):
        chosen = index
        if attempt:
            sequence = np.random.SeedSequence([_REPLACEMENT_STREAM, seed, index, attempt])
            place = int(sequence.generate_state(1, np.uint64)[0]) % len(instead)
            chosen = int(instead[place] if instead[place] != index else instead[(place + 1) % len(instead)])
        try:
            return read(chosen), tuple(failures)
        except Exception as error:  # decoders raise almost anything, even SyntaxError
            reason = " ".join(str(error).split()) or type(error).__name__
            failures.append(f"{name(chosen)}: {reason}")
    raise DataError(f"{_ATTEMPTS} {kind} in a row could not be decoded, the last is {failures[-1]}")


def in_one_line(error: DataError) -> DataError:
    """Without the traceback that a loader's worker puts before the message."""
    return DataError(re.sub(r"^[\w.]*DataError: ", "", str(error).strip().splitlines()[-1]))


def _open(file: str | BinaryIO) -> Image.Image:
    try:
        return Image.open(file, formats=_FORMATS)
    except UnidentifiedImageError:  # its message holds the address of the file object
        raise OSError("not an image, or an unknown format") from None


def listing(folder: str) -> list[os.DirEntry]:
    """What is visible in a folder, in byte order of the names. Raises `DataError` if it cannot be listed."""
    try:
        with os.scandir(folder) as entries:
            visible = [entry for entry in entries if not entry.name.startswith(".")]
    except OSError as error:
        raise DataError(f"cannot list {folder}: {error.strerror}") from error
    return sorted(visible, key=lambda entry: os.fsencode(entry.name))


def walk(
    folder: str, extensions: tuple[str, ...], prefix: str = "", parents: tuple[os.stat_result, ...] = ()
) -> Iterator[str]:
    """Paths, relative to `folder`, of the visible files at any depth with one of `extensions` (lower case), in byte
    order of their names at each level. Links are followed. Raises `DataError` for a folder that cannot be listed."""
    status = os.stat(folder)
    if any(os.path.samestat(status, parent) for parent in parents):
        return  # a symlink back up the tree
    for entry in listing(folder):
        if entry.is_dir():
            yield from walk(entry.path, extensions, f"{prefix}{entry.name}/", (*parents, status))
        elif entry.name.lower().endswith(extensions) and entry.is_file():
            yield prefix + entry.name


def _is_image(name: str) -> bool:
    return name.lower().endswith(_EXTENSIONS)


def split_names(split: str) -> tuple[str, ...]:
    """What the split may be called, the best name first."""
    return tuple(dict.fromkeys((split, *HELD_OUT))) if split in HELD_OUT else (split,)


def split_folder(path: str, split: str) -> str:
    """The folder in `path` that is called like the split, or `path` if it has no splits.

    Raises `DataError` if it has others only.
    """
    wanted = split_names(split)
    folders = [entry.name for entry in listing(path) if entry.is_dir()]
    inside = os.path.basename(os.path.normpath(path)) in wanted
    found = next((name for name in wanted if name in folders), None)
    if found and not (inside and len(folders) > 1):  # within train/, a class may be called "train" too
        return os.path.join(path, found)
    other = next((name for name in ("train", *HELD_OUT) if name in folders and name not in wanted), None)
    if other and not found and not inside:
        raise DataError(f"{path} has a folder {other} but none for the {split} split: {', '.join(wanted)}")
    return path


def _open_file(path: str) -> ImageSource:
    if path.endswith(".tar"):
        return TarSource([path])
    if _COMPRESSED_NAME.fullmatch(path):
        raise DataError(f"{path} is compressed and cannot be read at random: unpack it to .tar")
    if _is_image(path):
        raise DataError(f"{path} is one image: give the folder that holds it")
    return IdxSource(path)


def _expand(pattern: str) -> list[str]:
    shards: dict[str, None] = {}
    for part in _expand_braces(pattern):
        matches = sorted(glob.glob(part))
        if not matches:
            raise DataError(f"no file matches {part}" + (f", part of {pattern}" if part != pattern else ""))
        shards |= dict.fromkeys(matches)
    stranger = next((shard for shard in shards if not shard.endswith(".tar")), None)
    if stranger or not shards:
        raise DataError(f"{pattern} has to give .tar files, not {stranger or 'nothing'}")
    return list(shards)


def _expand_braces(pattern: str) -> list[str]:
    brace = re.search(r"\{([^{}]+)\}", pattern)
    if not brace:
        return [pattern]
    if span := re.fullmatch(r"(\d+)\.\.(\d+)", brace[1]):
        first, last = span.groups()
        choices = [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    else:
        choices = brace[1].split(",")
    head, tail = pattern[: brace.start()], _expand_braces(pattern[brace.end() :])
    return [head + choice + rest for choice in choices for rest in tail]


def _index_shard(path: str) -> Iterator[tuple[str, int, int, int | None]]:
    """Yield (name, offset, size, label) of every image in a tar."""
    try:
        with open(path, "rb") as file:
            if file.read(8).startswith(_COMPRESSED):
                raise DataError(f"{path} is compressed and cannot be read at random: unpack it to .tar")
            file.seek(0)
            with tarfile.open(fileobj=file, mode="r:") as tar:
                members = [member for member in tar if member.isfile() and not _is_hidden(member.name)]
                end = tar.offset
            file.seek(end)
            # tarfile takes a bad header for the end.
            if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise DataError(f"tar shard {path} is truncated or damaged at byte {end}: fetch it again")
            labels = {}
            for member in members:
                stem, extension = os.path.splitext(member.name)
                if extension == ".cls":
                    text = os.pread(file.fileno(), min(member.size, 32), member.offset_data).strip()
                    labels[stem] = int(text) if re.fullmatch(rb"\d{1,6}", text) else None
    except (OSError, tarfile.TarError) as error:
        raise DataError(f"tar shard {path} is unreadable, truncated or damaged: {error}") from error
    for member in members:
        if _is_image(member.name):
            label = labels.get(os.path.splitext(member.name)[0])
            yield member.name.removeprefix("./"), member.offset_data, member.size, label


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") for part in name.removeprefix("./").split("/"))


def _read_idx(path: str, dims: int) -> np.ndarray:
    """Read an idx file of uint8 with `dims` axes."""
    try:
        if path.endswith(".gz"):
            with gzip.open(path) as file:
                raw = np.frombuffer(file.read(), np.uint8)
        else:
            raw = np.memmap(path, np.uint8, mode="r")
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise DataError(f"cannot read idx file {path}: {error}") from error
    magic, header = bytes((0, 0, 8, dims)), 4 + 4 * dims
    if raw[:4].tobytes() != magic:
        raise DataError(f"{path} is no idx{dims}-ubyte file: begins {raw[:4].tobytes()!r}, not {magic!r}")
    shape = np.frombuffer(raw[4 : header if raw.size >= header else 4].tobytes(), ">u4").tolist()
    if raw.size != header + math.prod(shape):
        raise DataError(f"idx file {path} is truncated or damaged: {raw.size} bytes do not fit shape {shape}")
    return raw[header:].reshape(shape)
