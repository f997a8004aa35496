"""What a fine-tuning run will do, without its data."""

from __future__ import annotations

from finetune.config import Config
from finetune.optim import parameter_groups
from models.heads import FineTuned
from models.objectives import encoder
from pretrain.config import batch_plan
from pretrain.eager import shapes_only
from pretrain.engine import read_mechanics
from pretrain.plan import samples


def describe(config: Config, ranks: int) -> str:
    """The text of --dry-run."""
    plan, train, optim = batch_plan(config.train, ranks), config.train, config.optim
    read_mechanics(train.deepspeed)
    with shapes_only():
        size = sum(p.numel() for p in encoder(config.model).parameters())
        groups = parameter_groups(FineTuned(config.model, config.head), optim)
    rates = sorted({group["lr_scale"] for group in groups if not group["head"]})
    head = f", the head {optim.head_scale:g}" if optim.head_scale != 1 else ""
    batch, unit = samples(config.model, train.batch_size), config.model.unit
    lines = [
        f"parameters   {size / 1e6:.2f} M of the encoder, from {train.init_from or 'scratch'}",
        f"rates        {optim.schedule}, peak {optim.lr:g}; by layer {rates[0]:.3g} to {rates[-1]:.3g} of it{head}",
        f"batch        {train.batch_size} = {plan.ranks} ranks x {plan.micro_batch} x {plan.accumulation} accumulated",
        f"run          {train.steps:,} steps, {train.steps * batch:,} {unit}; evaluated on "
        f"{', '.join(config.eval.splits)} "
        + (f"every {config.eval.every:,} steps" if config.eval.every else "at the end"),
        f"checkpoints  every {config.run.save_every} steps into {config.run.dir}/checkpoints/step_*",
    ]
    return "\n".join(lines)
