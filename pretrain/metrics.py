"""What a run says: one progress line, metrics as JSONL and TensorBoard, and a plain log."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter


class Recorder:
    """Writes for the main rank; on the others every call does nothing.

    `metrics.jsonl` holds only what the run determines, so that after a kill and a resume the file is byte for byte that
    of a run never killed. Times are in `speed.jsonl`.
    """

    def __init__(self, folder: Path, steps: int, step: int, active: bool) -> None:
        self.steps, self.active = steps, active
        self._tty = sys.stdout.isatty()
        self._open_line = False
        self._since = (time.monotonic(), step)
        if not active:
            return
        folder.mkdir(parents=True, exist_ok=True)
        self._files = {name: _reopen(folder / f"{name}.jsonl", step) for name in ("metrics", "speed")}
        self._log = (folder / "log.txt").open("a", buffering=1)
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def record(
        self, step: int, metrics: dict[str, float], samples_per_step: int, views_per_step: int, unit: str
    ) -> None:
        """One line each for the screen, the JSONL files and TensorBoard."""
        if not self.active:
            return
        now = time.monotonic()
        seconds = (now - self._since[0]) / max(1, step - self._since[1])
        self._since = (now, step)
        rates = {f"{unit}_per_s": samples_per_step / seconds, "views_per_s": views_per_step / seconds}
        speed = {"seconds_per_step": seconds} | rates
        self._write("metrics", step, metrics)
        self._write("speed", step, speed)
        left = (self.steps - step) * seconds
        m = metrics
        self._status(
            f"step {step}/{self.steps}  loss {m['loss']:.4f}  lr {m['lr']:.2e}  ema {m['ema_decay']:.6g}  "
            f"dev target {m['target_deviation']:.3f} pred {m['prediction_deviation']:.3f}  "
            f"grad {m['grad_norm']:.3g}  {rates[f'{unit}_per_s']:.1f} {unit}/s  {rates['views_per_s']:.0f} views/s  "
            f"{int(left // 3600)}:{int(left % 3600 // 60):02d}:{int(left % 60):02d} left"
        )

    def say(self, text: str) -> None:
        """A line of its own, on screen and in the log."""
        if not self.active:
            return
        if self._open_line:
            print()
            self._open_line = False
        print(text, flush=True)
        self._log.write(time.strftime("%Y-%m-%d %H:%M:%S ") + text + "\n")

    def note(self, text: str) -> None:
        """For the log alone."""
        if self.active:
            self._log.write(time.strftime("%Y-%m-%d %H:%M:%S ") + text + "\n")

    def close(self) -> None:
        if self.active:
            for file in self._files.values():
                file.close()
            self._log.close()
            self._board.close()

    def _write(self, name: str, step: int, values: dict[str, float]) -> None:
        self._files[name].write(json.dumps({"step": step} | values) + "\n")
        for key, value in values.items():
            self._board.add_scalar(f"{name}/{key}", value, step)

    def _status(self, line: str) -> None:
        print(f"\r\x1b[2K{line}" if self._tty else line, end="" if self._tty else "\n", flush=True)
        self._open_line = self._tty


def _reopen(path: Path, step: int) -> Any:
    """Drops what a killed run wrote after its last checkpoint, then appends."""
    if path.exists():
        kept = []
        for line in path.read_text().splitlines():
            try:
                if json.loads(line)["step"] > step:
                    break
            except (json.JSONDecodeError, KeyError):  # torn by the kill
                break
            kept.append(line + "\n")
        path.write_text("".join(kept))
    return path.open("a", buffering=1)
