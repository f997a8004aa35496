"""Speech and text through the same loop: equal whatever the ranks and stages, and after a stop; layer drop alike on all
ranks."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from tests.dist.test_resume import assert_identical, progress, wait_for
from tests.launch import assert_close, pretrain, run, start, weights

TINY = {"audio": "tests/tiny_audio.yaml", "text": "tests/tiny_text.yaml"}


DROPOUTS = ("residual", "attention", "mlp", "prenet", "decoder", "embedding", "layer")
STEPS = 16


def settings(modality: str, data: dict[str, str], stage: int, *more: str) -> list[str]:
    return [TINY[modality], f"data.path={data[modality]}", f"train.deepspeed=ds_configs/zero{stage}.json", *more]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, data: dict[str, str]) -> Path:
    """A folder of runs without dropout, or with layer drop alone."""
    folder = tmp_path_factory.mktemp("modalities")
    off = [f"model.dropout.{name}=0" for name in DROPOUTS]
    runs: dict[int, dict[str, list[str]]] = {1: {}, 2: {}}
    for modality in TINY:
        still = (*off, "optim.clip_norm=0.1")
        small = ["train.micro_batch=2"] if modality == "text" else []  # of speech it decides which clips meet
        runs[1][f"{modality}-one"] = settings(modality, data, 0, *still)
        runs[2][f"{modality}-shared"] = settings(modality, data, 2, *still, *small)
        runs[2][f"{modality}-split"] = settings(modality, data, 1, *still, "train.tensor_parallel=2")
    for stage in (0, 3):
        runs[2][f"layers-{stage}"] = settings("audio", data, stage, *off[:-1], "model.dropout.layer=0.5")
    for ranks, named in runs.items():
        pretrain(*([*given, f"run.dir={folder / name}"] for name, given in named.items()), ranks=ranks)
    return folder


@pytest.mark.parametrize("modality", TINY)
@pytest.mark.parametrize("how", ["shared", "split"])
def test_same_weights_however_ranks_share_the_batch(trained: Path, modality: str, how: str) -> None:
    assert_close(weights(trained / f"{modality}-{how}"), weights(trained / f"{modality}-one"))


def test_layer_drop_trains_alike_when_blocks_are_sharded(trained: Path) -> None:
    """Blocks that are left out have no gradient on any rank; what ZeRO 3 does about that must not differ."""
    assert_close(weights(trained / "layers-3"), weights(trained / "layers-0"))


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
    common = settings(modality, data, stage, f"train.precision={precision}", f"train.steps={STEPS}", "run.save_every=5")
    common.append(f"train.tensor_parallel={ranks}")
    whole, folder = tmp_path / "whole", tmp_path / "stopped"
    process = start("pretrain", *common, f"run.dir={folder}", ranks=ranks)
    wait_for(lambda: progress(folder) >= 3, process)
    process.send_signal(signal.SIGTERM)
    process.communicate()
    assert process.returncode == (75 if ranks == 1 else 1)  # torchrun's
    assert progress(folder) < STEPS
    pretrain(*([*common, f"run.dir={path}"] for path in (folder, whole)), ranks=ranks)
    assert_identical(folder, whole)


def test_another_tokenizer_is_refused(tmp_path: Path, data: dict[str, str]) -> None:
    common = [TINY["text"], f"run.dir={tmp_path / 'run'}", "train.steps=2"]
    told = run("pretrain", *common, f"data.path={data['text']}", "model.text.vocabulary=301", status=2).stderr
    assert "tokenizer of 300 ids" in told and "model.text.vocabulary=300" in told
    run("pretrain", *common, f"data.path={data['text']}")
    (tmp_path / "run" / "text.model").write_bytes(b"another")
    told = run("pretrain", *common, f"data.path={data['text']}", status=2).stderr
    assert "text.model is not the one that" in told
