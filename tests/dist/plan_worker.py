"""Run by test_plan_on_ranks.py: what this rank sends for a step and what it holds, beside what is computed."""

from __future__ import annotations

import json
import logging
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

from deepspeed.accelerator import get_accelerator

import pretrain.train
from benchmarks import memory
from benchmarks.step import random_batches
from pretrain import parallel
from pretrain.config import Config, load
from pretrain.engine import read_mechanics
from pretrain.layout import Zero
from pretrain.parallel import World
from pretrain.traffic import traffic
from pretrain.train import Trainer
from tests.dist.collectives import Collectives, counting


def counted(collectives: Collectives, world: World) -> dict[str, int]:
    """Bytes by the kinds of `Traffic`."""
    kinds = dict.fromkeys(("gradients", "gathering", "weights", "teacher", "tensor_parallel"), 0)
    split = world.tensor_group.group_name if world.tensor_group else None
    for (phase, name, group), sent in collectives.bytes.items():
        gathers = "gather" in name
        if group == split:
            kinds["tensor_parallel"] += sent if phase in ("forward", "backward") else 0
        elif phase == "backward":
            kinds["gathering" if gathers else "gradients"] += sent
        elif gathers:  # all else are sums of a few numbers
            kinds[{"forward": "gathering", "optimizer": "weights", "teacher": "teacher"}[phase]] += sent
    return kinds


def look(config: Config, world: World) -> dict[str, Any]:
    """What one step sends, and what is held meanwhile."""
    memory.forget()
    trainer = Trainer(config, world)
    batches, zero = random_batches(config, trainer), Zero.of(read_mechanics(config.train.deepspeed))
    warm_up = 2 if zero.stage == 3 else 1  # steps: ZeRO 3 first learns the order in which modules are called
    while trainer.state.step < warm_up:  # fp16 skips some
        trainer.step(next(batches))
    places = [
        (trainer.engine, "forward", "forward"),
        (trainer.engine, "backward", "backward"),
        (pretrain.train, "optimizer_step", "optimizer"),
        (trainer.teacher, "update", "teacher"),
    ]
    with ExitStack() as stack:
        most = stack.enter_context(memory.watching(trainer))
        collectives = stack.enter_context(counting())
        for owner, name, phase in places:
            stack.enter_context(patch.object(owner, name, collectives.during(phase, getattr(owner, name))))
        assert trainer.step(next(batches))[1].applied
    expected = traffic(config, trainer.plan, zero)
    sent = counted(collectives, world)
    trainer.engine.destroy()
    return {
        "sent": {kind: {"expected": getattr(expected, kind).bytes, "counted": value} for kind, value in sent.items()},
        "held": [line._asdict() | {"apart": line.apart} for line in memory.compared(trainer, most)],
    }


def main(folder: Path, scenarios: list[list[str]]) -> None:
    """Each scenario is a config file with overrides."""
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    get_accelerator().is_fp16_supported = lambda: True  # torch computes in fp16 on CPU; DeepSpeed only doubts it
    world = whole = parallel.start()
    found = []
    for path, *overrides in scenarios:
        config = load(path, overrides)
        if config.train.tensor_parallel != world.tensor_ranks:
            world = parallel.split_world(whole, config.train.tensor_parallel)
        found.append({"scenario": overrides} | look(config, world))
    (folder / f"rank{world.rank}.json").write_text(json.dumps(found))
    parallel.stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
