"""Data sets known by name: fetched once through the system's package manager, checked, and cached.

python -m pretrain.data.fetch fashion_mnist
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from pretrain.data.sources import DataError


@dataclass(frozen=True)
class DebianData:
    """Files of a Debian package, taken out of it without installing it."""

    package: str
    folder: str
    sha256: dict[str, str]  # file name -> digest


KNOWN = {
    "fashion_mnist": DebianData(
        package="dataset-fashion-mnist",
        folder="usr/share/datasets/fashion-mnist",
        sha256={
            "train-images-idx3-ubyte.gz": "b0564c3eedabfbf835052cff8503ea422014ce006caf5b757f851416ee8300c7",
            "train-labels-idx1-ubyte.gz": "0ae29f65d86684f32d1b9c85147786c547b9c6aebcaf235f0400a0cce308b056",
            "t10k-images-idx3-ubyte.gz": "cc1d090a38ace84dfa1aa66e3ada7c336ef481a96936906477e6dd344da56eaa",
            "t10k-labels-idx1-ubyte.gz": "8d3605d196f4be44669e46906da9733c8131fef761fdbfec72c424d5222f1a05",
        },
    )
}


def resolve(path: str) -> str:
    """`fetch:NAME` -> the folder of that data set, fetched if it is not there yet; any other path as it is."""
    return str(fetch(path.removeprefix("fetch:"))) if path.startswith("fetch:") else os.path.expanduser(path)


def fetch(name: str) -> Path:
    """The cached folder of a known data set. Raises DataError, in one line, if it cannot be had."""
    if name not in KNOWN:
        raise DataError(f"unknown data set {name!r}; know {', '.join(KNOWN)}")
    known = KNOWN[name]
    target = cache_folder() / name
    if target.is_dir():
        return target
    by_hand = f"install the Debian package {known.package} elsewhere and give data.path its {known.folder}"
    if not (shutil.which("apt-get") and shutil.which("dpkg")):
        raise DataError(f"fetching {name} needs apt-get and dpkg, which are not here; {by_hand}")
    print(f"fetching {name} (Debian package {known.package}) into {target}", flush=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    lock = (target.parent / f".{name}.lock").open("w")
    fcntl.flock(lock, fcntl.LOCK_EX)  # other ranks wait here, and find it done
    with lock, tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        if target.is_dir():
            return target
        for commands in (["download"], ["update", "download"]):  # package lists may be missing or old
            for command in commands:
                what = [known.package] if command == "download" else []
                done = subprocess.run(["apt-get", command, *what], cwd=scratch, capture_output=True, text=True)
            if packages := list(Path(scratch).glob("*.deb")):
                break
        else:
            reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise DataError(f"apt-get could not fetch {known.package}: {reason}; {by_hand}")
        if subprocess.run(["dpkg", "-x", packages[0].name, "."], cwd=scratch).returncode:
            raise DataError(f"dpkg could not unpack {packages[0].name}; {by_hand}")
        source = Path(scratch) / known.folder
        for file, digest in known.sha256.items():
            found = hashlib.sha256((source / file).read_bytes()).hexdigest()
            if found != digest:
                raise DataError(f"{known.package}: {file} has sha256 {found}, expected {digest}; not used")
        source.rename(target)
    return target


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
