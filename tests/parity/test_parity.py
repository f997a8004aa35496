"""The authors' numbers, through the code that trains: every ZeRO stage, ranks that share a batch, tensor parallelism
(what is left out, `python -m tests.parity` has); and that a wrong number is noticed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.launch import run

GOLDEN = Path(__file__).parent / "golden"


@pytest.mark.parametrize(
    ("how", "stages", "quantities"), [((), ("0",), 240), (("--brief",), ("1", "2", "3_offload"), 200)]
)
def test_golden_cases(how: tuple[str, ...], stages: tuple[str, ...], quantities: int) -> None:
    parts = replays(run("tests.parity", str(GOLDEN), *how, "--zero", *stages).stdout)
    assert list(parts) == [f"10 cases replayed at ZeRO {stage}: all within bounds" for stage in stages]
    assert min(map(len, parts.values())) > quantities


def test_golden_cases_that_two_ranks_share_and_where_they_split_every_layer() -> None:
    parts = replays(run("tests.parity", str(GOLDEN), "--brief", "--zero", "3", "--tp", "1", "2", ranks=2).stdout)
    how = ("on 2 ranks", "on 2 ranks, 2 of them tensor-parallel")
    assert list(parts) == [f"10 cases replayed at ZeRO 3 {shared}: all within bounds" for shared in how]
    assert min(map(len, parts.values())) > 200
    split = list(parts.values())[1]
    curves = [float(line.split("error")[1].split()[0]) for line in split if " traj.loss " in line]
    assert len(curves) == 10 and max(curves) < 1e-5


def replays(out: str) -> dict[str, list[str]]:
    """The last line of each replay of all cases, and the quantities before it that are within their bounds."""
    found, rows = {}, []
    for line in out.splitlines():
        if "cases replayed" in line:
            found[line], rows = rows, []
        elif line.endswith(" ok"):
            rows.append(line)
    return found


def test_wrong_numbers_are_noticed(tmp_path: Path) -> None:
    """Each alone in a case of its own."""
    golden = load_file(GOLDEN / "image_large.safetensors")
    wrong = ("out.target", "out.pred", "grad.blocks.0.attn.proj.weight", "final_teacher.blocks.0.norm1.weight")
    for i, tensor in enumerate(wrong):
        off = golden[tensor] + 3e-4 * torch.sign(golden[tensor])
        save_file(golden | {tensor: off}, tmp_path / f"wrong{i}.safetensors")
        (tmp_path / f"wrong{i}.json").write_text((GOLDEN / "image_large.json").read_text())
    lines = run("tests.parity", str(tmp_path), status=1).stdout.splitlines()
    exceeded = [line.split()[0] for line in lines if line.endswith("EXCEEDED")]
    assert exceeded == [f"wrong{i}" for i in range(len(wrong))]
    assert lines[-1] == f"{len(wrong)} cases replayed at ZeRO 1: {len(wrong)} bounds exceeded"
