"""Names of many samples in little memory, the classes that folders make of them, digests of such, and lines that tell a
few of them."""

from __future__ import annotations

import hashlib
import os
from array import array
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray


def digest(*parts: bytes | bytearray | array | np.ndarray) -> str:
    """SHA-256, the first 16 hexadecimal digits, of what `parts` hold, and of where one ends."""
    found = hashlib.sha256()
    for part in parts:
        content = part.tobytes() if isinstance(part, array | np.ndarray) else part
        found.update(len(content).to_bytes(8, "little"))
        found.update(content)
    return found.hexdigest()[:16]


def few(names: Sequence[Any] | NDArray[Any], most: int = 3, told: Callable[[Any], str] = str) -> str:
    """a, b; a, b, c and 12 more. `told` is asked for the names that are shown alone."""
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(map(told, names[:most])) + more


class Names:
    """Strings packed into two flat buffers: no objects whose reference counts unshare a worker's memory."""

    def __init__(self) -> None:
        self._text = bytearray()
        self._ends = array("q", [0])

    def append(self, name: str) -> None:
        self._text += os.fsencode(name)
        self._ends.append(len(self._text))

    @property
    def packed(self) -> tuple[bytearray, array]:
        """All names, one after the other, and where each ends."""
        return self._text, self._ends

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> str:
        return os.fsdecode(bytes(self._text[self._ends[index] : self._ends[index + 1]]))


class FolderLabels:
    """Classes of files told one by one in the order of `walk`: the first-level folder of each.

    There are none unless two or more such folders hold files and no file lies beside them.
    """

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}
        self._labels = array("q")
        self._loose = False

    def append(self, name: str) -> None:
        folder, slash, _ = name.partition("/")
        self._loose = self._loose or not slash
        self._labels.append(self._numbers.setdefault(folder, len(self._numbers)))

    def finish(self) -> tuple[np.ndarray | None, list[str]]:
        """int64 (n,) labels and the sorted class names they index; None and no names if unlabelled."""
        if self._loose or len(self._numbers) < 2:
            return None, []
        classes = sorted(self._numbers, key=os.fsencode)
        rank = np.empty(len(classes), np.int64)
        rank[[self._numbers[name] for name in classes]] = np.arange(len(classes))
        return rank[np.array(self._labels, np.int64)], classes
