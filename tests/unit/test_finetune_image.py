"""Fine-tuning on images: drop path, positions on another grid, rates by layer, labels, evaluation crops."""

from __future__ import annotations

import itertools
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from finetune import evaluate
from finetune.config import Config, FineTuningOptimConfig, load
from finetune.image import LEFT_OUT, ImageTask, shares
from finetune.optim import parameter_groups
from finetune.task import Examples
from finetune.train import FineTuning
from models.config import DropoutConfig, HeadConfig, ModelConfig
from models.data2vec import Data2Vec, Encoder
from models.encoder import DropPath
from models.heads import FineTuned
from models.image import sincos_positions
from pretrain import full
from pretrain.data.image import ImageDataset
from pretrain.data.sources import DataError, open_images
from pretrain.full import Full
from pretrain.parallel import World
from pretrain.settings import ConfigError, to_tree
from tests.launch import ROOT

TINY = ROOT / "tests" / "tiny_finetune.yaml"


def model(**changes: object) -> ModelConfig:
    return ModelConfig(width=32, heads=4, prenet_depth=2, depth=4, **changes)


@pytest.mark.parametrize(("prenet", "depth"), [(2, 10), (0, 24), (0, 32), (1, 2), (0, 1)])
def test_drop_path_grows_as_in_the_reference(prenet: int, depth: int) -> None:
    rates = np.linspace(0, 0.2, depth)  # the reference spreads it over as many steps as there are main blocks,
    before = np.linspace(0, rates[prenet - 1], prenet) if prenet else []  # hands the prenet the first of them
    expected = [*before, *np.linspace(rates[prenet], rates[-1], depth)]  # and spreads the rest again
    config = ModelConfig(prenet_depth=prenet, depth=depth, dropout=DropoutConfig(path=0.2))
    assert config.path_rates() == pytest.approx(expected)


def test_each_block_has_its_rate() -> None:
    config = model(dropout=DropoutConfig(path=0.3))
    encoder = Encoder(config)
    rates = [block.drop_path.rate for block in (*encoder.prenet, *encoder.blocks)]
    assert rates == config.path_rates() == pytest.approx([0, 0.1, 0.2, 0.7 / 3, 0.8 / 3, 0.3])


def test_drop_path_leaves_out_whole_samples_and_makes_up_for_it() -> None:
    torch.manual_seed(0)
    x = torch.randn(20_000, 3, 2)
    dropped = DropPath(0.3)(x)
    kept = dropped.abs().sum((1, 2)) > 0
    assert kept.float().mean() == pytest.approx(0.7, abs=0.015)
    torch.testing.assert_close(dropped[kept], x[kept] / 0.7)
    assert torch.equal(DropPath(0.3).eval()(x), x)


def test_drop_path_goes_around_attention_and_mlp() -> None:
    """A block of rate 1 - tiny leaves nothing but the residual and its norms."""
    encoder = Encoder(model(dropout=DropoutConfig(path=0.999999))).train()
    block, x = encoder.blocks[-1], torch.randn(2, 5, 32)
    out, ffn = block(x)
    torch.testing.assert_close(out, block.norm2(block.norm1(x)))
    assert ffn.abs().sum() > 0  # targets are made of it all the same
    assert not torch.allclose(block.eval()(x)[0], out)


def test_no_drop_path_draws_nothing() -> None:
    plain, network = torch.get_rng_state(), Encoder(model()).train()
    state = torch.get_rng_state()
    network.blocks[0](torch.zeros(2, 3, 32))
    assert torch.equal(torch.get_rng_state(), state) and not torch.equal(plain, state)


def test_positions_of_the_own_grid_are_those_of_ever() -> None:
    assert torch.equal(sincos_positions(64, 7), sincos_positions(64, 7, 7))
    assert torch.equal(sincos_positions(64, 7)[8, :2], torch.tensor([1.0, 10000 ** (-1 / 16)]).sin())


