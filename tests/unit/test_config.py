"""Configuration: what overrides what, and that every mistake ends in one line that says what would be right."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from models.config import ModelConfig
from pretrain.__main__ import main
from pretrain.config import Config, DataConfig, ImageDataConfig, OptimConfig, TrainConfig, batch_plan, load
from pretrain.engine import OWNED_BY_YAML, engine_config, read_mechanics
from pretrain.settings import ConfigError, build, flat, to_yaml

ROOT = Path(__file__).parents[2]
DEMO = "configs/pretrain/image_demo.yaml"


def written(path, text):
    path.write_text(text)
    return path


@pytest.fixture
def config(tmp_path):
    """A function from YAML text and overrides to the loaded config."""
    return lambda text="", *overrides: load(written(tmp_path / "own.yaml", text), overrides)


def message(call, *args):
    """The text of the ConfigError that `call` has to raise; always one line."""
    with pytest.raises(ConfigError) as caught:
        call(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_an_empty_file_gives_the_defaults(config):
    assert config() == dataclasses.replace(Config(), run=dataclasses.replace(Config().run, dir="runs/own"))


def test_yaml_beats_base_and_overrides_beat_both(config, tmp_path):
    written(tmp_path / "low.yaml", "model: {width: 32, heads: 2, image: {patch: 8}}\ntrain: {steps: 1, seed: 2}")
    got = config("base: low.yaml\nmodel: {heads: 4}\ntrain: {steps: 5, batch_size: 6}", "train.batch_size=7")
    assert (got.model.width, got.model.heads, got.model.image.patch) == (32, 4, 8)
    assert (got.train.steps, got.train.seed, got.train.batch_size) == (5, 2, 7)
    assert got.model.depth == ModelConfig().depth


def test_the_later_override_wins(config):
    assert config("", "train.steps=2", "train.steps=3").train.steps == 3


def test_only_one_level_of_base(config, tmp_path):
    written(tmp_path / "lowest.yaml", "")
    written(tmp_path / "low.yaml", "base: lowest.yaml")
    assert "one level" in message(config, "base: low.yaml")
    assert "nowhere.yaml" in message(config, "base: nowhere.yaml")


@pytest.mark.parametrize(
    ("override", "key", "expected"),
    [
        ("optim.lr=1e-3", "optim.lr", 1e-3),  # text to YAML
        ("optim.lr=2", "optim.lr", 2.0),
        ("train.steps=1e3", "train.steps", 1000),
        ("train.micro_batch=4", "train.micro_batch", 4),
        ("train.micro_batch=null", "train.micro_batch", None),
        ("model.loss.scale=1", "model.loss.scale", 1.0),
        ("optim.betas=[0.9, 1e-1]", "optim.betas", (0.9, 0.1)),
        ("optim.exempt_1d=false", "optim.exempt_1d", False),
        ("data.path=/a=b,c:d", "data.path", "/a=b,c:d"),
        ("run.dir=2024", "run.dir", "2024"),
        ("run.dir=caf\udce9", "run.dir", "caf\udce9"),  # not UTF-8, as Python has it from the command line
    ],
)
def test_values_get_their_type(config, override, key, expected):
    value = flat(config("", override))[key]
    assert value == expected and type(value) is type(expected)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.stepz=3", "unknown key train.stepz; did you mean train.steps?"),
        ("model.widht=3", "unknown key model.widht; did you mean model.width?"),
        ("widht=3", "unknown key widht; did you mean model.width?"),
        ("micro_batch=3", "did you mean train.micro_batch?"),
        ("optin.lr=3", "unknown key optin; did you mean optim?"),
        ("qqqqqqqq=3", "know model, data, optim, ema, train, run, watch"),
        ("train=3", "train is a section with keys, not 3"),
        ("train.steps.more=3", "train.steps={'more': 3} should be a whole number"),
        ("train.steps=2.5", "train.steps=2.5 should be a whole number"),
        ("train.steps=many", "train.steps='many' should be a whole number"),
        ("train.steps=true", "train.steps=True should be a whole number"),
        ("train.steps=nan", "should be a whole number"),
        ("train.steps=.inf", "should be a whole number"),
        ("train.steps=", "train.steps=None should be a whole number"),
        ("optim.lr=fast", "optim.lr='fast' should be a number"),
        ("optim.exempt_1d=1", "optim.exempt_1d=1 should be true or false"),
        ("optim.betas=[0.9]", "optim.betas=[0.9] should be a list of 2 values"),
        ("optim.betas=[0.9, x]", "optim.betas[1]='x' should be a number"),
        ("data.path=[a]", "data.path=['a'] should be a text"),
        ("train.steps", "write section.key=value"),
    ],
)
def test_a_mistake_is_named(config, override, said):
    assert said in message(config, "", override)


@pytest.mark.parametrize(
    ("tree", "key", "meant"),
    [({"widht": 3}, "widht", "width"), ({"decoder": {"widht": 3}}, "decoder.widht", "decoder.width")],
)
def test_a_mistake_in_a_section_alone_is_named_as_in_the_whole(tree, key, meant):
    said = message(build, ModelConfig, tree, "model.", "x.safetensors")
    assert said == f"x.safetensors: unknown key model.{key}; did you mean model.{meant}?"


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["model.width=770"], "model.width=770 does not divide by model.heads=12"),
        (["model.image.size=225"], "model.image.size=225 does not divide by its patch=16"),
        (["model.targets.top_k_layers=11"], "top_k_layers=11 must be 1 to model.depth=10"),
        (["model.mask.prob=1"], "model.mask.prob=1.0 must hide at least one of 196 positions and leave one"),
        (["model.decoder.kernel=4"], "kernel=4 must be odd"),
        (["model.extra_tokens=0"], "needs model.extra_tokens >= 1"),
        (["model.modality=smell"], "know image"),
        (["train.precision=int8"], "know fp32, bf16, fp16"),
        (["train.seed=-1"], "train.seed=-1"),
        (["optim.lr=nan"], "optim.lr=nan must be positive and finite"),
        (["optim.lr=.inf"], "optim.lr=inf must be positive and finite"),
        (["optim.eps=.inf"], "optim.eps=inf must be positive and finite"),
        (["optim.clip_norm=-1"], "optim.clip_norm=-1.0"),
        (["optim.clip_norm=.inf"], "optim.clip_norm=inf must be 0 (off) or positive, and finite"),
        (["optim.clip_norm=.nan"], "optim.clip_norm=nan"),
        (["optim.weight_decay=.inf"], "optim.weight_decay=inf must be 0 or more, and finite"),
        (["optim.weight_decay=.nan"], "optim.weight_decay=nan"),
        (["data.image.crop_scale=[0.5, 0.2]"], "low <= high"),
        (["run.keep_last=0"], "run.keep_last=0"),
    ],
)
def test_numbers_have_to_fit_together(config, overrides, said):
    assert said in message(config, "", *overrides)


def test_all_that_does_not_fit_is_said_at_once(config):
    said = message(config, "", "optim.lr=-1", "model.width=770", "train.precision=int8")
    assert "optim.lr" in said and "model.width" in said and "train.precision" in said


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("train: [\n\nb", "is not valid YAML"),
        ("- 1\n- 2", "holds a list"),
        ("train:", "train is a section with keys"),
        ("1: 2", "unknown key 1"),
        ('train: {steps: "a\\nb"}', "should be a whole number"),
    ],
)
def test_a_broken_file_is_named(config, text, said):
    told = message(config, text)
    assert said in told and "own.yaml" in told


def test_a_missing_file_suggests_the_near_name():
    told = message(load, ROOT / "configs/pretrain/image_bsae.yaml")
    assert "No such file" in told and told.endswith("did you mean " + str(ROOT / "configs/pretrain/image_base.yaml?"))
    assert "did you mean" not in message(load, ROOT / "configs/pretrain/zzzzzz")


@pytest.mark.parametrize("file", sorted((ROOT / "configs" / "pretrain").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_config_loads_and_comes_back_from_its_text(config, file):
    resolved = load(file, ["optim.lr=3e-4", "model.loss.scale=0.5", "train.micro_batch=640000"])
    assert config(to_yaml(resolved)) == resolved
    assert resolved.run.dir == f"runs/{file.stem}"


def test_every_section_comes_back_from_its_text(config):
    odd = Config(
        data=DataConfig(path="a: b", image=ImageDataConfig(crop_ratio=(1 / 3, 3.0))),
        optim=OptimConfig(eps=1e-12, betas=(0.1, 1 - 1e-9)),
    )
    got = config(to_yaml(odd), "run.dir=x")
    assert (got.model, got.data, got.optim, got.ema, got.train) == (odd.model, odd.data, odd.optim, odd.ema, odd.train)


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("micro", [None, 2, 1])
def test_ranks_times_micro_batch_times_accumulation_is_the_batch(ranks, micro):
    plan = batch_plan(TrainConfig(batch_size=24, micro_batch=micro), ranks)
    assert (plan.ranks, plan.micro_batch) == (ranks, micro or 24 // ranks)
    assert plan.ranks * plan.micro_batch * plan.accumulation == 24


def test_a_batch_that_does_not_divide_names_what_would():
    told = message(batch_plan, TrainConfig(batch_size=24), 5)
    assert "train.batch_size=24 does not divide over 5 ranks" in told
    assert "2, 3, 4, 6 ranks would" in told and told.endswith("a batch of 25")
    told = message(batch_plan, TrainConfig(batch_size=24, micro_batch=5), 2)
    assert "train.micro_batch=5" in told and "share of 12" in told and told.endswith("these do: 1, 2, 3, 4, 6, 12")


@pytest.mark.parametrize("key", OWNED_BY_YAML)
def test_a_deepspeed_file_may_not_set_what_the_yaml_owns(tmp_path, key):
    told = message(read_mechanics, str(written(tmp_path / "own.json", json.dumps({key: 1}))))
    assert f"sets {key}" in told and OWNED_BY_YAML[key] in told


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{,", "not valid JSON"),
        ('{"zero_optimization": {"stage": 4}}', "stage 4 is not supported"),
        (
            '{"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}}',
            "offload_param of zero_optimization is not supported",
        ),
        ('{"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}}', "to 'nvme' at ZeRO stage 3"),
        ('{"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}', "to 'cpu' at ZeRO stage 0"),
        ('{"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 2}}', "zero_hpz_partition_size"),
        ('{"zero_optimization": {"stage": 1, "offload_optimizer": "cpu"}}', "should be a mapping"),
        ('{"zero_optimization": {"stage": []}}', "stage [] is not supported"),
    ],
)
def test_a_deepspeed_file_that_cannot_be_used(tmp_path, text, said):
    assert said in message(read_mechanics, str(written(tmp_path / "own.json", text)))
    assert "zero0.json" in message(read_mechanics, str(tmp_path / "nowhere.json"))


@pytest.mark.parametrize("zero", ["1_offload", "2_offload", "3_offload"])
def test_offload_and_layer_drop_are_refused_together(zero):
    own = ["train.micro_batch=320000", "train.batch_size=320000", f"train.deepspeed=ds_configs/zero{zero}.json"]
    config = load("configs/pretrain/audio_base.yaml", own)
    told = message(engine_config, config, batch_plan(config.train, 1))
    assert f"zero{zero}.json offloads" in told and "model.dropout.layer=0.05" in told
    without = load("configs/pretrain/audio_base.yaml", [*own, "model.dropout.layer=0"])
    assert engine_config(without, batch_plan(without.train, 1))["zero_optimization"]["offload_optimizer"]


def test_compiling_at_stage_3_is_refused(config):
    run = config("", "train.compile=true", "train.deepspeed=ds_configs/zero3.json")
    with pytest.raises(ConfigError, match=r"train\.compile needs ZeRO 0, 1 or 2; set train\.deepspeed"):
        engine_config(run, batch_plan(run.train, 1))


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_deepspeed_gets_the_numbers_of_the_yaml(config, stage, precision):
    zero = f"train.deepspeed=ds_configs/zero{stage}.json"
    run = config("", zero, f"train.precision={precision}", "optim.clip_norm=3")
    got = engine_config(run, batch_plan(dataclasses.replace(run.train, micro_batch=8), 4))
    assert got["zero_optimization"]["stage"] == stage
    assert got["gradient_clipping"] == (
        3.0 if stage == 3 or precision == "fp16" else 0.0
    )  # else the optimizer's kernel
    sizes = [got[k] for k in ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")]
    assert sizes == [256, 8, 8]
    on = {k for k in ("fp16", "bf16", "torch_autocast") if got.get(k, {}).get("enabled")}
    assert on == {"fp32": set(), "bf16": {"bf16" if stage else "torch_autocast"}, "fp16": {"fp16"}}[precision]


@pytest.fixture
def command(monkeypatch, capsys):
    """A function from arguments to (status, output, lines of errors) of `python -m pretrain`, in this process."""

    def run(*arguments):
        monkeypatch.chdir(ROOT)
        monkeypatch.setattr(sys, "argv", ["pretrain", *arguments])
        status = main()
        out, err = capsys.readouterr()
        return status, out, err.splitlines()

    return run


BROKEN = [
    ["nowhere.yaml"],
    [DEMO, "train.stepz=3"],
    [DEMO, "optim.lr=-1", "train.precision=int8"],
    [DEMO, "train.deepspeed=nowhere.json", "--dry-run"],
    [DEMO, "train.batch_size=30", "--ranks", "4", "--dry-run"],
]
# Values out of range, and files of another shape than expected.
ODD = {
    "decoder.groups": [DEMO, "model.decoder.groups=0"],
    "decoder.kernel": [DEMO, "model.decoder.kernel=-1"],
    "decoder.layers": [DEMO, "model.decoder.layers=-1"],
    "extra_tokens": [DEMO, "model.extra_tokens=-1", "model.loss.cls=0"],
    "prenet_depth": [DEMO, "model.prenet_depth=-1"],
    "image.size": [DEMO, "model.image.size=-4"],
    "mlp_ratio": [DEMO, "model.mlp_ratio=-1"],
    "mask.length": [DEMO, "model.mask.length=0"],
    "nothing seen": [DEMO, "model.mask.prob=0.999"],
    "nothing hidden": [DEMO, "model.mask.prob=0.001", "model.mask.inverse=false"],
    "mask.adjust": [DEMO, "model.mask.adjust=-5"],
    "ranks": [DEMO, "--ranks", "0"],
    "base: 3": ["{tmp}/base.yaml"],
    "JSON list": [DEMO, "train.deepspeed={tmp}/list.json"],
    "JSON section": [DEMO, "train.deepspeed={tmp}/section.json"],
    "JSON bytes": [DEMO, "train.deepspeed={tmp}/bytes.json"],
}


@pytest.mark.parametrize("arguments", BROKEN, ids=lambda a: " ".join(a[-2:]))
def test_the_command_ends_in_one_line(command, arguments):
    status, _, lines = command(*arguments)
    assert status == 2 and len(lines) == 1 and lines[0].startswith("error: ")


@pytest.mark.parametrize("case", ODD)
def test_the_command_ends_in_one_line_also_for_odd_values(command, case, tmp_path):
    written(tmp_path / "base.yaml", "base: 3")
    written(tmp_path / "list.json", "[]")
    written(tmp_path / "section.json", '{"zero_optimization": 1}')
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe")
    status, _, lines = command(*(a.format(tmp=tmp_path) for a in ODD[case]), "--dry-run")
    assert status == 2 and len(lines) == 1 and lines[0].startswith("error: ")


def test_dry_run_prints_the_config_and_its_costs(command, config):
    status, out, _ = command("configs/pretrain/image_base.yaml", "train.steps=1000", "--ranks", "16", "--dry-run")
    text, costs = out.split("\n\n")
    assert status == 0 and config(text) == load(ROOT / "configs/pretrain/image_base.yaml", ["train.steps=1000"])
    # By hand: extra token, patch embedding, context norm and twelve blocks; six convolutions and a projection.
    student = 768 + (768 * 768 + 768) + 2 * 768 + 12 * (12 * 768**2 + 13 * 768)
    decoder = 6 * (768 * 48 * 9 + 768) + 768**2 + 768
    assert f"{(student + decoder) / 1e6:.2f} M trained (student {student / 1e6:.2f} M" in costs
    assert "196 positions, 39 seen, 157 predicted" in costs
    assert "256 images = 16 ranks x 16 x 1" in costs


def test_exit_status_and_streams_of_the_process():
    runs = [
        subprocess.Popen([sys.executable, "-m", "pretrain", DEMO, argument], cwd=ROOT, stdout=-1, stderr=-1, text=True)
        for argument in ("train.stepz=3", "--dry-run")
    ]
    (_, error), (costs, nothing) = (run.communicate() for run in runs)
    assert [run.returncode for run in runs] == [2, 0]
    assert error.startswith("error: ") and error.count("\n") == 1 and "did you mean train.steps?" in error
    assert "M trained" in costs and nothing == ""


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (["train.micro_batch=null"], "train.micro_batch=None must be given for speech"),
        (["train.micro_batch=100000"], "at least 320000 for a clip of model.audio.seconds=20"),
        (["data.audio.min_seconds=30"], "data.audio.min_seconds=30.0 is longer than model.audio.seconds=20"),
        (["data.audio.min_seconds=0.02"], "none could be hidden"),
        (["data.audio.min_seconds=0.06", "data.audio.multiple=700"], "none could be hidden"),
        (["data.audio.pool=0"], "data.audio.pool and data.audio.multiple must be at least 1"),
    ],
)
def test_speech_that_cannot_be_batched(changes, told):
    with pytest.raises(ConfigError, match=r"^[^\n]+$") as error:
        load(ROOT / "configs/pretrain/audio_base.yaml", changes)
    assert told in str(error.value)


PUBLISHED = {  # docs/method.md 3, the published files; what presets share stands once
    "model.width": (768, 1024, 1280, 768, 1024, 768, 1024, 1024),
    "model.heads": (12, 16, 16, 12, 16, 12, 16, 16),
    "model.prenet_depth": (2, 0, 0, 0, 8, 0, 0, 0),
    "model.depth": (10, 24, 32, 12, 16, 12, 24, 24),
    "model.targets.top_k_layers": (10, 18, 24, 8, 16, 12, 24, 24),
    "model.num_masks": (16, 16, 16, 8, 12, 8, 8, 8),
    "model.mask.prob": (0.8, 0.75, 0.75, 0.5, 0.55, 0.48, 0.5, 0.5),
    "model.mask.adjust": (0.07, 0.1, 0.1, 0.05, 0.1, 0, 0, 0),
    "model.mask.length": (3, 3, 3, 5, 5, 1, 1, 1),
    "model.mask.inverse": (True, True, True, False, False, True, True, True),
    "model.decoder.width": (768, 1024, 1024, 384, 768, 768, 768, 768),
    "model.decoder.groups": (16, 16, 16, 16, 16, 1, 1, 1),
    "model.decoder.kernel": (3, 5, 5, 7, 7, 9, 9, 9),
    "model.decoder.layers": (6, 3, 3, 4, 4, 5, 5, 5),
    "model.decoder.residual": (True, True, True, True, True, False, False, False),
    "model.decoder.projection_layers": (1, 1, 1, 1, 1, 2, 2, 2),
    "model.dropout.residual": (0, 0, 0, 0.1, 0.1, 0.1, 0.1, 0.1),
    "model.dropout.attention": (0, 0, 0, 0.1, 0.1, 0.1, 0.1, 0.1),
    "model.dropout.mlp": (0, 0, 0, 0.1, 0.1, 0.1, 0.1, 0.1),
    "model.dropout.prenet": (0, 0, 0, 0.1, 0.1, 0, 0, 0),
    "model.dropout.decoder": (0, 0, 0, 0.1, 0.1, 0.1, 0.1, 0.1),
    "model.dropout.layer": (0, 0, 0, 0.05, 0, 0, 0, 0),
    "model.norm_eps": (1e-6, 1e-6, 1e-6, 1e-5, 1e-5, 1e-5, 1e-5, 1e-5),
    "model.loss.cls": (0.01, 0.01, 0.01, 0, 0, 0, 0, 0),
    "model.loss.beta": (0, 0, 0, 0, 0, 0, 0, 4),
    "ema.start": (0.9998, 0.9998, 0.9998, 0.999, 0.9997, 0.9999, 0.9999, 0.9999),
    "ema.end": (0.99999, 0.99999, 1, 0.99999, 1, 0.99999, 0.99999, 0.99999),
    "ema.anneal_steps": (100_000, 150_000, 300_000, 75_000, 300_000, 100_000, 100_000, 100_000),
    "optim.lr": (1e-3, 4e-4, 4e-4, 7.5e-4, 4e-4, 2e-4, 1e-4, 1e-4),
    "optim.betas": (*((0.9, 0.95),) * 3, *((0.9, 0.98),) * 5),
    "optim.eps": (1e-8, 1e-8, 1e-8, 1e-6, 1e-6, 1e-6, 1e-6, 1e-6),
    "optim.weight_decay": (0.05, 0.05, 0.05, 0.01, 0.01, 0.01, 0.01, 0.01),
    "optim.clip_norm": (4, 4, 4, 0, 1, 1, 1, 1),
    "optim.warmup_steps": (50_040, 50_040, 50_040, 8_000, 10_000, 4_000, 4_000, 4_000),
    "train.steps": (375_300, 375_300, 500_000, 400_000, 600_000, 1_000_000, 600_000, 1_000_000),
    "train.batch_size": (256, 128, 256, 8_000_000, 15_360_000, 64, 64, 64),
}
PRESETS = ("image_base", "image_large", "image_huge14", "audio_base", "audio_large")
PRESETS += ("text_base", "text_large", "text_large_1m")


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_the_published_ones(name):
    config, place = load(ROOT / f"configs/pretrain/{name}.yaml"), PRESETS.index(name)
    ours = flat(config)
    wanted = {key: values[place] for key, values in PUBLISHED.items()}
    assert {key: ours[key] for key in wanted} == wanted
    model = config.model
    hidden = {"image_base": 157, "image_large": 147, "image_huge14": 192, "audio_base": 499, "audio_large": 549}
    assert model.mask.hidden(model.positions) == hidden.get(name, 246 if name == "text_base" else 256)
    assert model.loss_scale == (1 if model.modality == "text" else model.width**-0.5)
    norms = model.targets
    assert (norms.instance_norm_layer, norms.layer_norm_layer, norms.layer_norm, norms.instance_norm) == (
        {"image": (True, False, True, False), "audio": (True, False, False, False)}.get(
            model.modality, (False, True, False, True) if "large" in name else (True, False, False, False)
        )
    )
