"""Ranks that split every layer see the same batches and draw the same where they hold the same, and only there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from models.config import ModelConfig
from models.split import RULES, Split, split_of, split_problem
from pretrain.config import load
from pretrain.settings import ConfigError
from tests.launch import TINY, run

DROPOUT = [f"model.dropout.{name}=0.2" for name in ("residual", "attention", "mlp", "prenet")]


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory, data: dict[str, str]) -> list[list[dict[str, Any]]]:
    """For every modality, what ranks 0 to 3 saw; 0 and 1, and 2 and 3, split the layers."""
    runs = [
        [TINY, *DROPOUT],
        ["tests/tiny_audio.yaml", f"data.path={data['audio']}", *DROPOUT],
        ["tests/tiny_text.yaml", f"data.path={data['text']}", *DROPOUT],
    ]
    folder = tmp_path_factory.mktemp("tensor_parallel")
    run("tests.dist.tensor_parallel_worker", str(folder), json.dumps(runs), ranks=4)
    ranks = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(4)]
    return [list(modality) for modality in zip(*ranks, strict=True)]


def test_peers_agree_on_what_all_hold(seen: list[list[dict[str, Any]]]) -> None:
    """Bit for bit: batches, activations behind dropout, losses, the gradient's norm, weights after two steps."""
    for ranks in seen:
        for first, second in (ranks[:2], ranks[2:]):
            for what in ("batch", "residual", "encoded", "loss", "norm", "whole", "read"):
                assert first[what] == second[what] and first[what], what


def test_peers_draw_attention_dropout_of_their_own(seen: list[list[dict[str, Any]]]) -> None:
    for ranks in seen:
        draws = [draw for rank in ranks for draw in rank["attention"]]
        assert len(draws) == len(set(draws)) and draws
        assert ranks[0]["slices"] != ranks[1]["slices"]


def test_shares_of_a_batch_differ(seen: list[list[dict[str, Any]]]) -> None:
    for ranks in seen:
        assert not set(ranks[0]["batch"]) & set(ranks[2]["batch"])
        assert not set(ranks[0]["residual"]) & set(ranks[2]["residual"])
        assert all(rank["norm"] == ranks[0]["norm"] for rank in ranks)
        assert all(rank["whole"] == ranks[0]["whole"] for rank in ranks)


def test_in_bf16_the_curve_is_that_of_one_rank(tmp_path: Path) -> None:
    """But for rounding: a slice or an all-reduce left out changes the first loss by percents."""
    curves = []
    for ranks in (1, 2):
        folder = tmp_path / str(ranks)
        mechanics = ["train.deepspeed=ds_configs/zero1.json", f"train.tensor_parallel={ranks}"]
        run("pretrain", TINY, f"run.dir={folder}", "train.precision=bf16", *mechanics, ranks=ranks)
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        curves.append(torch.tensor([[json.loads(line)[key] for key in ("loss", "grad_norm")] for line in lines]))
    assert len(curves[0]) == 5 and (curves[1] / curves[0] - 1).abs().max() < 5e-3


@pytest.mark.parametrize("ranks", [2, 3])
def test_slices_hold_their_heads(ranks: int) -> None:
    """q, k and v of heads 2r and 2r+1, by numbers that say where they come from."""
    heads, width = 2 * ranks, 4
    weight = torch.arange(3 * heads * width * 5).view(3, heads, width, 5)
    flat = weight.view(-1, 5)
    slices = [split_of("student.blocks.0.attn.qkv.weight", rank, ranks) for rank in range(ranks)]
    for rank, split in enumerate(slices):
        assert split is not None
        assert torch.equal(split.take(flat), weight[:, 2 * rank : 2 * rank + 2].reshape(-1, 5))
        assert split.whole(split.take(flat).shape) == flat.shape
    assert torch.equal(slices[0].join([s.take(flat) for s in slices]), flat)
    across = Split(1, 1, 1, 5)
    assert torch.equal(across.take(flat), flat[:, 1:2])


def test_what_is_split() -> None:
    assert split_of("teacher.prenet.1.mlp.fc2.weight", 1, 4) == Split(1, 1, 1, 4)
    for whole in (
        "student.blocks.0.mlp.fc2.bias",
        "student.local.proj.weight",
        "decoder.proj.weight",
        "student.blocks.0.norm1.weight",
    ):
        assert split_of(whole, 1, 4) is None
    assert all(split_of(f"student.blocks.0.{name}", 0, 1) is None for name in RULES)


def test_counts_that_do_not_divide_are_refused_with_those_that_would() -> None:
    assert split_problem(ModelConfig(), 6) == ""
    with pytest.raises(
        ConfigError, match=r"train.tensor_parallel=5 must divide model.heads=12 .*; 1, 2, 3, 4, 6, 12 would"
    ):
        load("configs/pretrain/image_base.yaml", ["train.tensor_parallel=5"])
    told = run("pretrain", TINY, "--dry-run", "--ranks", "6", "train.tensor_parallel=4", status=2).stderr
    assert "train.tensor_parallel=4 does not divide 6 ranks; 1, 2, 3, 6 would" in told
    told = run("pretrain", TINY, "train.tensor_parallel=2", status=2).stderr
    assert "train.tensor_parallel=2 does not divide 1 ranks; 1 would" in told
    told = run("pretrain", TINY, "train.tensor_parallel=2", "train.precision=bf16", ranks=2, status=1).stderr
    assert "needs ZeRO 1, 2 or 3" in told
