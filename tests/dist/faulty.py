"""Run by test_faults.py in place of `pretrain`: FAULT RANK, then the arguments of `pretrain`; that rank misbehaves."""

from __future__ import annotations

import errno
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pretrain.__main__ as entry
from pretrain import checkpoint, fingerprint, program, train
from pretrain.data.sources import DataError
from pretrain.train import Trainer

STEP = 8  # at the start of which most faults happen


def at_step(action: Callable[[], Any]) -> None:
    """Has `action` happen before step STEP, in what then is the middle of the run."""
    whole = Trainer.step

    def step(self: Trainer, micro_batches: list) -> Any:
        if self.state.step + 1 == STEP:
            action()
        return whole(self, micro_batches)

    Trainer.step = step


def throw(error: BaseException) -> None:
    raise error


def throw_at_first() -> None:
    if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        throw(RuntimeError("this rank is out of luck"))


def fall_asleep() -> None:
    time.sleep(600)


def small_files() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))


def pointer_without_space() -> None:
    """Of the checkpoint's files the last, with all others written."""

    def write(path: Path, _: str) -> None:
        throw(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))

    checkpoint.write_atomically = write


def another_code() -> None:
    true = fingerprint.code
    program.code = lambda: true() | {"pretrain/train.py": "another"}


def other_data() -> None:
    whole = train.build_dataset

    def without_the_last(*args: Any, **more: Any) -> Any:
        dataset = whole(*args, **more)
        dataset.source._images = dataset.source._images[:-1]
        return dataset

    train.build_dataset = without_the_last


def another_rate() -> None:
    whole = entry.load

    def load(*args: Any) -> Any:
        config = whole(*args)
        return replace(config, optim=replace(config.optim, lr=0.5))

    entry.load = load


FAULTS: dict[str, Callable[[], None]] = {
    "raises": lambda: at_step(lambda: throw(RuntimeError("this rank is out of luck"))),
    "raises once": lambda: at_step(throw_at_first),
    "killed": lambda: at_step(lambda: os.kill(os.getpid(), signal.SIGKILL)),
    "exits": lambda: at_step(lambda: os._exit(7)),
    "data": lambda: at_step(lambda: throw(DataError("16 images in a row could not be decoded"))),
    "sleeps": lambda: at_step(fall_asleep),
    "code": another_code,
    "samples": other_data,
    "config": another_rate,
    "limit": lambda: at_step(small_files),
    "pointer": lambda: at_step(pointer_without_space),
    "none": lambda: None,
}

if __name__ == "__main__":
    fault, rank = sys.argv[1:3]
    del sys.argv[1:3]
    if os.environ.get("RANK") == rank:
        FAULTS[fault]()
    sys.exit(entry.main())
