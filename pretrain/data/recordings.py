"""Where recordings lie: folders of audio files and wav2vec manifests, told apart by `open_audio`.

python -m pretrain.data.recordings FOLDER OUT.tsv    writes the manifest of a folder
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import itertools
import json
import math
import os
import re
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import soundfile
import soxr
from numpy.typing import NDArray

from models.config import RATE
from pretrain.data.fetch import cache_folder
from pretrain.data.names import FolderLabels, Names, digest
from pretrain.data.sources import HELD_OUT, DataError, listing, split_folder, split_names, walk
from pretrain.files import write_atomically
from pretrain.progress import Progress

EXTENSIONS = (".wav", ".flac", ".ogg", ".opus", ".mp3")
_KINDS = "wav, flac, ogg, opus or mp3"
_MARGIN = 1024  # 16 kHz samples; 133 is as far as soxr's filter was seen to reach, at 8 kHz
# An MP3 frame may use up to 511 bytes of the frames before it, which are 21 of 576 samples at the lowest bit rate.
_MP3_PREROLL = 16_384
# Vorbis: a seek into the last page, of 255 blocks of 1024 samples at most, misses by what that page was cut short.
_VORBIS_PAGE = 1 << 18
_THREADS, _CHUNK = 16, 64
_MOST_FRAMES = 1 << 48  # times a rate still is an int64
_LONG_SCAN = 1000  # files
_PROBES = 32
_STDERR = threading.Lock()


class _Header(NamedTuple):
    """What a file says of itself, as cached: `size` in bytes and `changed` in ns tell whether it still holds."""

    size: int
    changed: int
    frames: int
    rate: int
    reason: str
    """Why it cannot be used; empty if it can."""


@dataclass(frozen=True)
class _Clip:
    name: str
    frames: int
    rate: int
    below: str
    """The name within its split, whose first folder is the class."""


class _Found(NamedTuple):
    root: str
    clips: list[_Clip]
    skipped: list[str]


class AudioSource:
    """Numbered recordings, read by part as mono at 16 kHz. Picklable; safe to fork or spawn with.

    Labelled by first-level folder if there are two or more of them with recordings and none lies beside them.
    Raises `DataError` if there are none at all.
    """

    lengths: NDArray[np.int64]
    """int64 (n,), samples at 16 kHz."""
    labels: np.ndarray | None
    """int64 (n,), indices into `classes`; None if unlabelled."""
    classes: list[str]
    """Sorted class names; empty if unlabelled."""
    skipped: list[str]
    """`name: reason` of every file that is none of the n: it cannot be opened or holds no samples."""

    def __init__(self, root: str, clips: Iterable[_Clip], skipped: list[str]) -> None:
        self._root, self.skipped = root, skipped
        self._names, labels, numbers = Names(), FolderLabels(), []
        for clip in clips:
            self._names.append(clip.name)
            labels.append(clip.below)
            numbers.append((clip.frames, clip.rate))
        if not numbers:
            count = f"none of {len(skipped)} audio files can be read, the first is {skipped[0]}" if skipped else ""
            raise DataError(f"{root}: {count or 'no recordings'}")
        frames, self._rates = np.array(numbers, np.int64).T
        self.lengths = frames * RATE // self._rates
        self.labels, self.classes = labels.finish()

    def __len__(self) -> int:
        return len(self._names)

    def fingerprint(self) -> str:
        """Tells these recordings from others, wherever they lie."""
        return digest(*self._names.packed, self.lengths, self._rates)

    def name(self, index: int) -> str:
        """The path of recording `index`."""
        return os.path.join(self._root, self._names[index])

    def read(self, index: int, start: int, count: int) -> NDArray[np.float32]:
        """float32 (count,): the samples from `start` on, at 16 kHz, the mean of all channels.

        Fewer if the file ends before. Decodes only this part. May raise any decoding error, and `DataError` if the
        file's rate is another than its manifest or an earlier look said.
        """
        path = self.name(index)
        quiet = _quiet() if path.lower().endswith(".mp3") else contextlib.nullcontext()
        with quiet, soundfile.SoundFile(os.fsencode(path)) as file:
            rate, expected = file.samplerate, int(self._rates[index])
            if rate != expected:
                raise DataError(f"its rate is {rate} Hz, not {expected}: write its manifest anew")
            origin, first, stop = start, start, start + count
            if rate != RATE:
                grid = RATE // math.gcd(rate, RATE)  # where a sample at 16 kHz meets one of the file
                origin = max(0, start - _MARGIN) // grid * grid
                first = origin * rate // RATE
                stop = -(-(start + count + _MARGIN) * rate // RATE)
            seek = first
            if file.format == "MP3":
                seek = max(0, first - _MP3_PREROLL)
            elif file.subtype == "VORBIS":
                seek = max(0, min(first, file.frames - _VORBIS_PAGE))
            file.seek(seek)
            frames = file.read(stop - seek, dtype="float32", always_2d=True)[first - seek :]
        mono = (
            functools.reduce(np.add, frames.T) / frames.shape[1]
        )  # numpy's mean over so short an axis takes 20 ns each
        if rate != RATE and len(mono):
            mono = soxr.resample(mono, rate, RATE)
        return mono[start - origin :][:count]


def open_audio(path: str, split: str = "train", *, progress: bool = True) -> AudioSource:
    """The recordings of `split` at `path`, whose layout is told from what lies there.

    `path` is a folder with audio files at any depth; a manifest, whose first line is a folder and every other one
    `path below it <TAB> number of frames`; or a folder with a manifest a split (train.tsv). A subfolder named like the
    split is used if there is one, or all whose names begin with it, as LibriSpeech's train-clean-100 and
    train-other-500; a test split may also be called val, valid, validation or dev.

    Several of these are joined by `+`, and their recordings follow one another. Lengths come from the files' headers,
    once: they are cached. Raises `DataError` if nothing there can be used.
    """
    path = os.path.expanduser(path)
    paths = [path] if os.path.exists(path) else path.split("+")
    if not all(paths):
        raise DataError(f"data.path={path}: there is nothing before or behind a +")
    found = [_find(os.path.expanduser(one), split, progress) for one in paths]
    if len(found) == 1:
        return AudioSource(*found[0])
    root = os.path.commonpath([os.path.abspath(one.root) for one in found])
    below = [os.path.relpath(one.root, root) for one in found]  # so that their names stay when all are moved
    clips = (
        replace(clip, name=os.path.normpath(os.path.join(folder, clip.name)))
        for folder, one in zip(below, found, strict=True)
        for clip in one.clips
    )
    return AudioSource(root, clips, [reason for one in found for reason in one.skipped])


def _find(path: str, split: str, progress: bool) -> _Found:
    if os.path.isfile(path):
        if path.lower().endswith(EXTENSIONS):
            raise DataError(f"{path} is one recording: give the folder that holds it")
        return _open_manifest(path, progress)
    if not os.path.isdir(path):
        raise DataError(f"{path} does not exist: give a folder of {_KINDS} files or a manifest (.tsv)")
    if manifest := _split_manifest(path, split):
        return _open_manifest(manifest, progress)
    clips: list[_Clip] = []
    skipped: list[str] = []
    root, *subsets = split_folders(path, split)
    for subset in subsets or [""]:
        folder = os.path.join(root, subset) if subset else root
        names = list(walk(folder, EXTENSIONS))
        _sort_out(names, _scan(folder, names, folder, progress), folder, subset, clips, skipped)
    if not clips and not skipped:
        raise DataError(f"no recordings in {root}: give {_KINDS} files or a manifest (.tsv)")
    return _Found(root, clips, skipped)


def open_recordings(root: str, names: Sequence[str], key: str, *, progress: bool = True) -> AudioSource:
    """The recordings of these names below `root`; their lengths are cached under `key`, a path that tells which they
    are. Raises `DataError` if none can be used."""
    clips: list[_Clip] = []
    skipped: list[str] = []
    _sort_out(names, _scan(root, names, key, progress), root, "", clips, skipped)
    return AudioSource(root, clips, skipped)


def write_manifest(folder: str, out: str, *, progress: bool = True) -> AudioSource:
    """Write the manifest of all recordings below `folder` to the file `out`; returns what it lists.

    Raises `DataError` if there are none or `out` cannot be written.
    """
    if not os.path.isdir(folder):
        raise DataError(f"{folder} is no folder")
    root = os.path.abspath(folder)
    names = list(walk(root, EXTENSIONS))
    headers = [
        header._replace(reason="its name holds a tab or line break") if set("\t\r\n") & set(name) else header
        for name, header in zip(names, _scan(root, names, root, progress), strict=True)
    ]
    clips: list[_Clip] = []
    skipped: list[str] = []
    _sort_out(names, headers, root, "", clips, skipped)
    source = AudioSource(root, clips, skipped)
    lines = [root, *(f"{clip.name}\t{clip.frames}" for clip in clips)]
    try:
        write_atomically(out, os.fsencode("".join(f"{line}\n" for line in lines)))
    except OSError as error:
        raise DataError(f"cannot write {out}: {error.strerror}") from error
    return source


def _split_manifest(folder: str, split: str) -> str | None:
    there = [f"{name}.tsv" for name in ("train", *HELD_OUT)]
    there = [name for name in there if _is_manifest(os.path.join(folder, name))]
    wanted = [f"{name}.tsv" for name in split_names(split)]
    for name in wanted:
        if name in there or _is_manifest(os.path.join(folder, name)):
            return os.path.join(folder, name)
    if there:
        raise DataError(f"{folder} has {', '.join(there)} but none for the {split} split: {', '.join(wanted)}")
    return None


def _is_manifest(path: str) -> bool:
    """Other tables have tabs in their first line, as Common Voice's train.tsv."""
    with contextlib.suppress(OSError), open(path, "rb") as file:
        first = file.readline(1 << 16)
        return bool(first.strip()) and b"\t" not in first
    return False


