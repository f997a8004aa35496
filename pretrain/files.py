"""Files that are there whole or not at all, and that one process has."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO


def write_atomically(path: str | Path, content: str | bytes) -> None:
    """Readers see what was there before or `content` (text in UTF-8), also after a power cut. Raises OSError."""
    with replacing(path) as beside:
        beside.write_bytes(content.encode() if isinstance(content, str) else content)


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A path to write to, beside `path`, which it becomes unless an exception is raised. Raises OSError."""
    path = Path(path)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield beside
        flush(beside)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
    flush(path.parent)


def hold(path: Path) -> IO[bytes]:
    """Locks a file for as long as this process lives and what is returned is open. Raises BlockingIOError if another
    process, on any machine, has it; where the file system knows no locks, nobody is kept out."""
    handle = path.open("ab")
    try:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # workers do not inherit it, and may outlive this process
    except BlockingIOError:
        handle.close()
        raise
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
    return handle


def flush(path: Path) -> None:
    """Waits until a file, or a folder's list of names, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
