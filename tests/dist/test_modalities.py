"""Speech and text through the same loop: equal whatever the ranks and stages, and after a stop; layer drop alike on all
ranks."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import torch

from tests.dist.test_resume import assert_identical, progress, wait_for
from tests.launch import assert_close, run, start, weights

TINY = {"audio": "tests/tiny_audio.yaml", "text": "tests/tiny_text.yaml"}


def trained(folder: Path, modality: str, path: str, ranks: int, stage: int, *more: str) -> dict[str, torch.Tensor]:
    mechanics = f"train.deepspeed=ds_configs/zero{stage}.json"
    run("pretrain", TINY[modality], f"data.path={path}", f"run.dir={folder}", mechanics, *more, ranks=ranks)
    return weights(folder)


def without_dropout(modality: str) -> list[str]:
    names = ("residual", "attention", "mlp", "prenet", "decoder", "embedding", "layer")
    return [f"model.dropout.{name}=0" for name in names]


@pytest.mark.parametrize("modality", ["audio", "text"])
def test_same_weights_however_ranks_share_the_batch(tmp_path: Path, data: dict[str, str], modality: str) -> None:
    off, path = [*without_dropout(modality), "optim.clip_norm=0.1"], data[modality]
    small = ["train.micro_batch=2"] if modality == "text" else []  # of speech it decides which clips meet
    one = trained(tmp_path / "one", modality, path, 1, 0, *off)
    assert_close(trained(tmp_path / "shared", modality, path, 2, 2, *off, *small), one)
    assert_close(trained(tmp_path / "split", modality, path, 2, 1, *off, "train.tensor_parallel=2"), one)


def test_layer_drop_trains_alike_when_blocks_are_sharded(tmp_path: Path, data: dict[str, str]) -> None:
    """Blocks that are left out have no gradient on any rank; what ZeRO 3 does about that must not differ."""
    only = [*without_dropout("audio")[:-1], "model.dropout.layer=0.5"]
    one = trained(tmp_path / "0", "audio", data["audio"], 2, 0, *only)
    assert_close(trained(tmp_path / "3", "audio", data["audio"], 2, 3, *only), one)


def test_layer_drop_is_the_same_on_all_ranks_and_dropout_is_not(tmp_path: Path, data: dict[str, str]) -> None:
    run("tests.dist.layer_drop_worker", data["audio"], str(tmp_path), ranks=2)
    seen = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]
    assert seen[0]["blocks"] == seen[1]["blocks"]
    assert len({tuple(ran) for ran in seen[0]["blocks"]}) > 2
    seeds = [*seen[0]["seeds"], *seen[1]["seeds"]]
    assert len(set(seeds)) == len(seeds) == 2 * len(seen[0]["blocks"])


@pytest.mark.parametrize(
    ("modality", "stage", "precision", "ranks"),
    [("audio", 0, "fp32", 1), ("audio", 3, "bf16", 1), ("text", 2, "bf16", 2)],
)
def test_stopped_and_continued(
    tmp_path: Path, data: dict[str, str], modality: str, stage: int, precision: str, ranks: int
) -> None:
    """With every dropout on: bit for bit the run that was never stopped, past the end of an epoch; on two ranks, which
    split every layer, too."""
    common = [TINY[modality], f"data.path={data[modality]}", f"train.precision={precision}", "train.steps=24"]
    common += [f"train.deepspeed=ds_configs/zero{stage}.json", "run.save_every=5", f"train.tensor_parallel={ranks}"]
    run("pretrain", *common, f"run.dir={tmp_path / 'whole'}", ranks=ranks)
    folder = tmp_path / "stopped"
    process = start("pretrain", *common, f"run.dir={folder}", ranks=ranks)
    wait_for(lambda: progress(folder) >= 3, process)
    process.send_signal(signal.SIGTERM)
    process.communicate()
    assert process.returncode == (75 if ranks == 1 else 1)  # torchrun's
    assert progress(folder) < 24
    run("pretrain", *common, f"run.dir={folder}", ranks=ranks)
    assert_identical(folder, tmp_path / "whole")


def test_another_tokenizer_is_refused(tmp_path: Path, data: dict[str, str]) -> None:
    common = [TINY["text"], f"run.dir={tmp_path / 'run'}", "train.steps=2"]
    told = run("pretrain", *common, f"data.path={data['text']}", "model.text.vocabulary=301", status=2).stderr
    assert "tokenizer of 300 ids" in told and "model.text.vocabulary=300" in told
    run("pretrain", *common, f"data.path={data['text']}")
    (tmp_path / "run" / "text.model").write_bytes(b"another")
    told = run("pretrain", *common, f"data.path={data['text']}", status=2).stderr
    assert "text.model is not the one that" in told