def split_folders(path: str, split: str) -> list[str]:
    """The root of the split, and then its subsets there if it has some. Raises `DataError` if it has others only."""
    names = [entry.name for entry in listing(path) if entry.is_dir()]
    wanted = split_names(split)
    subsets = [name for name in names if name.partition("-")[0] in ("train", *HELD_OUT) and "-" in name]
    if set(wanted) & set(names) or not (len(subsets) > 1 or subsets == names != []):
        return [split_folder(path, split)]
    for prefix in wanted:
        if chosen := [name for name in subsets if name.startswith(f"{prefix}-")]:
            return [path, *chosen]
    raise DataError(f"{path} has {', '.join(subsets)} but nothing for the {split} split: {'-*, '.join(wanted)}-*")


def _open_manifest(path: str, progress: bool) -> _Found:
    root, names, frames = read_manifest(path)
    probes = [names[i] for i in np.unique(np.linspace(0, len(names) - 1, _PROBES).astype(int))]
    with _quiet():
        found = [_examine(os.path.join(root, name)) for name in probes]
    if all(header.reason for header in found):
        first = f"{os.path.join(root, probes[0])}: {found[0].reason}"
        raise DataError(f"{path}: none of the {len(probes)} files looked at can be read, the first is {first}")
    if all(header.rate == RATE for header in found if not header.reason):
        headers = [_Header(0, 0, count, RATE, "" if count else "no samples") for count in frames]
    else:  # the manifest counts frames but does not say how long one is
        headers = _scan(root, names, path, progress)
    clips: list[_Clip] = []
    skipped: list[str] = []
    _sort_out(names, headers, root, "", clips, skipped)
    return _Found(root, clips, skipped)


