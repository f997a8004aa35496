"""python -m finetune CONFIG.yaml [section.key=value ...] [--dry-run]"""

from __future__ import annotations

import sys

from finetune.config import Config, load
from finetune.image import ImageTask
from finetune.plan import describe
from finetune.speech import SpeechTask
from finetune.task import Task
from finetune.text import TextTask
from finetune.train import FineTuning
from pretrain import program
from pretrain.parallel import World

KINDS: dict[str, type[Task]] = {"image": ImageTask, "speech": SpeechTask, "text": TextTask}


def start(config: Config, world: World) -> FineTuning:
    return FineTuning(KINDS[config.task](config, progress=world.is_main), world)


def main() -> int:
    return program.main("finetune", "Fine-tune an encoder under DeepSpeed.", load, start, describe)


if __name__ == "__main__":
    sys.exit(main())
