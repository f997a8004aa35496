"""python -m finetune CONFIG.yaml [section.key=value ...] [--dry-run]"""

from __future__ import annotations

import sys

from finetune.config import Config, load
from finetune.plan import describe
from finetune.task import Task
from finetune.train import FineTuning
from pretrain import program
from pretrain.parallel import World


def start(config: Config, world: World) -> FineTuning:
    return FineTuning(kind(config.task)(config, progress=world.is_main), world)


def kind(task: str) -> type[Task]:
    """The class of a task, imported here: each takes libraries that the others do without, and seconds."""
    if task == "image":
        from finetune.image import ImageTask

        return ImageTask
    if task == "speech":
        from finetune.speech import SpeechTask

        return SpeechTask
    from finetune.text import TextTask

    return TextTask


def main() -> int:
    return program.main("finetune", "Fine-tune an encoder under DeepSpeed.", load, start, describe)


if __name__ == "__main__":
    sys.exit(main())
