"""Data sets known by name: fetched once through the system's package manager, checked, and cached.

python -m pretrain.data.fetch fashion_mnist
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import soundfile

from pretrain.data import amazon_queen
from pretrain.data.sources import DataError


@dataclass(frozen=True)
class DebianData:
    """A data set made of Debian packages, taken apart without installing them."""

    packages: tuple[str, ...]
    prepare: Callable[[Path, Path], None]
    """Makes the data set's folder, the second, from the one with the unpacked packages."""
    sha256: dict[str, str]
    """File or folder of the data set -> digest. Of what was prepared, not of the packages: those differ between
    releases of the distribution that carry the same data."""
    by_hand: str
    """What to do where it cannot be fetched."""


def _fashion_mnist(unpacked: Path, target: Path) -> None:
    (unpacked / "usr/share/datasets/fashion-mnist").rename(target)


# A line of a Lua script: the id and speaker of a clip, or the text spoken in the one before.
_DIALOG = re.compile(r'dialog(Id|Str)\s*\(\s*"((?:[^"\\]|\\.)*)"\s*(?:,\s*"([^"]*)")?')


def _fillets(unpacked: Path, target: Path) -> None:
    """Czech and Dutch speech of two speakers each, one class folder a speaker, and what is said in transcripts.tsv.

    A level of the game is all in train or all in test, the same in both languages; test is 13 % of the speech.
    """
    game = unpacked / "usr/share/games/fillets-ng"
    lines = []
    for script in sorted(game.glob("script/*/dialogs_*.lua")):
        level, language = script.parent.name, script.stem.removeprefix("dialogs_")
        split = "test" if hashlib.sha256(level.encode()).digest()[0] < 26 else "train"
        clip = speaker = ""
        for kind, text, font in _DIALOG.findall(script.read_text("utf-8")):
            if kind == "Id":
                clip, speaker = text, font.removeprefix("font_")
                continue
            audio = game / "sound" / level / language / f"{clip}.ogg"
            if speaker in ("small", "big") and audio.is_file() and soundfile.info(audio).frames:
                file = f"{split}/{language}_{speaker}/{level}__{clip}.ogg"
                (target / file).parent.mkdir(parents=True, exist_ok=True)
                audio.rename(target / file)
                spoken = " ".join(re.sub(r"\\(.)", r"\1", text).split())
                lines.append(f"{file}\t{language}\t{speaker}\t{spoken}\n")
    (target / "transcripts.tsv").write_text("".join(sorted(lines)), "utf-8")


_OWN_RECORDINGS = "give data.path a folder of your own recordings (wav, flac, ogg, opus or mp3)"

KNOWN = {
    "fashion_mnist": DebianData(
        packages=("dataset-fashion-mnist",),
        prepare=_fashion_mnist,
        sha256={
            "train-images-idx3-ubyte.gz": "b0564c3eedabfbf835052cff8503ea422014ce006caf5b757f851416ee8300c7",
            "train-labels-idx1-ubyte.gz": "0ae29f65d86684f32d1b9c85147786c547b9c6aebcaf235f0400a0cce308b056",
            "t10k-images-idx3-ubyte.gz": "cc1d090a38ace84dfa1aa66e3ada7c336ef481a96936906477e6dd344da56eaa",
            "t10k-labels-idx1-ubyte.gz": "8d3605d196f4be44669e46906da9733c8131fef761fdbfec72c424d5222f1a05",
        },
        by_hand="take usr/share/datasets/fashion-mnist out of the Debian package dataset-fashion-mnist elsewhere and "
        "give data.path that folder",
    ),
    "fillets": DebianData(  # GPL-2
        packages=("fillets-ng-data", "fillets-ng-data-cs", "fillets-ng-data-nl"),
        prepare=_fillets,
        sha256={
            "train": "e675387b5753b34126eb783f8553fe8df841e548b2de47c5acf8e374e0733f82",
            "test": "d36ea8c31d3af5e6e4dee13e284cd1fd971f92f774818504710f36fc2efbf863",
            "transcripts.tsv": "a19431cf9cbc42ed11aa1fd8be0e1743f6f2cbddf1ef656ffaad2d9c846b342d",
        },
        by_hand=_OWN_RECORDINGS,
    ),
    "amazon_queen": DebianData(  # free to copy with its readme, which is kept beside the clips
        packages=("flight-of-the-amazon-queen",),
        prepare=amazon_queen.prepare,
        sha256={
            "train": "c7b749aaa78b923d36f89d754b77ceffb54145c03bba9bc889aebfb71b0acea8",
            "test": "2340c1d82d85c1338d492328815baac6e8d9871593a968d8e00c997452d44ec3",
            "train.tsv": "3934cee60fef29fe0d4f6780a445a7db8b43c0344458712be2f2671776e7ec7a",
            "test.tsv": "964d9482ddeb89e224ff2668c64fd1455ba706557517422a735bcf8d90f2053c",
        },
        by_hand=_OWN_RECORDINGS,
    ),
}