def read_manifest(path: str) -> tuple[str, list[str], list[int]]:
    """The root, and each recording's path below it and number of frames."""
    try:
        with open(path, "rb") as file:
            root = os.fsdecode(file.readline(1 << 16)).rstrip("\r\n")
            if not root or "\t" in root or not os.path.isdir(os.path.join(os.path.dirname(path), root)):
                raise DataError(f"{path}, line 1: {_shown(root)} should be the folder that holds the recordings")
            names, frames = [], []
            for number, line in enumerate(file, start=2):
                name, tab, count = os.fsdecode(line).rstrip("\r\n").partition("\t")
                if not (name and tab and re.fullmatch("[0-9]{1,15}", count) and int(count) < _MOST_FRAMES):
                    shown = _shown(os.fsdecode(line).rstrip("\r\n"))
                    raise DataError(f"{path}, line {number}: {shown} should be a path, a tab and the number of frames")
                names.append(name)
                frames.append(int(count))
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    if not names:
        raise DataError(f"{path} lists no recordings: after the folder it needs lines of path, tab, number of frames")
    return os.path.join(os.path.dirname(path), root), names, frames


def _shown(line: str) -> str:
    return ascii(line[:80]) + ("..." if len(line) > 80 else "")


def _sort_out(
    names: Iterable[str], headers: Iterable[_Header], folder: str, subset: str, clips: list[_Clip], skipped: list[str]
) -> None:
    """Add the files of `folder`, which may be a subset below the source's root, to the clips or to the skipped."""
    for name, header in zip(names, headers, strict=True):
        if header.reason:
            skipped.append(f"{os.path.join(folder, name)}: {header.reason}")
        else:
            clips.append(_Clip(os.path.join(subset, name), header.frames, header.rate, name))


