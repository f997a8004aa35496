"""The authors' numbers, through the code that trains: every ZeRO stage, one to four ranks, tensor parallelism (what
is left out, `python -m tests.parity` has); and that a wrong number is noticed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.launch import run

GOLDEN = Path(__file__).parent / "golden"


@pytest.mark.parametrize("zero", ["0 3 3_offload"])
def test_golden_cases(zero: str) -> None:
    check(run("tests.parity", str(GOLDEN), "--zero", *zero.split()).stdout, zero, "", 240)


@pytest.mark.parametrize(("zero", "ranks"), [("1 2 3", 2), ("3", 4)])
def test_golden_cases_shared_by_ranks(zero: str, ranks: int) -> None:
    out = run("tests.parity", str(GOLDEN), "--brief", "--zero", *zero.split(), ranks=ranks).stdout
    check(out, zero, f" on {ranks} ranks", 200)


def test_golden_cases_where_two_ranks_split_every_layer() -> None:
    out = run("tests.parity", str(GOLDEN), "--brief", "--zero", "3", "--tp", "2", ranks=4).stdout
    check(out, "3", " on 4 ranks, 2 of them tensor-parallel", 200)
    curves = [float(line.split("error")[1].split()[0]) for line in out.splitlines() if " traj.loss " in line]
    assert len(curves) == 10 and max(curves) < 1e-5


def check(out: str, zero: str, shared: str, quantities: int) -> None:
    for stage in zero.split():
        assert f"10 cases replayed at ZeRO {stage}{shared}: all within bounds" in out
    assert out.count(" ok\n") > quantities * len(zero.split())


@pytest.mark.parametrize(
    "tensor", ["out.target", "out.pred", "grad.blocks.0.attn.proj.weight", "final_teacher.blocks.0.norm1.weight"]
)
def test_wrong_number_is_noticed(tmp_path: Path, tensor: str) -> None:
    golden = load_file(GOLDEN / "image_large.safetensors")
    golden[tensor] = golden[tensor] + 3e-4 * torch.sign(golden[tensor])
    save_file(golden, tmp_path / "image_large.safetensors")
    (tmp_path / "image_large.json").write_text((GOLDEN / "image_large.json").read_text())
    done = run("tests.parity", str(tmp_path), status=1)
    assert done.stdout.count("EXCEEDED") == 1
    assert "1 bounds exceeded" in done.stdout
