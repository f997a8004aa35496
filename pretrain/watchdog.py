"""Steps that take far longer than usual: every rank's stacks are dumped, and in the end the run is ended."""

from __future__ import annotations

import faulthandler
import json
import os
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import FrameType

from pretrain.config import WatchConfig
from pretrain.peers import Peers

USUAL = 5  # steps before their median means something; the first ones compile and fill caches
RECENT = 101  # steps that the median is of
PATIENCE = 5.0  # seconds that the other ranks have to say where they are: their limits differ a little
TOPIC, WAITS = "where", "waits for other ranks"


class Watchdog:
    """Watches the time of this rank's steps from a thread of its own; training only tells it where it is.

    A step over `slow_step` times the median of recent ones, and over `slow_seconds`, has the stacks of all threads
    written to `stacks/rank_N.txt` in `folder`. A rank that waits for another is as late as the one it waits for, so all
    ranks do so, and rank 0 calls `say` with a line of which waits and which does not. What takes over `hang_minutes`
    ends the run. Times are counted in looks at the clock, so that a job that was suspended goes on.
    """

    def __init__(self, config: WatchConfig, folder: Path, peers: Peers, say: Callable[[str], None]) -> None:
        self._config, self._peers, self._say = config, peers, say
        self._stacks = folder / "stacks"
        self._durations: deque[float] = deque(maxlen=RECENT)
        self._current: tuple[int, str, float] = 0, "the start", time.monotonic()
        self._main = threading.main_thread().ident
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def step(self, number: int) -> None:
        """Step `number` begins, and what went before ends."""
        self._begin(number, "")

    def other(self, what: str) -> None:
        """What begins now is no step: it may take up to `hang_minutes`."""
        self._begin(self._current[0], what)

    def close(self) -> None:
        self._stop.set()
        self._thread.join()

    def _begin(self, number: int, what: str) -> None:
        now = time.monotonic()
        if not self._current[1]:
            self._durations.append(now - self._current[2])
        self._current = number, what, now

    def _watch(self) -> None:
        interval = min(1.0, self._config.slow_seconds / 5)
        seen, looks, dumped = self._current, 0, False
        while not self._stop.wait(interval):
            if self._current is not seen:
                seen, looks, dumped = self._current, 0, False
                continue
            looks += 1
            number, what, _ = seen
            elapsed, late = looks * interval, f"{what or f'step {number}'} has taken"
            if not dumped and not what and elapsed > self._slow():
                dumped = True
                usual = f"{elapsed:.3g} s, and {statistics.median(self._durations):.3g} s are usual"
                line = f"{late} {usual}: {self._dump(number, late)}"
                with suppress(OSError):  # the disk may be full, and what hangs must end all the same
                    self._say(line)
            if 0 < self._config.hang_minutes * 60 < elapsed:
                limit = f"over watch.hang_minutes={self._config.hang_minutes:g}"
                words = f"stopped: {late} {limit}: {self._dump(number, late)}"
                if self._peers.rank:
                    self._stop.wait(2 * PATIENCE)  # rank 0, which knows of all, speaks if it can
                self._peers.fail(1, words)
                os._exit(1)  # alone: the main thread will not do it

    def _slow(self) -> float:
        """Seconds from which on a step is slow."""
        if not self._config.slow_step or len(self._durations) < USUAL:
            return float("inf")
        return max(self._config.slow_seconds, self._config.slow_step * statistics.median(self._durations))

    def _dump(self, number: int, reason: str) -> str:
        """Writes this rank's stacks, to the screen if not to its file; on rank 0, returns where all are, and which rank
        is where."""
        path, unwritten = self._stacks / f"rank_{self._peers.rank}.txt", ""
        try:
            self._stacks.mkdir(parents=True, exist_ok=True)
            with path.open("a") as file:
                file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {reason} too long\n")
                file.flush()
                faulthandler.dump_traceback(file)
        except OSError as error:
            faulthandler.dump_traceback(2)
            unwritten = f" (on the screen for {path}: {error.strerror})"
        where = whereabouts(sys._current_frames().get(self._main or 0))
        self._peers.tell(TOPIC, json.dumps([number, where]))
        if self._peers.rank:
            return f"stacks in {path}{unwritten}"
        found = {0: where}
        for _ in range(round(PATIENCE / 0.5)):
            told = {rank: json.loads(value) for rank, value in self._peers.heard(TOPIC).items()}
            found |= {rank: place for rank, (step, place) in told.items() if step >= number - 1}  # others are of old
            if len(found) == self._peers.size or self._stop.wait(0.5):
                break
        return f"stacks in {self._stacks}/rank_*.txt{unwritten}; {summary(found, self._peers)}"


def whereabouts(frame: FrameType | None) -> str:
    """Where a thread is, innermost call first, or that it waits for other ranks: in a collective of gloo. NCCL's return
    at once; a thread then waits where it reads a result, or in the engine."""
    calls: list[str] = []
    while frame:
        path = Path(frame.f_code.co_filename)
        if path.match("torch/distributed/*.py"):
            return WAITS
        calls.append(f"{path.parent.name}/{path.name}:{frame.f_lineno} {frame.f_code.co_name}")
        frame = frame.f_back
    return "at " + " < ".join(calls[:3])


def summary(found: dict[int, str], peers: Peers) -> str:
    """Which ranks are where, those that do not wait and are few first: usually what the others wait for."""
    places: dict[str, list[int]] = {}
    for rank in range(peers.size):
        places.setdefault(found.get(rank, "has not said where it is"), []).append(rank)
    order = sorted(places, key=lambda place: (place == WAITS, len(places[place])))
    return "; ".join(f"{peers.names(places[place])} {place}" for place in order[:4])
