"""The authors' numbers, through the code that trains: every ZeRO stage, ranks that share a batch, tensor parallelism
(what is left out, `python -m tests.parity` has); and that a wrong number is noticed."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tests.launch import run

GOLDEN = Path(__file__).parent / "golden"


def test_golden_cases() -> None:
    check(run("tests.parity", str(GOLDEN), "--zero", "0", "1", "3_offload").stdout, "0 1 3_offload", "", 240)


def test_golden_cases_shared_by_ranks() -> None:
    out = run("tests.parity", str(GOLDEN), "--brief", "--zero", "2", "3", ranks=2).stdout
    check(out, "2 3", " on 2 ranks", 200)


def test_golden_cases_where_two_ranks_split_every_layer() -> None:
    out = run("tests.parity", str(GOLDEN), "--brief", "--zero", "3", "--tp", "2", ranks=2).stdout
    check(out, "3", " on 2 ranks, 2 of them tensor-parallel", 200)
    curves = [float(line.split("error")[1].split()[0]) for line in out.splitlines() if " traj.loss " in line]
    assert len(curves) == 10 and max(curves) < 1e-5


def check(out: str, zero: str, shared: str, quantities: int) -> None:
    for stage in zero.split():
        assert f"10 cases replayed at ZeRO {stage}{shared}: all within bounds" in out
    assert out.count(" ok\n") > quantities * len(zero.split())


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
