"""FusedAdam of apex and of DeepSpeed, by twins of their kernels, against torch's; and who may have them."""

from __future__ import annotations

import math
import sys

import pytest
import torch
from torch import Tensor

from models.fused import kernels
from models.fused.kernels import Kernels
from pretrain.config import OptimConfig, batch_plan, load
from pretrain.engine import engine_config
from pretrain.optim import build_optimizer, set_hyperparameters
from pretrain.settings import ConfigError
from tests.fused_adam import install

GPU, CPU = torch.device("cuda"), torch.device("cpu")
BOTH = pytest.mark.parametrize("adam", ["apex", "deepspeed"])


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)


class Run:
    """Three parameters in two groups, of which one decays."""

    def __init__(self, adam: str, most: float) -> None:
        torch.manual_seed(0)
        self.config = OptimConfig(clip_norm=most, betas=(0.9, 0.98))
        self.parameters = [torch.nn.Parameter(torch.randn(shape)) for shape in ((4, 5), (7,), (3, 2))]
        groups = [
            {"params": self.parameters[:2], "weight_decay": 0.1},
            {"params": self.parameters[2:], "weight_decay": 0.0},
        ]
        self.optimizer = build_optimizer(groups, self.config, adam)

    def step(self, gradients: list[Tensor], update: int) -> None:
        for p, g in zip(self.parameters, gradients, strict=True):
            p.grad = g.clone()
        set_hyperparameters(self.optimizer, 1e-2, update, self.config)
        self.optimizer.expect(torch.cat([g.flatten() for g in gradients]).norm())
        self.optimizer.step()

    def tensors(self) -> list[Tensor]:
        state = self.optimizer.state
        moments = [state[p][name] for p in self.parameters for name in ("exp_avg", "exp_avg_sq")]
        return [t.detach().clone() for t in (*self.parameters, *moments)]


@BOTH
@pytest.mark.parametrize("most", [0.5, 100.0, 0.0])
def test_it_clips_and_steps_as_torchs(adam: str, most: float, installed: None) -> None:
    ours, torchs = Run(adam, most), Run("torch", most)
    for update in range(1, 7):
        gradients = [torch.randn_like(p) for p in ours.parameters]
        ours.step(gradients, update)
        torchs.step(gradients, update)
        for found, expected in zip(ours.tensors(), torchs.tensors(), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@BOTH
@pytest.mark.parametrize("most", [0.5, 0.0])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_moves_nothing(adam: str, most: float, bad: float, installed: None) -> None:
    """Nor does it count as a step."""
    ours, undisturbed = Run(adam, most), Run(adam, most)
    for update in (1, 2):
        gradients = [torch.randn_like(p) for p in ours.parameters]
        undisturbed.step(gradients, update)
        ours.step(gradients, update)
        if update == 1:
            before = ours.tensors()
            broken = [g.clone() for g in gradients]
            broken[1][3] = bad
            ours.step(broken, 2)
            assert all(map(torch.equal, ours.tensors(), before))
    assert all(map(torch.equal, ours.tensors(), undisturbed.tensors()))


@BOTH
def test_what_has_no_gradient_stays(adam: str, installed: None) -> None:
    ours = Run(adam, 0.5)
    set_hyperparameters(ours.optimizer, 1e-2, 1, ours.config)
    ours.optimizer.expect(torch.tensor(1.0))
    before = [p.detach().clone() for p in ours.parameters]
    ours.optimizer.step()
    assert all(map(torch.equal, ours.parameters, before))


def test_choices_are_per_part() -> None:
    assert kernels.problems(Kernels(adam="triton"), GPU) == ["kernels.adam='triton': know auto, torch, deepspeed, apex"]
    assert kernels.problems(Kernels(norm="deepspeed"), GPU) == [
        "kernels.norm='deepspeed': know auto, triton, torch, apex"
    ]
    assert kernels.problems(Kernels(loss="apex"), GPU) == ["kernels.loss='apex': know auto, triton, torch"]
    assert kernels.problems(Kernels(adam="torch", norm="torch"), CPU) == []


@pytest.mark.parametrize("part", ["adam", "norm"])
def test_apex_has_to_be_nvidias(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one of PyPI has no kernels."""
    install(monkeypatch)
    choice = Kernels(**{part: "apex"})
    assert kernels.problems(choice, GPU) == []
    assert kernels.problems(choice, CPU) == [f"kernels.{part}=apex runs on GPUs alone; take auto"]
    for module in kernels.APEX[part]:
        with monkeypatch.context() as without:
            without.setitem(sys.modules, module, None)
            (told,) = kernels.problems(choice, GPU)
        assert told.startswith(f"kernels.{part}=apex needs NVIDIA's apex, built with --cpp_ext and --cuda_ext from")
        assert "PyPI's apex is another package" in told and "(ModuleNotFoundError: " in told


def test_deepspeeds_adam_needs_a_gpu() -> None:
    assert kernels.problems(Kernels(adam="deepspeed"), GPU) == []
    assert kernels.problems(Kernels(adam="deepspeed"), CPU) == ["kernels.adam=deepspeed runs on GPUs alone; take auto"]


def test_what_cannot_be_loaded_is_told_in_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "apex", None)
    with pytest.raises(ConfigError, match=r"^train.kernels.adam=apex cannot be loaded \(.*\); take auto$"):
        Run("apex", 0.5)


@BOTH
@pytest.mark.parametrize(
    ("zero", "precision", "told"),
    [
        ("2_offload", "fp32", "runs on GPUs, and ds_configs/zero2_offload.json offloads the optimizer; take auto"),
        ("3_offload", "bf16", "runs on GPUs, and ds_configs/zero3_offload.json offloads the optimizer; take auto"),
        ("0", "fp16", "in fp16 needs ZeRO 1, 2 or 3; set train.deepspeed=ds_configs/zero1.json"),
    ],
)
def test_what_it_cannot_have_is_refused(adam: str, zero: str, precision: str, told: str) -> None:
    settings = [f"train.deepspeed=ds_configs/zero{zero}.json", f"train.precision={precision}"]
    refused, fine = (load("tests/tiny.yaml", [*settings, f"train.kernels.adam={a}"]) for a in (adam, "torch"))
    plan = batch_plan(refused.train, 1)
    engine_config(fine, plan)
    with pytest.raises(ConfigError) as caught:
        engine_config(refused, plan)
    assert str(caught.value) == f"train.kernels.adam={adam} {told}"
