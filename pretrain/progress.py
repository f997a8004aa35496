"""How far long work has come, in one line."""

from __future__ import annotations

import sys
import time


class Progress:
    """One line that grows: rewritten on a terminal, said again now and then elsewhere; none without a label."""

    EVERY = 0.2, 10.0  # seconds, on a terminal and in a file

    def __init__(self, label: str, total: int) -> None:
        self.label, self.total, self.done = label, total, 0
        self._tty = sys.stdout.isatty()
        self._start = self._said = time.monotonic()

    def __enter__(self) -> Progress:
        return self

    def advance(self, count: int) -> None:
        self.done += count
        now = time.monotonic()
        if self.label and now - self._said >= self.EVERY[not self._tty] and self.done < self.total:
            self._said = now
            left = (now - self._start) * (self.total - self.done) / self.done
            self._say(f"{self.label}: {self.done:,} of {self.total:,}, {left:.0f} s left", self._tty)

    def __exit__(self, failed: type | None, *_: object) -> None:
        if self.label and not failed:
            self._say(f"{self.label}: {self.done:,} in {time.monotonic() - self._start:.0f} s", False)

    def _say(self, line: str, stay: bool) -> None:
        print(f"\r\x1b[2K{line}" if self._tty else line, end="" if stay else "\n", flush=True)
