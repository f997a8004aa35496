"""Baselines through the same loop: killed and continued, shared by ranks, probed, fine-tuned, converted; and beside
data2vec in the benchmark."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from finetune.features import load_encoder
from finetune.report import report
from pretrain.full import read
from pretrain.settings import ConfigError
from tests.launch import assert_close, pretrain, run, weights
from tests.unit.test_baselines import FILES, OBJECTIVES, OVERRIDES, SMALL

STEPS = 24
DROPOUT = ["model.dropout.residual=0", "model.dropout.prenet=0", "model.dropout.attention=0", "model.dropout.layer=0"]


def jobs(data: dict[str, str], stage: int, *more: str, steps: int = STEPS) -> dict[str, list[str]]:
    """objective -> config and overrides."""
    paths = {"mae": "data/fashion_mnist", "wav2vec2": data["audio"], "mlm": data["text"]}
    common = [
        f"train.steps={steps}",
        "run.save_every=5",
        f"train.deepspeed=ds_configs/zero{stage}.json",
        "optim.lr=3e-3",
    ]
    jobs = {}
    for name in OBJECTIVES:
        own = (f"model.objective={name}", *SMALL, *OVERRIDES[name])
        jobs[name] = [f"tests/{FILES[name]}", *own, *common, f"data.path={paths[name]}", *more]
    return jobs


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, data: dict[str, str]) -> Path:
    """Every objective, with dropout and layer drop, on one rank at ZeRO 1."""
    folder = tmp_path_factory.mktemp("baselines")
    run("tests.dist.baseline_worker", str(folder), json.dumps(jobs(data, 1)))
    return folder


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_killed_and_continued(trained: Path, objective: str) -> None:
    whole, killed = trained / "whole" / objective, trained / "killed" / objective
    assert "resuming after step 5" in (killed / "log.txt").read_text()
    assert (whole / "metrics.jsonl").read_bytes() == (killed / "metrics.jsonl").read_bytes()
    found, expected = weights(killed), weights(whole)
    assert found.keys() == expected.keys() and not any(name.startswith("teacher/") for name in found)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_loss_falls(trained: Path, objective: str) -> None:
    found = losses(trained / "whole" / objective)
    assert len(found) == STEPS
    assert sum(found[-4:]) < 0.98 * sum(found[:4])


def test_the_same_weights_however_ranks_share_the_batch(tmp_path: Path, data: dict[str, str]) -> None:
    """But for wav2vec 2.0, whose codes each rank draws by itself."""
    one = {name: job for name, job in jobs(data, 0, *DROPOUT, steps=6).items() if name != "wav2vec2"}
    two = {name: [*job, "train.micro_batch=2", "train.deepspeed=ds_configs/zero2.json"] for name, job in one.items()}
    for ranks, jobs_of in ((1, one), (2, two)):
        pretrain(*([*job, f"run.dir={tmp_path / str(ranks) / name}"] for name, job in jobs_of.items()), ranks=ranks)
    for name in one:
        folders = [tmp_path / str(ranks) / name for ranks in (1, 2)]
        assert losses(folders[1]) == pytest.approx(losses(folders[0]), rel=1e-5)
        found, expected = weights(folders[1]), weights(folders[0])
        without = [key for key in expected if not key.endswith(("k_proj.bias", "key.bias"))]  # rounding noise alone
        assert_close({key: found[key] for key in without}, {key: expected[key] for key in without})


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_what_is_trained_can_be_used(trained: Path, objective: str) -> None:
    """Read as a whole, and its encoder as frozen features, `which` naming the same one."""
    full = read(trained / "whole" / objective)
    assert full.step == STEPS and full.model.objective == objective
    folder = trained / "whole" / objective
    frozen, same = (load_encoder(folder, which).encoder.state_dict() for which in ("student", "teacher"))
    assert frozen.keys() == same.keys()
    for name, value in frozen.items():
        assert torch.equal(same[name], value) and torch.equal(full.tensors[f"student.{name}"], value), name


def test_a_baseline_is_fine_tuned_and_converted(trained: Path, tmp_path: Path) -> None:
    start, out = trained / "whole" / "mae", tmp_path / "mae.safetensors"
    run("convert", str(start), str(out))
    assert (
        "which only has the form NAME.safetensors" in run("convert", str(start), str(tmp_path / "hf"), status=2).stderr
    )
    with pytest.raises(ConfigError, match=r"model\.objective=mae: the picture is data2vec's"):
        report(start)
    given = (f"train.init_from={out}", f"run.dir={tmp_path / 'tuned'}", "model.prenet_depth=0")
    done = run("finetune", "tests/tiny_finetune.yaml", *given)
    assert f"weights: {out}, step {STEPS}" in done.stdout
    assert json.loads((tmp_path / "tuned" / "labels.json").read_text())


def test_the_benchmark_tells_and_draws(tmp_path: Path) -> None:
    """Of models that a test can train; how fast which of them is, is not tested. A second call has nothing to do."""
    small = ("width=32", "heads=4", "depth=2", "targets.top_k_layers=2", "image.patch=7")
    given = [*(f"model.{line}" for line in small), "model.mae={width: 24, depth: 1, heads: 3}", "train.batch_size=8"]
    given += ["data2vec2:model.num_masks=2", "data.path=data/fashion_mnist", "probe.samples=100", "probe.test=50"]
    given += ["model.decoder.width=32", "model.decoder.groups=4", "run.keep_last=1"]
    options = [
        "--modality=image",
        "--minutes=0.02",
        "--points=2",
        "--calibrate=0.1",
        "--slice=100",
        f"--out={tmp_path}",
    ]
    told = run("benchmarks.efficiency", *options, *given).stdout
    assert "linear probe: data2vec2 reaches mae's best" in told and "linear probe: mae reaches data2vec2's best" in told
    found = json.loads((tmp_path / "efficiency.json").read_text())
    for name, curve in found["curves"].items():
        assert [point["step"] for point in curve["points"]] == [curve["steps"] // 2, curve["steps"]]
        last = curve["points"][-1]
        assert last["seconds"] == pytest.approx(curve["steps"] * curve["seconds_per_step"], rel=1e-3)
        assert curve["processor_seconds_per_step"] > 0 and 0 <= last["probe/linear"] <= 1
        assert (tmp_path / name / "checkpoints" / "latest").read_text() == f"step_{curve['steps']:08d}\n"
    assert (tmp_path / "efficiency.png").read_bytes().startswith(b"\x89PNG")
    wrong = run("benchmarks.efficiency", *options, *given, "train.seed=2", status=2)
    assert "holds another benchmark (overrides differ)" in wrong.stderr
