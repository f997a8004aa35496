"""Starts the real program in processes of its own, as a user or a scheduler would."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import torch
from safetensors import safe_open

ROOT = Path(__file__).parent.parent
TINY = "tests/tiny.yaml"
TIMEOUT = 240
LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def environment() -> dict[str, str]:
    clean = {k: v for k, v in os.environ.items() if k not in LAUNCHER_VARIABLES}
    return clean | {
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "TORCH_EXTENSIONS_DIR": str(ROOT / ".venv" / "torch_extensions"),
    }


def command(module: str, *args: str, ranks: int = 1) -> list[str]:
    """`python -m module` for one rank, torchrun with a port of its own for several."""
    if ranks == 1:
        return [sys.executable, "-m", module, *args]
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m"]
    return [sys.executable, *launcher, module, *args]


def start(module: str, *args: str, ranks: int = 1) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command(module, *args, ranks=ranks),
        cwd=ROOT,
        env=environment(),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def run(module: str, *args: str, ranks: int = 1, status: int | None = 0) -> subprocess.CompletedProcess[str]:
    """Runs to the end; fails with the program's own words if the exit status is not the expected one."""
    process = start(module, *args, ranks=ranks)
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
    """Everything that the newest checkpoint holds: student, decoder, teacher, fp32 masters and Adam's moments."""
    folder = run_folder / "checkpoints" / (run_folder / "checkpoints" / "latest").read_text().strip()
    out: dict[str, torch.Tensor] = {}
    state = torch.load(folder / "mp_rank_00_model_states.pt", weights_only=False)
    out |= state["module"]
    optimizers = [state["optimizer"]] if state["optimizer"] else []
    sharded = sorted(folder.glob("*optim_states.pt"))
    optimizers += [torch.load(path, weights_only=False)["optimizer_state_dict"] for path in sharded]
    for i, optimizer in enumerate(optimizers):
        out |= {f"optimizer.{i}.{key}": value for key, value in _tensors(optimizer)}
    for path in sorted(folder.glob("teacher_*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                pieces = [out[f"teacher.{name}"]] if f"teacher.{name}" in out else []
                out[f"teacher.{name}"] = torch.cat([*pieces, file.get_tensor(name).view(-1)])
    return out


def _tensors(tree: object, prefix: str = "") -> list[tuple[str, torch.Tensor]]:
    if isinstance(tree, torch.Tensor):
        return [(prefix, tree)]
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list | tuple) else ()
    return [found for key, value in items for found in _tensors(value, f"{prefix}.{key}")]