@pytest.mark.parametrize("grid", [7, 21, 28])
def test_positions_of_another_grid_are_the_interpolated_table(grid: int) -> None:
    """Against what ViTs do with learned positions: bicubic interpolation, exact where sines are slow."""
    width, known = 128, 14
    table = sincos_positions(width, known).T.reshape(1, width, known, known)
    bicubic = F.interpolate(table, size=(grid, grid), mode="bicubic", align_corners=False)[0].flatten(1).T
    found = sincos_positions(width, grid, known)
    inner = torch.zeros(grid, grid, dtype=torch.bool)
    inner[grid // 7 : -(grid // 7), grid // 7 : -(grid // 7)] = True  # beyond the table's edge bicubic has only copies
    difference = (found - bicubic)[inner.flatten()].abs()
    slow = torch.cat([torch.arange(32) >= 4] * 4)
    assert difference.max() < 0.15 and difference[:, slow].max() < 0.015
    assert not torch.allclose(found, sincos_positions(width, grid), atol=0.1)


def test_each_third_position_is_one_of_the_known() -> None:
    fine, known = sincos_positions(32, 21, 7).view(21, 21, -1), sincos_positions(32, 7).view(7, 7, -1)
    torch.testing.assert_close(fine[1::3, 1::3], known)


@pytest.fixture
def pretrained(tmp_path: Path) -> Path:
    config = load(TINY)
    torch.manual_seed(0)
    weights = Data2Vec(config.model).state_dict()
    full.write(Full(weights, {"model": to_tree(config.model)}), tmp_path / "start.safetensors")
    return tmp_path / "start.safetensors"


def test_another_size_takes_the_positions_along(pretrained: Path, tmp_path: Path) -> None:
    start = f"train.init_from={pretrained}"
    assert load(TINY, [start]).model.image.positions == 0
    larger = load(TINY, [start, "model.image.size=56"])
    assert (larger.model.image.positions, larger.model.image.grid) == (4, 8)
    network = FineTuned(larger.model, HeadConfig(3))
    found = full.read(pretrained).encoder()
    network.student.load_state_dict(found)
    torch.testing.assert_close(network.student.positions.table, sincos_positions(32, 8, 4))
    assert network(torch.zeros(2, 1, 56, 56, dtype=torch.uint8)).shape == (2, 3)
    settings = {"model": to_tree(larger.model), "head": {"outputs": 3}}
    full.write(Full(network.state_dict(), settings), tmp_path / "b.safetensors")
    again = load(TINY, [f"train.init_from={tmp_path / 'b.safetensors'}", "model.image.size=84"])
    assert again.model.image.positions == 4


def test_rates_fall_towards_the_input() -> None:
    network = FineTuned(model(), HeadConfig(5))
    names = {id(p): name for name, p in network.named_parameters()}
    groups = parameter_groups(network, FineTuningOptimConfig(layer_decay=0.65, weight_decay=0.05))
    rate = {names[id(p)]: g["lr_scale"] for g in groups for p in g["params"]}
    decay = {names[id(p)]: g["weight_decay"] for g in groups for p in g["params"]}
    assert rate.keys() == names_of(network) and len(groups) == 16
    # The reference: six blocks make seven layers; block i, counted from 0, has 0.65 ** (7 - (i + 1)).
    for i, block in enumerate(["prenet.0", "prenet.1", "blocks.0", "blocks.1", "blocks.2", "blocks.3"]):
        assert rate[f"student.{block}.attn.qkv.weight"] == pytest.approx(0.65 ** (7 - (i + 1)))
        assert rate[f"student.{block}.norm1.bias"] == rate[f"student.{block}.mlp.fc1.weight"]
    for name in ("student.local.proj.weight", "student.extra_tokens.weight", "student.context_norm.weight"):
        assert rate[name] == 1
    assert rate["head.linear.weight"] == rate["head.norm.bias"] == 1
    scaled = parameter_groups(network, FineTuningOptimConfig(head_scale=20))
    assert {g["head"]: g["lr_scale"] for g in scaled} == {True: 20, False: 1}
    for scale in ("0", ".inf", ".nan"):
        with pytest.raises(ConfigError, match=r"optim\.head_scale=.* must be positive and finite"):
            load(TINY, [f"optim.head_scale={scale}"])
    assert decay["head.linear.weight"] == 0.05 and decay["head.linear.bias"] == decay["head.norm.weight"] == 0


def names_of(network: torch.nn.Module) -> set[str]:
    return {name for name, _ in network.named_parameters()}


def test_labels_are_smoothed_as_published() -> None:
    found = shares(torch.tensor([2, LEFT_OUT, 0]), 4, 0.1)
    expected = torch.tensor([[0.025, 0.025, 0.925, 0.025], [0.0] * 4, [0.925, 0.025, 0.025, 0.025]])
    torch.testing.assert_close(found, expected)


@pytest.fixture(scope="module")
def opened() -> ImageTask:
    return ImageTask(load(TINY, ["image.smoothing=0.1"]), progress=False)


def examples(classes: list[int]) -> Examples:
    pixels = torch.randint(0, 256, (len(classes), 1, 28, 28), dtype=torch.uint8)
    return Examples(pixels, torch.tensor(classes), sum(c != LEFT_OUT for c in classes))


def test_smoothed_loss_is_pytorchs_own_and_skips_what_is_left_out(opened: ImageTask) -> None:
    torch.manual_seed(1)
    outputs, given = torch.randn(4, 10), examples([3, LEFT_OUT, 9, 0])
    augmented = opened.augment(given)
    assert torch.equal(augmented.inputs, given.inputs) and augmented.count == 3
    expected = F.cross_entropy(outputs[[0, 2, 3]], torch.tensor([3, 9, 0]), reduction="sum", label_smoothing=0.1)
    torch.testing.assert_close(opened.loss(outputs, augmented), expected)


def test_without_a_recipe_nothing_is_touched() -> None:
    task, given = ImageTask(load(TINY), progress=False), examples([3, 9])
    augmented = task.augment(given)
    assert augmented.inputs is given.inputs and augmented.targets is given.targets


def test_mixed_images_are_normalised_as_the_network_does() -> None:
    task, given = ImageTask(load(TINY, ["image.mixup=0.7", "image.mix_prob=0"]), progress=False), examples([3, 9])
    augmented = task.augment(given)
    torch.testing.assert_close(augmented.inputs, (given.inputs / 255.0 - 0.286) / 0.353)
    assert torch.equal(augmented.targets, torch.eye(10)[[3, 9]])
    network = FineTuned(task.resolved.model, task.resolved.head).eval()
    torch.testing.assert_close(network(augmented.inputs), network(given.inputs))


def test_a_mixed_in_image_that_was_replaced_teaches_nothing() -> None:
    task = ImageTask(load(TINY, ["image.mixup=0.7", "image.smoothing=0.1"]), progress=False)
    mixed = task.augment(examples([3, LEFT_OUT]))
    assert float(mixed.targets.sum()) == pytest.approx(1)  # as much as `count`
    assert mixed.targets[1].argmax() == 3


def test_top_classes(opened: ImageTask) -> None:
    references = opened.evaluated["test"].references
    outputs = torch.full((len(references), 10), 0.0)
    outputs[range(len(references)), references] = 0.5
    outputs[: len(references) // 2, :4] = 1.0  # four others before it, unless it is one of them
    outputs[range(len(references) // 4), (references[: len(references) // 4] + 7) % 10] = 2.0
    found = opened.score("test", opened.predict(outputs, examples([0] * len(references))))
    order = outputs.argsort(dim=1, descending=True).numpy()
    rank = np.array([list(row).index(c) for row, c in zip(order, references, strict=True)])
    ties = (outputs == outputs.gather(1, torch.from_numpy(references)[:, None])).sum(1).numpy() > 1
    assert found["top5"] == pytest.approx((rank < 5).mean(), abs=ties.mean() + 1e-9)
    assert opened.best(found) == found["accuracy"] < found["top5"] <= 1


def test_what_stands_in_for_a_lost_image_is_not_judged(opened: ImageTask) -> None:
    references = opened.evaluated["test"].references
    outputs = F.one_hot(torch.from_numpy(references), 10).float()
    outputs[:3] = outputs[:3].roll(1, dims=1)  # wrong
    lost = examples([LEFT_OUT, LEFT_OUT, *[0] * (len(references) - 2)])
    found = opened.score("test", opened.predict(outputs, lost))
    assert found["accuracy"] == pytest.approx(1 - 1 / (len(references) - 2))
    with pytest.raises(DataError, match="none of the test samples can be read"):
        opened.score("test", [None] * len(references))


def write_grey(folder: Path) -> Path:
    """Six images each of the classes a and b, to learn from and to test."""
    for split, name in itertools.product(("train", "test"), ("a", "b")):
        (folder / split / name).mkdir(parents=True)
        for i in range(6):
            Image.fromarray(np.full((28, 28), 40 * i, np.uint8)).save(folder / split / name / f"{i}.png")
    return folder


def test_more_labels_than_there_are_are_told(tmp_path: Path) -> None:
    write_grey(tmp_path)

    def notes(labels: int) -> tuple[str, ...]:
        config = load(TINY, [f"data.path={tmp_path}", f"data.labels={labels}"])
        return ImageTask(config, progress=False).train.dataset.notes

    assert notes(13) == ("12 of 12 are learned from", "data.labels=13 is more than there are: 12")
    assert notes(12) == ("12 of 12 are learned from",) and notes(4) == ("4 of 12 are learned from",)


def test_a_number_of_outputs_that_the_data_have_not_is_refused(tmp_path: Path) -> None:
    write_grey(tmp_path)

    def task(outputs: int) -> ImageTask:
        return ImageTask(load(TINY, [f"data.path={tmp_path}", f"head.outputs={outputs}"]), progress=False)

    assert task(0).resolved.head.outputs == task(2).resolved.head.outputs == 2
    with pytest.raises(ConfigError) as told:
        _ = FineTuning(task(10), World(0, 1, torch.device("cpu"))).config
    assert str(told.value) == "head.outputs=10, but there are 2 (a, b): leave it out"


def test_an_evaluation_tells_what_it_could_not_read_on_any_rank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two ranks, in threads; each meets broken files of its own."""
    write_grey(tmp_path)
    broken = [tmp_path / "test" / name for name in ("a/0.png", "a/1.png", "a/3.png", "b/2.png")]
    for path in broken:
        path.write_bytes(b"no picture")
    task = ImageTask(load(TINY, [f"data.path={tmp_path}", "data.labels=null", "eval.batch_size=4"]), progress=False)
    parts: dict[int, Any] = {}
    notes: dict[int, list[str]] = {0: [], 1: []}
    met = threading.Barrier(2, timeout=60)

    def gathered(every: list[Any], own: Any) -> None:
        parts[int(threading.current_thread().name)] = own
        met.wait()
        every[:] = parts[0], parts[1]

    monkeypatch.setattr(evaluate.dist, "all_gather_object", gathered)
    found: dict[int, dict[str, float]] = {}

    def evaluated(rank: int) -> None:
        network = FineTuned(task.resolved.model, task.resolved.head)
        job = FineTuning(task, World(rank, 2, torch.device("cpu")))
        found[rank] = job.evaluation(None, SimpleNamespace(engine=network), notes[rank].append)(3)  # type: ignore[arg-type]

    threads = [threading.Thread(target=evaluated, args=(rank,), name=str(rank)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found[0].keys() == {"test/accuracy", "test/top2", "unread_test"} and found[0]["unread_test"] == 4
    (note,) = notes[0]
    assert note.startswith("test: could not decode 4: ") and note.endswith(" and 1 more")
    assert [str(path) in note for path in broken] == [True, True, True, False] and "not an image" in note
    assert not notes[1] and all(own[1] for own in parts.values())


def test_evaluations_see_the_middle(tmp_path: Path) -> None:
    y, x = np.mgrid[:96, :144]
    Image.fromarray((127 + 100 * np.sin(x / 9) * np.cos(y / 7)).astype(np.uint8)).save(tmp_path / "a.png")
    images = ImageDataset(open_images(str(tmp_path), "train"), size=56, seed=0, channels=1, train=False, centre=56 / 64)
    whole = Image.open(tmp_path / "a.png").resize((96, 64), Image.Resampling.BICUBIC)
    expected = np.asarray(whole.crop((20, 4, 76, 60))).astype(int)
    assert np.abs(images[0, 0].inputs[0].numpy().astype(int) - expected).mean() < 1
    uncropped = ImageDataset(open_images(str(tmp_path), "train"), size=56, seed=0, channels=1, train=False)
    assert np.abs(uncropped[0, 0].inputs[0].numpy().astype(int) - expected).mean() > 10


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("image.erase=2", "image.erase=2.0 must lie in [0, 1]"),
        ("image.operations=-1", "image.operations=-1 must be 0 or more"),
        ("image.magnitude=30", "image.magnitude=30.0 must lie in [0, 10]"),
        ("image.crop_share=0", "image.crop_share=0.0 must lie in (0, 1]"),
        ("image.smoothing=1", "image.smoothing=1.0 must lie in [0, 1)"),
        ("model.dropout.path=1", "model.dropout.path=1.0 must lie in [0, 1)"),
        ("model.image.positions=-3", "model.image.positions=-3 must be at least 0"),
        ("image.mixupp=1", "did you mean image.mixup?"),
    ],
)
def test_what_cannot_be_is_one_line(setting: str, words: str) -> None:
    with pytest.raises(ConfigError) as error:
        load(TINY, [setting])
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("preset", "published"),
    [
        ("base", {"steps": 250_200, "lr": 1e-3, "layer_decay": 0.65, "path": 0.1, "clip": 0}),
        ("large", {"steps": 125_200, "lr": 5e-4, "layer_decay": 0.75, "path": 0.2, "clip": 4}),
        ("huge14", {"steps": 125_200, "lr": 5e-4, "layer_decay": 0.75, "path": 0.2, "clip": 4}),
    ],
)
def test_presets_are_as_published(preset: str, published: dict[str, float]) -> None:
    config: Config = load(ROOT / f"configs/finetune/imagenet_{preset}.yaml", ["train.init_from=''"])
    optim, image = config.optim, config.image
    assert published == {
        "steps": config.train.steps,
        "lr": optim.lr,
        "layer_decay": optim.layer_decay,
        "path": config.model.dropout.path,
        "clip": optim.clip_norm,
    }
    assert (config.train.batch_size, optim.warmup_steps) == (512, 16_000)
    assert (optim.weight_decay, optim.betas) == (0.05, (0.9, 0.95))
    assert (image.mixup, image.cutmix, image.mix_prob, image.switch_prob) == (0.7, 1.0, 0.9, 0.5)
    assert (image.operations, image.magnitude, image.magnitude_std) == (2, 9, 0.5)
    assert (image.erase, image.smoothing, image.crop_share) == (0.25, 0.1, 0.875)
    assert (config.data.image.crop_scale, config.data.image.flip) == ((0.08, 1.0), 0.5)
    assert optim.exempt_1d and optim.schedule == "cosine" and config.which == "student"
