"""No step waits for the device: nobody asks for a value."""

import json

from tests.launch import run

ZERO = "train.deepspeed=ds_configs/zero{}.json"
KERNELS = ("attention", "norm", "convolution", "targets", "loss", "rows", "teacher")
SMALLER = ("train.batch_size=2", "model.num_masks=1", "model.depth=1", "model.targets.top_k_layers=1")  # interpreted
LEAN = [
    *(f"tests/{name}.yaml {ZERO.format(1)} train.precision=bf16" for name in ("tiny", "tiny_audio", "tiny_text")),
    f"tests/tiny.yaml {ZERO.format(2)} train.precision=bf16 optim.clip_norm=0",
    f"tests/tiny.yaml {ZERO.format(0)} train.precision=fp32",
    f"tests/tiny_text.yaml {ZERO.format(0)} train.precision=bf16",
    " ".join(["tests/tiny_text.yaml", ZERO.format(0), *SMALLER, *(f"train.kernels.{part}=triton" for part in KERNELS)]),
]
WAITING = f"tests/tiny.yaml {ZERO.format(1)} train.precision=fp32"  # DeepSpeed looks at the norm


def test_a_step_waits_for_nothing():
    lines = run("tests.dist.lean_worker", *LEAN, WAITING).stdout.splitlines()
    seen = {found["scenario"]: found["waits"] for line in lines if "waits" in line and (found := json.loads(line))}
    assert seen == {scenario: [] for scenario in LEAN} | {
        WAITING: ["aten._local_scalar_dense.default from optimizer_step"] * 2
    }
