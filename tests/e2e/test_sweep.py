"""python -m finetune.sweep, as a user has it: trials, their table, a second call; a trial resumed; predictions."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from pretrain.settings import read_tree
from tests.launch import ROOT, run, weights
from tests.unit.test_glue import STSB, text, word_tokenizer, write

RATES = ("1e-4", "2e-2")


def glue_folder(folder: Path) -> Path:
    """RTE, where the first word tells, and STS-B, where it is the score."""
    rng = np.random.default_rng(0)
    pairs = [(text(*rng.integers(4, 10, 4)), text(*rng.integers(10, 400, 5))) for _ in range(60)]
    labels = ["entailment" if int(a[1]) % 2 else "not_entailment" for a, _ in pairs]
    header = "index\tsentence1\tsentence2"
    rte = [f"{header}\tlabel", *(f"{i}\t{a}\t{b}\t{labels[i]}" for i, (a, b) in enumerate(pairs))]
    write(
        folder / "RTE",
        train=rte[:41],
        dev=[rte[0], *rte[41:]],
        test=[header, *(f"{i}\t{a}\t{b}" for i, (a, b) in enumerate(pairs[:7]))],
    )
    sts = [f"{STSB}\tscore", *("\t".join(["-"] * 7 + [a, b, f"{(int(a[1]) - 4):.3f}"]) for a, b in pairs)]
    write(folder / "STS-B", train=sts[:41], dev=[sts[0], *sts[41:]])
    return folder


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str], str]:
    """The folder, the command's arguments, and what it said."""
    folder = tmp_path_factory.mktemp("sweep")
    for name, task in (("rte", "RTE"), ("sts", "STS-B")):
        (folder / f"{name}.yaml").write_text(
            f"base: {ROOT / 'tests/tiny_finetune_text.yaml'}\ntext: {{task: {task}}}\n"
        )
    data = [f"data.path={glue_folder(folder / 'glue')}", "data.labels=null", "eval.splits=[dev]"]
    steps = ["train.steps=6", "eval.every=3", "run.save_every=3", "run.keep_last=3"]
    tokenizer = f"text.tokenizer={word_tokenizer(folder / 'tokenizer.json')}"
    configs = [str(folder / "rte.yaml"), str(folder / "sts.yaml")]
    arguments = [*configs, "--lr", *RATES, "--out", str(folder / "out"), *data, *steps, tokenizer]
    return folder, arguments, run("finetune.sweep", *arguments).stdout


def test_the_best_rate_is_that_of_the_best_checkpoints(swept: tuple[Path, list[str], str]) -> None:
    folder, _, said = swept
    found = json.loads((folder / "out" / "sweep.json").read_text())
    assert [choice["task"] for choice in found] == ["RTE", "STS-B"]
    for choice, name in zip(found, ("rte", "sts"), strict=True):
        scores = {}
        for rate in ("0.0001", "0.02"):
            trial = folder / "out" / name / f"lr{rate}_seed1"
            assert read_tree(trial / "config.yaml")["optim"]["lr"] == float(rate)
            lines = [json.loads(line) for line in (trial / "eval.jsonl").read_text().splitlines()]
            assert [line.pop("step") for line in lines] == [3, 6]
            scores[rate] = max(
                float(np.mean(list(line.values()))) for line in lines
            )  # of one split: the best checkpoint
        assert choice["medians"] == pytest.approx(scores)
        assert choice["lr"] == max(scores, key=lambda rate: scores[rate]) and choice["score"] == max(scores.values())
    assert set(found[1]["figures"]) == {"dev/pearson", "dev/spearman"}
    assert (folder / "out" / "sweep.md").read_text().strip() in said
    assert "| average of 2 |" in said


def test_the_same_command_runs_nothing_again(swept: tuple[Path, list[str], str]) -> None:
    folder, arguments, _ = swept
    before = {path: path.stat().st_mtime_ns for path in (folder / "out").rglob("eval.jsonl")}
    again = run("finetune.sweep", *arguments, "--tidy").stdout
    assert len(before) == 4 and before == {path: path.stat().st_mtime_ns for path in before}
    assert "trial " not in again and "| RTE |" in again
    chosen = {choice["lr"] for choice in json.loads((folder / "out" / "sweep.json").read_text())[:1]}
    assert {p.parent.name for p in (folder / "out" / "rte").glob("*/checkpoints")} == {f"lr{lr}_seed1" for lr in chosen}


def test_a_resumed_trial_is_the_same_to_the_bit_and_predicts(
    swept: tuple[Path, list[str], str], tmp_path: Path
) -> None:
    folder, arguments, _ = swept
    done = next((folder / "out" / "rte").glob("*/checkpoints/step_00000006")).parent.parent
    resumed = tmp_path / "resumed"
    shutil.copytree(done, resumed)
    shutil.rmtree(resumed / "checkpoints" / "step_00000006")
    (resumed / "checkpoints" / "latest").write_text("step_00000003\n")
    overrides = [word for word in arguments if "=" in word]
    rate = done.name.removeprefix("lr").removesuffix("_seed1")
    said = run("finetune", arguments[0], *overrides, f"optim.lr={rate}", "train.seed=1", f"run.dir={resumed}")
    assert "resuming after step 3" in said.stdout
    found, expected = weights(resumed), weights(done)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    run("finetune.predict", str(done), "--out", str(tmp_path / "out"))
    lines = (tmp_path / "out" / "RTE.tsv").read_text().splitlines()
    assert lines[0] == "index\tprediction" and len(lines) == 8
    assert {line.split("\t")[1] for line in lines[1:]} <= {"entailment", "not_entailment"}
