"""Benchmarks run and report all that they promise; how fast they find this machine is not tested."""

from __future__ import annotations

import json
import re
from types import SimpleNamespace

import pytest
import soundfile
import torch

from benchmarks import loader, step
from benchmarks.curves import Curve, equal_quality, told
from benchmarks.memory import Line, table
from models.fused import linear
from pretrain.data.corpus import open_corpus
from pretrain.data.recordings import open_audio
from pretrain.data.sources import open_images
from pretrain.settings import ConfigError
from tests.launch import run

MODEL = [
    *("model.width=32", "model.heads=4", "model.prenet_depth=1", "model.depth=2", "model.num_masks=4"),
    *("model.image.patch=28", "model.decoder.width=32", "model.decoder.groups=4", "model.decoder.layers=2"),
    *("model.targets.top_k_layers=2", "model.mask.prob=0.7"),
]


def curve(seconds: float, *found: float) -> Curve:
    """A probe after each such time, twice as long for the processor."""
    points = [
        {"step": i, "seconds": i * seconds, "processor_seconds": 2 * i * seconds, "probe/linear": value}
        for i, value in enumerate(found, 1)
    ]
    return Curve(len(found), {"seconds": seconds, "processor_seconds": 2 * seconds}, points)


def test_times_to_equal_quality():
    ours, other = curve(1, 0.5, 0.7, 0.6, 0.9), curve(2, 0.3, 0.4, 0.8, 0.8, 0.5)
    assert [ours.time_to(level, "probe/linear", "seconds") for level in (0.4, 0.6, 0.7, 0.75, 0.91)] == [
        *(1, pytest.approx(1.5), 2, pytest.approx(3.5), None)
    ]
    found = equal_quality(ours, other, "probe/linear", "processor_seconds")
    assert found["best_of_baseline"] == 0.8 and found["baseline_at_best"] == 12  # the first of the two
    assert found["data2vec2_to_baselines_best"] == pytest.approx(2 * (3 + 2 / 3))
    assert found["speedup"] == pytest.approx(12 / (2 * (3 + 2 / 3)))
    assert found["best_of_data2vec2"] == 0.9 and found["data2vec2_at_best"] == 8
    assert found["baseline_to_data2vec2s_best"] is None and found["speedup_to_ours"] is None
    back = equal_quality(other, ours, "probe/linear", "seconds")
    assert back["speedup"] is None and back["speedup_to_ours"] == pytest.approx((3 + 2 / 3) / 6)
    assert "at no time" in told(found, "mae", "linear probe", "seconds")[1]


