"""The authors' numbers, through the code that trains, at every ZeRO stage; and that a wrong number is noticed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.launch import run

GOLDEN = Path(__file__).parent / "golden"


@pytest.mark.parametrize(
    ("zero", "ranks"), [("0", 1), ("1", 1), ("2", 1), ("3", 1), ("0", 4), ("3", 2), ("2_offload", 2)]
)
def test_golden_cases(zero: str, ranks: int) -> None:
    done = run("tests.parity", str(GOLDEN), "--zero", zero, ranks=ranks)
    shared = f" on {ranks} ranks" if ranks > 1 else ""
    assert f"10 cases replayed at ZeRO {zero}{shared}: all within bounds" in done.stdout
    assert done.stdout.count(" ok\n") > 240


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