def resolve(path: str) -> str:
    """`fetch:NAME` -> the folder of that data set, fetched if it is not there yet; any other path as it is. Of several
    joined by `+`, each."""
    return "+".join(
        str(fetch(part.removeprefix("fetch:"))) if part.startswith("fetch:") else os.path.expanduser(part)
        for part in path.split("+")
    )


def fetch(name: str) -> Path:
    """The cached folder of a known data set. Raises DataError, in one line, if it cannot be had."""
    if name not in KNOWN:
        raise DataError(f"unknown data set {name!r}; know {', '.join(KNOWN)}")
    known = KNOWN[name]
    target = cache_folder() / name
    if target.is_dir():
        return target
    if not (shutil.which("apt-get") and shutil.which("dpkg")):
        raise DataError(f"fetching {name} needs apt-get and dpkg, which are not here; {known.by_hand}")
    print(f"fetching {name} (Debian: {', '.join(known.packages)}) into {target}", flush=True)
    try:
        return _fetch(name, target)
    except OSError as error:
        raise DataError(f"cannot write {error.filename or target}: {error.strerror}; {known.by_hand}") from error


def _fetch(name: str, target: Path) -> Path:
    known = KNOWN[name]
    target.parent.mkdir(parents=True, exist_ok=True)
    lock = (target.parent / f".{name}.lock").open("w")
    fcntl.flock(lock, fcntl.LOCK_EX)  # other ranks wait here, and find it done
    with lock, tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        if target.is_dir():
            return target
        unpacked, prepared = Path(scratch) / "unpacked", Path(scratch) / "prepared"
        for package in _download(known, Path(scratch)):
            if subprocess.run(["dpkg", "-x", package, unpacked]).returncode:
                raise DataError(f"dpkg could not unpack {package.name}; {known.by_hand}")
        try:
            known.prepare(unpacked, prepared)
            found = {file: digest(prepared / file) for file in known.sha256}
        except (OSError, ValueError, RuntimeError) as error:
            raise DataError(f"the packages of {name} hold something else than expected ({error}); not used") from error
        for file, expected in known.sha256.items():
            if found[file] != expected:
                raise DataError(f"{name}: {file} has sha256 {found[file]}, expected {expected}; not used")
        prepared.rename(target)
    return target


def _download(known: DebianData, folder: Path) -> list[Path]:
    for commands in (["download"], ["update", "download"]):  # package lists may be missing or old
        for command in commands:
            what = known.packages if command == "download" else ()
            done = subprocess.run(["apt-get", command, *what], cwd=folder, capture_output=True, text=True)
        packages = sorted(folder.glob("*.deb"))
        if len(packages) == len(known.packages):
            return packages
    reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
    raise DataError(f"apt-get could not fetch {', '.join(known.packages)}: {reason}; {known.by_hand}")


def digest(path: Path) -> str:
    """The sha256 of a file; of a folder, that of the lines `digest  name` of all files in it in order of their names,
    as sha256sum writes them."""
    if not path.is_dir():
        return hashlib.sha256(path.read_bytes()).hexdigest()
    files = sorted(file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file())
    lines = (f"{digest(path / file)}  {file}\n" for file in files)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def cache_folder() -> Path:
    """$DATA2VEC_CACHE, or data2vec below the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "data2vec"
    return Path(os.environ.get("DATA2VEC_CACHE", default)).expanduser()


if __name__ == "__main__":
    try:
        for wanted in sys.argv[1:] or sys.exit(f"usage: python -m pretrain.data.fetch {{{','.join(KNOWN)}}}"):
            print(fetch(wanted))
    except DataError as error:
        sys.exit(f"error: {error}")