def test_training_time_is_steps_times_the_median(tmp_path):
    lines = [
        {"step": i, "seconds_per_step": s, "processor_seconds_per_step": s / 2} for i, s in enumerate((9, 1, 2), 1)
    ]
    (tmp_path / "speed.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 4, "sec')
    (tmp_path / "eval.jsonl").write_text(json.dumps({"step": 10, "probe/linear": 0.5}) + "\n")
    (point,) = Curve.of(tmp_path, 10).points
    assert (point["seconds"], point["processor_seconds"]) == (20, 10)


def figures(module: str, *args: str) -> dict:
    lines = run(module, *args, *MODEL).stdout.splitlines()
    return json.loads(lines[-1])


def test_step_takes_itself_apart(tmp_path):
    trace = tmp_path / "trace.json"
    arguments = ["--micro-batch=2", "--steps=2", "--zero=1", "--threads=1", f"--profile={trace}"]
    found = figures("benchmarks.step", *arguments, "train.batch_size=4")
    parts = found["parts"]
    assert set(parts) == {
        *("local features", "teacher", "student forward", "decoder forward", "backward", "optimizer"),
        *("teacher update", "loss, targets, rest"),
    }
    assert min(parts.values()) > 0
    assert sum(parts.values()) == pytest.approx(found["instrumented_seconds"], rel=0.05)
    assert found["images_per_s"] == pytest.approx(4 / found["seconds"], rel=1e-3)
    assert found["masked_views_per_s"] == pytest.approx(16 / found["seconds"], rel=1e-3)
    assert found["tflop_per_s"] == pytest.approx(found["tflop"] / found["seconds"], rel=1e-3)
    assert 0 < found["host_seconds"] <= found["seconds"] and found["operators"] > 300
    assert found["matrix_share"] > 0 and found["matrix_tflop_per_s"] > 0 and found["peak_gib"] > 0
    assert found["matrix_share_of_products"] > 0
    expected = {"precision": "fp32", "zero": 1, "micro_batch": 2, "accumulation": 2, "ranks": 1, "threads": 1}
    assert {key: found[key] for key in expected} == expected
    assert found["hardware"] and found["torch"] and found["command"].startswith("python -m benchmarks.step")
    assert json.loads(trace.read_text())["traceEvents"]


def test_a_switch_is_taken_in_turns(monkeypatch):
    seen, before = [], linear.FASTER
    trainer = SimpleNamespace(
        world=SimpleNamespace(device=torch.device("cpu")),
        config=SimpleNamespace(train=SimpleNamespace(precision="fp32")),
        step=lambda batch: (seen.append((batch, linear.FASTER)), SimpleNamespace(applied=True)),
    )
    monkeypatch.setattr(step, "MatrixRate", lambda *_: lambda: 2.0)
    monkeypatch.setattr(step, "random_batches", lambda *_: iter(["batch", "another"]))
    monkeypatch.setattr(step, "work_of_a_step", lambda _: 3.0)
    found = step.in_turn(trainer, step.Switch("models.fused.linear.FASTER=true,false"), steps=2, warmup=1)
    assert seen == [("batch", value) for value in (True, False, False, True, True, False)] and before == linear.FASTER
    for value in ("true", "false"):
        each = found[value]["seconds_each"]
        assert len(each) == 2 and found[value]["matrix_share_each"] == [3 / 2 / seconds for seconds in each]
        assert value in step.turns(found)
    for wrong in (
        "models.fused.linear.FASTR=true",
        "models.nothing.X=1",
        "models.fused.linear.FASTER=yes",
        "x",
        ".x.y=1",
    ):
        with pytest.raises(ConfigError, match=rf"^--switch {re.escape(wrong)}: .*; should be MODULE.NAME=VALUE,VALUE$"):
            step.Switch(wrong)


def test_loader_reports_every_modality():
    arguments = ["--seconds=0.1", "--files=2", "--workers", "1", "--formats", "jpeg", "flac_16000", "corpus"]
    lines = run("benchmarks.loader", *arguments).stdout.splitlines()
    image, speech, text = (json.loads(line) for line in lines)
    for found in (image, speech, text):
        total = found["cpu_ms"]
        assert found["samples_per_s_per_core"] == pytest.approx(1000 / total, rel=1e-3)
        assert found["mask_share"] == pytest.approx(found["mask_ms"] / total, rel=1e-3) and 0 < found["mask_share"] < 1
        assert found["hand_over_share"] == pytest.approx(found["hand_over_ms"] / total, rel=1e-3)
        assert found["hand_over_main_ms"] > 0
        for preset, rate in found["consumed_per_s"].items():
            assert found["cores_needed"][preset] == pytest.approx(rate * total / 1000, rel=1e-3)
        (beside,) = found["loading"]
        assert beside["workers"] == 1 and beside["samples_per_s"] > 0
        assert found["hardware"] and found["command"].startswith("python -m benchmarks.loader --seconds")
    assert [found["batch"] for found in (image, speech, text)] == [16, 1, 2]
    # What one H100 takes at 35, 45 and 40% of 989 TFLOP/s, of the work a sample that `--dry-run` prints.
    assert image["consumed_per_s"] == pytest.approx(
        {"image_base": 842, "image_large": 263, "image_huge14": 100}, rel=0.01
    )
    assert speech["consumed_per_s"] == pytest.approx({"audio_large": 32.8}, rel=0.02)
    assert text["consumed_per_s"] == pytest.approx({"text_large": 80}, rel=0.02)
    assert speech["audio_hours_per_s_per_core"] == pytest.approx(speech["samples_per_s_per_core"] * 20 / 3600, rel=1e-3)
    assert text["tokens_per_s_per_core"] == pytest.approx(text["samples_per_s_per_core"] * 512, rel=1e-3)


@pytest.mark.parametrize("name", loader.FORMATS)
def test_made_up_data_is_what_it_is_called(name, tmp_path, monkeypatch):
    monkeypatch.setenv("DATA2VEC_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "made"
    folder.mkdir()
    modality, write, _ = loader.FORMATS[name]
    write(folder, 2, **{"seconds": 2} if modality == "audio" else {})
    if modality == "image":
        source = open_images(str(folder))
        found = [source.read(i) for i in range(len(source))]
        sizes = {"idx": (28, 28), "jpeg_large": (1600, 1200)}
        assert [image.size for image in found] == [sizes.get(name, (500, 375))] * 2
        if name == "jpeg":  # as large as ImageNet's
            assert all(60_000 < file.stat().st_size < 140_000 for file in folder.rglob("*.jpg"))
    elif modality == "audio":
        kind, rate = name.split("_")
        files = sorted(folder.iterdir())
        assert [soundfile.info(str(file)).samplerate for file in files] == [int(rate)] * 2
        assert {file.suffix for file in files} == {f".{kind}"}
        assert open_audio(str(folder)).lengths.tolist() == [32_000] * 2
    else:
        corpus = open_corpus(folder)
        ids = corpus.read(0, corpus.tokens)
        assert len(ids) == 1024 and corpus.meta.documents == 2 and ids.min() >= 4 and ids.max() < 50_265


def test_memory_is_what_a_rank_holds():
    """Exit status 0: within 5%."""
    arguments = ["model.width=192", "--ranks", "1", "--zero", "3", "--precision", "bf16"]
    rows = [line.split() for line in run("benchmarks.memory", *arguments).stdout.splitlines()]
    measured = {row[3]: int(row[5].replace(",", "")) for row in rows if row[:3] == ["3", "bf16", "1"]}
    assert set(measured) == {"weights", "gradients", "optimizer", "teacher", "buffers", "other"}
    assert measured["optimizer"] > measured["teacher"] > measured["weights"] == measured["gradients"] > 0


def test_the_rank_that_is_furthest_off_is_shown():
    of_ranks = [Line("3", "bf16", 3, rank, "weights", 100, held) for rank, held in enumerate((101, 97, 102))]
    assert table(of_ranks).splitlines()[1].split() == ["3", "bf16", "3", "weights", "100", "97", "0.9700"]


def test_a_gpus_figures_come_in_one_go(tmp_path, monkeypatch):
    """As far as a CPU goes; what there is no time for is named."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # which takes minutes for what a GPU does in no time
    presets = ["--presets", "image_demo", "--compared", "image_demo", "--baselines", "image_mae_demo"]
    small = [
        "--precision=fp32",
        "--steps=1",
        "--most=2",
        "train.compile=false",
        "model.depth=2",
        "model.targets.top_k_layers=2",
    ]
    found = {}
    for minutes in ("5", "0"):
        run("benchmarks.gpu", *presets, f"--out={tmp_path}", f"--minutes={minutes}", *small)
        found[minutes] = json.loads((tmp_path / "figures.json").read_text())
        assert found[minutes]["command"] in (tmp_path / "table.md").read_text()
    cases = found["5"]["cases"]
    names = ["step", "agreement", "kernels", "compiled", "recomputed", "adam by torch"]
    assert list(cases) == [*(f"{name} image_demo" for name in names), "baseline image_mae_demo"]
    assert not found["5"]["left_out"]
    whys = [f"{choice} runs on GPUs alone" for choice in ("adam=deepspeed", "adam=apex", "norm=apex")]
    for why, sentence in zip(whys, found["5"]["not_here"], strict=True):
        assert why in sentence and f"Left out: {sentence}." in (tmp_path / "table.md").read_text()
    assert not any("error" in case for case in cases.values()), cases
    assert cases["step image_demo"]["micro_batch"] == 2 and (tmp_path / "trace.json").exists()
    assert {"fused", "torch", "fused but norm", "fused and grouped"} < set(cases["kernels image_demo"]["seconds"])
    assert set(cases["agreement image_demo"]["off"]) == set(cases["kernels image_demo"]["seconds"])
    assert all(off == [0, 0] for off in cases["agreement image_demo"]["off"].values())  # on a CPU all are torch's
    assert found["0"]["left_out"] == list(cases) and not found["0"]["cases"]
    assert "No time was left for: step image_demo" in (tmp_path / "table.md").read_text()
