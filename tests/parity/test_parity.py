"""The authors' numbers, through the code that trains, at every ZeRO stage; and that a wrong number is noticed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.launch import run

GOLDEN = Path(__file__).parent / "golden"


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_golden_cases(stage: int) -> None:
    done = run("tests.parity", str(GOLDEN), "--zero", str(stage))
    assert f"3 cases replayed at ZeRO {stage}: all within bounds" in done.stdout
    assert done.stdout.count(" ok\n") > 70


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


def test_other_modalities_are_listed(tmp_path: Path) -> None:
    for name in ("image_large", "audio_base"):
        case = json.loads((GOLDEN / "image_large.json").read_text())
        case["modality"] = name.split("_")[0].upper()
        (tmp_path / f"{name}.json").write_text(json.dumps(case))
        (tmp_path / f"{name}.safetensors").write_bytes((GOLDEN / "image_large.safetensors").read_bytes())
    done = run("tests.parity", str(tmp_path))
    assert "audio_base       audio is not yet supported" in done.stdout
    assert "1 cases replayed" in done.stdout
