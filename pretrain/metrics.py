"""What a run says: one progress line, metrics as JSONL and TensorBoard, and a plain log."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from pretrain.config import Settings


class Recorder:
    """Writes for the main rank; the others only `note`.

    `metrics.jsonl` and `eval.jsonl` hold only what the run determines, so that after a kill and a resume they are byte
    for byte those of a run never killed; but for probes that the clock has skipped. Times are in `speed.jsonl`.
    """

    def __init__(
        self,
        folder: Path,
        config: Settings,
        step: int,
        read: int,
        active: bool,
        told: Callable[[dict[str, float]], str],
        views: int,
    ) -> None:
        self.config, self.active, self._told, self._views = config, active, told, views
        self._log = folder / "log.txt"
        self._tty = sys.stdout.isatty()
        self._open_line = False
        self._since = (time.monotonic(), time.process_time(), step, read)
        self.evaluated_last = 0
        if not active:
            return
        folder.mkdir(parents=True, exist_ok=True)
        self._files = {name: _reopen(folder / f"{name}.jsonl", step) for name in ("metrics", "speed", "eval")}
        self.evaluated_last = last_step(folder / "eval.jsonl")
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def record(self, step: int, metrics: dict[str, float], read: int) -> None:
        """One line each for the screen, the JSONL files and TensorBoard. `read`: samples so far, over all ranks."""
        if not self.active:
            return
        now, processor = time.monotonic(), time.process_time()
        before, processor_before, step_before, read_before = self._since
        steps_since = max(1, step - step_before)
        seconds = (now - before) / steps_since
        rate = (read - read_before) / (now - before)
        self._since = (now, processor, step, read)
        unit, steps = self.config.model.unit, self.config.train.steps
        rates = {f"{unit}_per_s": rate} | ({"views_per_s": rate * self._views} if self._views > 1 else {})
        processed = (processor - processor_before) / steps_since
        speed = {"seconds_per_step": seconds, "processor_seconds_per_step": processed} | rates
        self._write("metrics", step, metrics)
        self._write("speed", step, speed)
        left = int((steps - step) * seconds)
        self._status(
            f"step {step}/{steps}  {left // 3600}:{left % 3600 // 60:02d}:{left % 60:02d} left  "
            f"loss {metrics['loss']:.4f}  lr {metrics['lr']:.2e}  {self._told(metrics)}"
            f"{rate:.1f} {unit}/s  "
            + (f"{rates['views_per_s']:.0f} views/s  " if self._views > 1 else "")
            + f"grad {metrics['grad_norm']:.3g}"
        )

    def evaluated(self, step: int, found: dict[str, float], seconds: float, processor: float) -> None:
        """What an evaluation of so many seconds, on the clock and of this process's, has found, which are not counted
        among the steps'."""
        if not self.active:
            return
        self._since = (self._since[0] + seconds, self._since[1] + processor, *self._since[2:])
        self._write("eval", step, found)
        figures = "  ".join(f"{name} {value:.4g}" for name, value in found.items())
        self.say(f"step {step}: {figures}  ({seconds:.1f} s)")

    def say(self, text: str) -> None:
        """A line of its own, on screen and in the log."""
        if not self.active:
            return
        if self._open_line:
            print()
            self._open_line = False
        print(text, flush=True)
        self.note(text)

    def note(self, text: str) -> None:
        """For the log alone, from any rank."""
        self._log.parent.mkdir(parents=True, exist_ok=True)
        with self._log.open("a") as log:
            log.write(time.strftime("%Y-%m-%d %H:%M:%S ") + text + "\n")

    def close(self) -> None:
        if self.active:
            for file in (*self._files.values(), self._board):
                with suppress(OSError):  # of a full disk, which what was written last has told of
                    file.close()

    def _write(self, name: str, step: int, values: dict[str, float]) -> None:
        self._files[name].write(json.dumps({"step": step} | values) + "\n")
        for key, value in values.items():
            self._board.add_scalar(f"{name}/{key}", value, step)

    def _status(self, line: str) -> None:
        if self._tty:  # one line that is written over; what does not fit would wrap and stay
            line = f"\r\x1b[2K{line[: shutil.get_terminal_size().columns - 1]}"
        print(line, end="" if self._tty else "\n", flush=True)
        self._open_line = self._tty


def last_step(path: Path) -> int:
    """Of a file of metrics; 0: it has none."""
    lines = path.read_text().splitlines()
    return int(json.loads(lines[-1])["step"]) if lines else 0


def _reopen(path: Path, step: int) -> Any:
    """Drops what a killed run wrote after its last checkpoint, by truncation, then appends."""
    if path.exists():
        size = 0
        for line in path.read_bytes().splitlines(keepends=True):
            try:
                if json.loads(line)["step"] > step or not line.endswith(b"\n"):
                    break
            except (ValueError, KeyError):  # torn by the kill
                break
            size += len(line)
        os.truncate(path, size)
    return path.open("a", buffering=1)
