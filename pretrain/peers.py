"""The other ranks: what all must agree on before they start, who of them lives, and who has failed, and why.

All of it goes through the launch's key-value store (torchrun's own, or rank 0's), on a connection of its own and from a
thread of its own, so that it works while a collective waits for a rank that will never come.
"""

from __future__ import annotations

import json
import math
import os
import signal
import socket
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import NoReturn

import torch.distributed as dist

from pretrain.config import WatchConfig
from pretrain.data.names import few
from pretrain.settings import ConfigError

ARRIVAL = timedelta(minutes=10)  # between the first rank's start and the last one's
SILENT = WatchConfig().silent_seconds  # until the config is known
LAST_WORDS = 5.0  # seconds that a failing rank gives the others to speak before it does
GRACE = 0.2  # seconds between them, and for the store to be read
LONGEST_PAUSE = 1.0  # seconds between two questions to the store
LEFT = "left"  # the last beat of a rank that ends in order


@dataclass(frozen=True)
class Failure:
    rank: int
    """That speaks of it."""
    status: int
    text: str
    cause: str
    """In one line, for the other ranks to say."""


class Peers:
    """The ranks of a launch, of which this process is one; alone until `join`.

    Every rank writes a beat, a number that grows. Rank 0 looks at all beats, the others at rank 0's: each rank costs
    the store a few small messages a beat. A rank whose beat stands still is taken for dead.
    """

    def __init__(self) -> None:
        self.rank, self.size = 0, 1
        self.who = [_own_name(0)]
        self.silent = SILENT
        """Seconds without a beat after which a rank is given up."""
        self._ending, self._stop = threading.Lock(), threading.Event()
        self._thread: threading.Thread | None = None

    def join(self) -> None:
        """Meets the ranks that RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT speak of, and starts to watch over them.

        Raises ConfigError if they do not all come within ten minutes, or if another run meets there.
        """
        if int(os.environ["WORLD_SIZE"]) == 1:
            return
        place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # all of torchrun's share one store
        try:
            store, self.rank, self.size = next(dist.rendezvous("env://", timeout=ARRIVAL))
            self._store = dist.PrefixStore(f"peers/{attempt}", store)
            if other := self._other_run():
                raise ConfigError(f"{place} belongs to another run, {other}; choose another MASTER_PORT")
            self._store.set(f"beat/{self.rank}", "0")
            everyone = [f"who/{rank}" for rank in range(self.size)]
            self._store.wait(everyone, ARRIVAL)
            self.who = [name.decode() for name in self._store.multi_get(everyone)]
        except dist.DistError as error:
            if "EADDRINUSE" in str(error):  # said by the rank that is to keep the store
                raise ConfigError(f"{place} is in use by another process; choose another MASTER_PORT") from None
            raise ConfigError(
                f"rank {os.environ['RANK']}: not all {os.environ['WORLD_SIZE']} ranks have met at {place} within "
                f"{ARRIVAL.seconds // 60} minutes: {' '.join(str(error).split())[:200]}"
            ) from None
        self._thread = threading.Thread(target=self._watch, name="peers", daemon=True)
        self._thread.start()

    def _other_run(self) -> str:
        """Enters this rank in the store, unless that is another run's, of which something is returned then."""
        run = json.dumps([self.size, _slurm_job()])
        if self.rank == 0:
            self._store.set("run", run)
        self._store.wait(["run"], ARRIVAL)
        size, job = json.loads(self._store.get("run"))
        if size != self.size:
            return f"of {size:,} ranks"
        if job and _slurm_job() not in ("", job):  # launchers over ssh hand it to some ranks only
            return job
        name = _own_name(self.rank)
        found = self._store.compare_set(f"who/{self.rank}", "", name).decode()
        return "" if found == name else f"with {found}"

    def agree(self, topic: str, value: str, judge: Callable[[list[str]], str]) -> None:
        """Has rank 0 `judge` the values of all ranks, in their order; its sentence, unless it is empty, is raised as a
        ConfigError on every rank. Each topic once. Waits for all ranks."""
        if self.size == 1:
            values = [value]
            verdict = judge(values)
        else:
            keys = [f"{topic}/{rank}" for rank in range(self.size)]
            self._store.set(keys[self.rank], value)
            if self.rank == 0:
                # `wait` would keep the connection from the watching thread
                self._until(lambda: self._store.check(keys))
                self._store.set(topic, judge([found.decode() for found in self._store.multi_get(keys)]))
            self._until(lambda: self._store.check([topic]))
            verdict = self._store.get(topic).decode()
        if verdict:
            raise ConfigError(verdict)

    def names(self, ranks: list[int]) -> str:
        """The first few of `ranks`, with their hosts."""
        return few([self.who[rank] for rank in ranks])

    def tell(self, topic: str, value: str) -> None:
        """Leaves a value for `heard`, in place of an earlier one."""
        if self.size > 1:
            self._store.set(f"{topic}/{self.rank}", value)

    def heard(self, topic: str) -> dict[int, str]:
        """Rank -> what the other ranks have told so far."""
        keys = {rank: f"{topic}/{rank}" for rank in range(self.size) if rank != self.rank}
        return {rank: self._store.get(key).decode() for rank, key in keys.items() if self._store.check([key])}

    def leave(self) -> None:
        """Ends in order, after the last collective. Rank 0, which may keep the store, goes last, and watches until
        then."""
        if self._thread is None:
            return
        if self.rank:
            self._stop_watching()
            self._store.set(f"beat/{self.rank}", LEFT)
        self._store.add(LEFT, 1)
        if self.rank == 0:
            self._until(lambda: self._store.add(LEFT, 0) >= self.size)
            self._stop_watching()

    def fail(self, status: int, text: str, lost: bool = False) -> int:
        """Says `text` on the screen, last of all ranks, and takes the others along; returns `status` if there are none,
        and otherwise ends the process with it.

        If another rank has failed before, that one's words stand. `lost` is a failure that another rank's death may
        have caused: what that rank or its silence says comes first.
        """
        if self._thread is None:
            _speak(text)
            return status
        if lost:
            _on_stop_signals(signal.SIG_DFL)  # the launcher may know already, and end this process
            time.sleep(self.silent + 3 * self._interval)  # the watching thread ends it if there is a cause
        _on_stop_signals(signal.SIG_IGN)  # a launcher that sees others end must not cut these words short
        lines = textwrap.indent(text, f"rank {self.rank}: ") if "\n" in text else text
        self._end(Failure(self.rank, status, lines, f"{self.who[self.rank]} failed: {_last_line(text)}"))

    def _watch(self) -> None:
        still: dict[int, tuple[str, int]] = {}  # rank -> its last beat, and how often it was seen again
        beats = 0
        with ThreadPoolExecutor(1) as store:
            while not self._stop.wait(self._interval):
                beats += 1
                try:
                    failure = self._answer(store.submit(self._beat, beats, still))
                except (dist.DistError, TimeoutError) as error:
                    self._claim_the_end()
                    reason = _last_line(str(error)) or type(error).__name__
                    keeper = f"{self.who[0]}, or the launcher, which keeps the ranks' store,"
                    _quit(1, f"rank {self.rank} ends: {keeper} has gone ({reason})")
                if failure:
                    time.sleep(GRACE)  # what all ranks have found at once, the main thread is about to say itself
                    self._end(failure)

    def _answer(self, beat: Future[Failure | None]) -> Failure | None:
        """What the store has to say. Raises TimeoutError if that is nothing, for as long as ranks may be silent: looks
        are counted here, too."""
        for _ in range(math.ceil(self.silent / self._interval)):
            if wait([beat], self._interval).done:
                return beat.result()
        raise TimeoutError(f"no answer for {self.silent:g} s")

    @property
    def _interval(self) -> float:
        return min(1.0, self.silent / 10)

    def _beat(self, beats: int, still: dict[int, tuple[str, int]]) -> Failure | None:
        """Writes this rank's beat and looks at those of others. Returns what has failed: a rank that says so, or those
        whose beat stands still.

        Looks are counted rather than seconds, so that a job that was suspended as a whole goes on.
        """
        self._store.set(f"beat/{self.rank}", str(beats))
        if self._store.check(["failure"]):
            return Failure(**json.loads(self._store.get("failure")))
        others = list(range(1, self.size) if self.rank == 0 else range(1))
        found = self._store.multi_get([f"beat/{rank}" for rank in others])
        for rank, beat in zip(others, map(bytes.decode, found), strict=True):
            before, times = still.get(rank, ("", 0))
            still[rank] = beat, times + 1 if beat == before != LEFT else 0
        silent = [self.who[rank] for rank in others if still[rank][1] * self._interval >= self.silent]
        if not silent:
            return None
        words = f"{', '.join(silent)}: not heard of for {self.silent:g} s; killed, stuck, or the machine is lost"
        return Failure(self.rank, 1, words, words)

    def _end(self, failure: Failure) -> NoReturn:
        """Ends this process for `failure`, or for an earlier one: its own rank speaks when all others have."""
        self._claim_the_end()
        try:
            first = Failure(**json.loads(self._store.compare_set("failure", "", json.dumps(asdict(failure)))))
            if first.rank == self.rank:
                self._until(lambda: self._store.add("told", 0) >= self.size - 1, LAST_WORDS)
        except dist.DistError:  # the store has gone, with rank 0
            first = failure
        if first.rank == self.rank:
            _speak(first.text)
        elif failure.rank != self.rank or failure.text != first.text:  # not what all say at once
            _speak(f"rank {self.rank} ends: {first.cause}")
        with suppress(dist.DistError):
            if first.rank == self.rank:
                self._store.set("said", "")
                time.sleep(GRACE)  # rank 0 may keep the store
            else:
                self._store.add("told", 1)
                self._until(lambda: self._store.check(["said"]), 2 * LAST_WORDS)
                time.sleep(2 * GRACE)  # launchers blame the rank that ends first
        _quit(first.status)

    def _claim_the_end(self) -> None:
        """Goes on in one thread only, the first; the other waits to be ended."""
        if not self._ending.acquire(blocking=False):
            threading.Event().wait()
        self._stop.set()

    def _stop_watching(self) -> None:
        assert self._thread is not None
        self._stop.set()
        self._thread.join()

    @staticmethod
    def _until(condition: Callable[[], bool], seconds: float = math.inf) -> None:
        """Asks seldom after a while: thousands of ranks do."""
        deadline = time.monotonic() + seconds
        pause = 0.02
        while not condition() and (left := deadline - time.monotonic()) > 0:
            time.sleep(min(pause, left))
            pause = min(2 * pause, LONGEST_PAUSE)


def _on_stop_signals(action: signal.Handlers) -> None:
    if threading.current_thread() is threading.main_thread():  # Python allows it nowhere else
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, action)


def _slurm_job() -> str:
    """The SLURM job that this process belongs to, if it knows of any, and which start of it."""
    job, restarts = os.environ.get("SLURM_JOB_ID"), os.environ.get("SLURM_RESTART_COUNT", "0")
    return f"SLURM job {job}, restart {restarts}" if job else ""


def _own_name(rank: int) -> str:
    return f"rank {rank} ({socket.gethostname()}, pid {os.getpid()})"


def _quit(status: int, words: str = "") -> NoReturn:
    """Ends the process without waiting for anything: collectives, loaders and kernels on the device may never end."""
    if words:
        _speak(words)
    with suppress(OSError):
        sys.stdout.flush()
    os._exit(status)


def _speak(words: str) -> None:
    """On the screen, which may be a file on a full disk: that keeps no rank from ending."""
    with suppress(OSError):
        print(words, file=sys.stderr, flush=True)


def _last_line(text: str) -> str:
    return next(reversed(text.strip().splitlines()), "")[:300]