def _scan(folder: str, names: Sequence[str], key: str, progress: bool) -> list[_Header]:
    """The header of each file, of the cache called `key` where size and time of change are what they were."""
    digest = hashlib.sha256(os.fsencode(os.path.abspath(key))).hexdigest()
    cache = cache_folder() / "durations" / f"{digest[:32]}.json"
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # without a cache all goes on, only slower
            cache.parent.mkdir(parents=True, exist_ok=True)
            lock = stack.enter_context(cache.with_suffix(".lock").open("w"))
            fcntl.flock(lock, fcntl.LOCK_EX)  # other ranks wait here, and find it done
        known = _load(str(cache))

        def examine(chunk: Sequence[str]) -> list[_Header]:
            return [_examine(os.path.join(folder, name), known.get(name)) for name in chunk]

        chunks = [names[i : i + _CHUNK] for i in range(0, len(names), _CHUNK)]
        headers: list[_Header] = []
        label = f"lengths of recordings in {folder}" if progress and len(names) >= _LONG_SCAN else ""
        with Progress(label, len(names)) as told, _quiet(), ThreadPoolExecutor(_THREADS) as pool:
            for found in pool.map(examine, chunks):
                headers += found
                told.advance(len(found))
        fresh = dict(zip(names, headers, strict=True))
        if fresh != known:
            with contextlib.suppress(OSError):
                write_atomically(cache, json.dumps(fresh))
    return headers


def _examine(path: str, known: _Header | None = None) -> _Header:
    try:
        status = os.stat(path)
    except OSError as error:
        return _Header(0, 0, 0, 0, error.strerror or "cannot be opened")
    mark = status.st_size, status.st_mtime_ns
    if known and known[:2] == mark and not known.reason:
        return known
    if not status.st_size:
        return _Header(*mark, 0, 0, "an empty file")
    try:
        with soundfile.SoundFile(os.fsencode(path)) as file:
            rate, frames = file.samplerate, file.frames
            if file.format == "MP3":
                frames = _mp3_frames(file)
    except Exception as error:  # a reason to skip the file, whatever it is
        reason = getattr(error, "error_string", None) or str(error) or type(error).__name__
        return _Header(*mark, 0, 0, " ".join(str(reason).split()))
    if not 0 < frames < _MOST_FRAMES:
        return _Header(*mark, 0, 0, "no samples" if frames < 1 else "its header does not say how long it is")
    return _Header(*mark, frames, rate, "")


def _mp3_frames(file: soundfile.SoundFile) -> int:
    """Many MP3 files do not hold their length, and libsndfile guesses it from their size."""
    start = max(0, file.frames - file.samplerate)
    file.seek(start)
    rest = len(file.read())
    if rest or not start:
        return start + rest
    file.seek(0)  # a bad guess, or a truncated file: count
    count = 0
    while read := len(file.read(1 << 20)):
        count += read
    return count


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep libmpg123 from writing to stderr: it takes what it meets after a seek, and makes up for, for errors."""
    with _STDERR, contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # a process may have no stderr
            stderr = os.dup(2)
            stack.callback(os.close, stderr)
            null = os.open(os.devnull, os.O_WRONLY)
            stack.callback(os.close, null)
            sys.stderr.flush()
            os.dup2(null, 2)
            stack.callback(os.dup2, stderr, 2)
        yield


def _load(cache: str) -> dict[str, _Header]:
    try:
        with open(cache, "rb") as file:
            headers = {name: _Header(*fields) for name, fields in json.load(file).items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}  # none yet, or damaged
    numbers = itertools.chain.from_iterable(header[:4] for header in headers.values())
    return headers if all(type(number) is int for number in numbers) else {}


def _main(arguments: list[str]) -> None:
    if len(arguments) != 2:
        sys.exit("usage: python -m pretrain.data.recordings FOLDER OUT.tsv")
    folder, out = map(os.path.expanduser, arguments)
    source = write_manifest(folder, out)
    print(f"{out}: {len(source):,} recordings, {source.lengths.sum() / RATE / 3600:.1f} h")
    if source.skipped:
        print(f"left out {len(source.skipped):,} that cannot be read, the first is {source.skipped[0]}")


if __name__ == "__main__":
    try:
        _main(sys.argv[1:])
    except DataError as error:
        sys.exit(f"error: {error}")
