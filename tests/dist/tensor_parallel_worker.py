"""Run by test_tensor_parallel.py under four ranks, two of them splitting every layer: what each one sees in two steps
with all dropouts on."""

from __future__ import annotations

import hashlib
import json
import logging
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models import encoder
from models.split import split_of
from pretrain import checkpoint, parallel
from pretrain.config import load
from pretrain.data.loader import build_dataset, build_loader
from pretrain.train import Trainer


def digest(*tensors: Tensor) -> str:
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.detach().float().numpy().tobytes())
    return found.hexdigest()


def steps(overrides: list[str], folder: Path, world: parallel.World) -> dict[str, Any]:
    config = load(overrides[0], ["train.tensor_parallel=2", "optim.clip_norm=0.1", *overrides[1:]])
    trainer = Trainer(config, world)
    batches = build_loader(build_dataset(config), config, trainer.plan, world, 0)
    seen: dict[str, list[Any]] = {name: [] for name in ("attention", "residual", "encoded", "batch", "loss", "norm")}
    plain = encoder.attention

    def attention(qkv: Tensor, bias: Any, dropout: float, stream: int | None) -> Tensor:
        """Of equal weights and values an output counts those that were kept."""
        if dropout:
            state = torch.get_rng_state()
            seen["attention"].append(digest(plain(torch.ones_like(qkv), None, dropout, stream)))
            torch.set_rng_state(state)
        return plain(qkv, bias, dropout, stream)

    encoder.attention = attention
    for block in trainer.model.student.blocks:
        block.attn_dropout.register_forward_hook(lambda _, args, out: seen["residual"].append(digest(out)))
    trainer.model.student.register_forward_hook(lambda _, args, out: seen["encoded"].append(digest(out)))
    for _ in range(2):
        micro_batches = [next(batches) for _ in range(trainer.plan.accumulation)]
        seen["batch"] += [digest(b.inputs, b.ids_keep, b.ids_mask) for b in micro_batches]
        sums, result = trainer.step(micro_batches)
        seen["loss"].append(float(sums.loss))
        seen["norm"].append(float(result.grad_norm))
    encoder.attention = plain
    path = checkpoint.save(folder, trainer.engine, trainer.teacher, trainer.state, config, world)
    state = checkpoint.load(path, trainer.engine, trainer.teacher, world)
    seen["read"] = [int(world.sum(torch.tensor(state.read)))]
    whole = [p for name, p in trainer.model.named_parameters() if split_of(name, 0, 2) is None]
    slices = [p for name, p in trainer.model.named_parameters() if split_of(name, 0, 2) is not None]
    return seen | {"whole": [digest(*whole)], "slices": [digest(*slices)]}


if __name__ == "__main__":
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    world = parallel.start(2)
    folder = Path(sys.argv[1])
    found = [steps(overrides, folder / str(i), world) for i, overrides in enumerate(json.loads(sys.argv[2]))]
    (folder / f"rank{world.rank}.json").write_text(json.dumps(found))
    parallel.stop()
