"""Starts the real program in processes of its own, as a user or a scheduler would."""

from __future__ import annotations

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from safetensors import safe_open

ROOT = Path(__file__).parent.parent
TINY = "tests/tiny.yaml"
TIMEOUT = 480
LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "SLURM_", "OMPI_", "PMI")  # what they begin with


def environment() -> dict[str, str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(LAUNCHER_VARIABLES)}
    return clean | {
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "TORCH_EXTENSIONS_DIR": str(ROOT / ".venv" / "torch_extensions"),
    }


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def command(module: str, *args: str, ranks: int = 1) -> list[str]:
    """`python -m module` for one rank, torchrun with a port of its own for several."""
    if ranks == 1:
        return [sys.executable, "-m", module, *args]
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m"]
    return [sys.executable, *launcher, module, *args]


def start(module: str, *args: str, ranks: int = 1) -> subprocess.Popen[str]:
    return spawn(command(module, *args, ranks=ranks), environment())


def spawn(line: list[str], variables: dict[str, str]) -> subprocess.Popen[str]:
    """A command in a session of its own, with pipes for what it says."""
    return subprocess.Popen(
        line,
        cwd=ROOT,
        env=variables,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def run(module: str, *args: str, ranks: int = 1, status: int | None = 0) -> subprocess.CompletedProcess[str]:
    """Runs to the end; fails with the program's own words if the exit status is not the expected one."""
    return finish(start(module, *args, ranks=ranks), status)


def in_turn(program: str, *runs: Sequence[str], ranks: int = 1) -> str:
    """Several runs, given by what `python -m program` would be, one after the other in one launch, for starting takes
    longer than a small run. What was said."""
    return run("tests.dist.runs", program, *map(shlex.join, runs), ranks=ranks).stdout


pretrain, finetune = partial(in_turn, "pretrain"), partial(in_turn, "finetune")


def finish(process: subprocess.Popen[str], status: int | None = 0) -> subprocess.CompletedProcess[str]:
    try:
        out, err = process.communicate(timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # the launcher's ranks, too
        raise
    done = subprocess.CompletedProcess(process.args, process.returncode, out, err)
    if status is not None and done.returncode != status:
        raise AssertionError(f"exit status {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}")
    return done


def weights(run_folder: Path) -> dict[str, torch.Tensor]:
    """Everything that the newest checkpoint holds, put together flat: `master/NAME`, `exp_avg/NAME`, `teacher/NAME`."""
    folder = run_folder / "checkpoints" / (run_folder / "checkpoints" / "latest").read_text().strip()
    parts: dict[str, dict[str, list[tuple[int, torch.Tensor]]]] = {}
    for path in sorted(folder.glob("shard_*.safetensors")):
        with safe_open(path, "pt") as file:
            for name, place in file.metadata().items():
                start, shape, split = json.loads(place)
                slices = parts.setdefault(name, {})
                slices.setdefault(json.dumps([shape, split]), []).append((start, file.get_tensor(name)))
    return {name: unsplit(slices) for name, slices in parts.items()}


def unsplit(slices: dict[str, list[tuple[int, torch.Tensor]]]) -> torch.Tensor:
    """A tensor, flat, of its pieces by shape and split: [dim, parts, rank, ranks] of tensor parallelism."""
    whole = torch.empty(0)
    for place, pieces in slices.items():
        shape, split = json.loads(place)
        own = torch.cat([values for _, values in sorted(pieces, key=lambda piece: piece[0])])
        if split is None:
            return own
        dim, parts, rank, ranks = split
        size = shape[dim] // parts
        if not len(whole):
            whole = torch.full([n * ranks if i == dim else n for i, n in enumerate(shape)], torch.nan)
        for part in range(parts):
            begin = (part * ranks + rank) * size
            whole.narrow(dim, begin, size).copy_(own.view(shape).narrow(dim, part * size, size))
    return whole.flatten()


def assert_close(ours: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], bound: float = 1e-5) -> None:
    """All that `weights` found, but for what is rounding noise alone: whatever belongs to attention's key bias."""
    assert ours.keys() == expected.keys() and len(expected) > 100
    for name, value in expected.items():
        difference = (ours[name] - value).abs()
        if name.endswith("attn.qkv.bias"):
            third = len(difference) // 3
            difference[third : 2 * third] = 0
        size = float(value.abs().max()) if name.startswith("exp_avg") else 1.0  # moments are small
        assert difference.max() <= bound * (10 * size if size != 1 else 1), name
