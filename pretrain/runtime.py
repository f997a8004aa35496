"""Exit statuses and signals: what a run and a scheduler say to each other."""

from __future__ import annotations

import signal
from types import FrameType

import torch
import torch.distributed as dist

from pretrain.parallel import COLLECTIVES, World

EXIT_BAD_INPUT = 2  # a config or data the run cannot start with
EXIT_DIVERGED = 3  # loss or gradient no longer finite, or a collapse
EXIT_RESUME = 75  # saved on a signal; the same command continues (EX_TEMPFAIL of sysexits.h)
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """Notices SIGTERM and SIGUSR1 and lets all ranks stop after the same step.

    Ranks get a signal at different moments. Each step starts a small all-reduce on the host and reads the one that the
    step before has started, so ranks agree at the cost of one step's delay and no waiting for the device.
    """

    def __init__(self, world: World) -> None:
        self.received: signal.Signals | None = None
        self._previous = {s: signal.signal(s, self._notice) for s in STOP_SIGNALS}
        self._group = dist.new_group(backend="gloo", timeout=COLLECTIVES) if world.size > 1 else None
        self._flag = torch.zeros((), dtype=torch.int32)
        self._pending: dist.Work | None = None

    def _notice(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number)

    def agreed(self) -> bool:
        """Call once a step, on all ranks: whether to stop now."""
        if self._group is None:
            return self.received is not None
        if self._pending is not None:
            self._pending.wait()
            if self._flag.item():
                self._pending = None
                return True
        self._flag.fill_(self.received is not None)
        self._pending = dist.all_reduce(self._flag, dist.ReduceOp.MAX, group=self._group, async_op=True)
        return False

    def settle(self) -> None:
        """Waits for what the last `agreed` has started: only where all ranks get here."""
        if self._pending is not None:
            self._pending.wait()
            self._pending = None

    def close(self) -> None:
        """Gives the signals back."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
