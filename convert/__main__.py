"""python -m convert SOURCE TARGET, or python -m convert inspect PATH (docs/checkpoints.md)"""

from __future__ import annotations

import argparse
import sys
from importlib import import_module
from pathlib import Path

from convert import authors, check
from convert.describe import described
from models.baselines.config import DATA2VEC2
from pretrain import full
from pretrain.checkpoint import CheckpointError
from pretrain.full import Full
from pretrain.progress import Progress
from pretrain.runtime import EXIT_BAD_INPUT
from pretrain.settings import ConfigError

SOURCE = "a run folder, one of its checkpoints/step_*, NAME.safetensors, NAME.pt of the authors', a Hugging Face folder"
HUGGING_FACE = "convert.huggingface"  # imported where it is wanted: transformers takes seconds
TARGET = "NAME.safetensors: full form; NAME.pt: the authors' form; a folder: Hugging Face's"


def main() -> int:
    parser = argparse.ArgumentParser("convert", description="Write a checkpoint in another form, or say what one is.")
    parser.add_argument("source", help=SOURCE + "; or the word inspect")
    parser.add_argument("target", help=TARGET + "; after inspect, what to look at")
    parser.add_argument(
        authors.COPY_TEACHER,
        action="store_true",
        help="of a source without a teacher: start one as a copy of the student",
    )
    parser.add_argument("--which", choices=full.WHICH, default="student", help="the encoder of a Hugging Face folder")
    parser.add_argument("--everything", action="store_true", help="have a Hugging Face folder hold all parts")
    args = parser.parse_args()
    try:
        if args.source == "inspect":
            print(described(args.target))
        else:
            print(convert(args.source, args.target, args.teacher_from_student, args.which, args.everything))
    except (ConfigError, CheckpointError) as error:  # its notes: all names that do not fit
        print(f"error: {error}", *getattr(error.__cause__ or error, "__notes__", ()), sep="\n  ", file=sys.stderr)
        return EXIT_BAD_INPUT
    return 0


def convert(
    source: str,
    target: str,
    teacher_from_student: bool = False,
    which: str = "student",
    everything: bool = False,
) -> str:
    """Writes `target`, reads it again and compares features; a target that differs is deleted. Returns what to tell.

    `which` encoder a Hugging Face folder gets, and whether `everything` else, too.

    Raises ConfigError or CheckpointError, in one line.
    """
    path = Path(target).expanduser()
    if path.suffix not in ("", full.SUFFIX, authors.SUFFIX):
        raise ConfigError(f"{target}: {path.suffix} is no form; {TARGET}")
    if path.exists():
        raise ConfigError(f"{target} is there already; choose another name, or delete it")
    with Progress("reading, writing, comparing", 3) as progress:
        found, notes = read(source, teacher_from_student)
        progress.advance(1)
        if path.suffix != full.SUFFIX and found.model.objective != DATA2VEC2:
            raise ConfigError(
                f"{source} is of model.objective={found.model.objective}, which only has the form NAME{full.SUFFIX}"
            )
        if not path.suffix:  # loaded again and compared by itself
            told = import_module(HUGGING_FACE).export(found, path, which, everything)
            progress.advance(2)
            return "\n".join([*notes, told])
        (full if path.suffix == full.SUFFIX else authors).write(found, path)
        progress.advance(1)
        try:
            error = check.refuse_other(found, read(target)[0], target)
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        progress.advance(1)
    count = sum(tensor.numel() for tensor in found.tensors.values())
    told = f"{target}: {len(found.tensors)} tensors, {count / 1e6:.1f} M fp32 weights after step {found.step}"
    return "\n".join([*notes, f"{told}; read again, its features are {error:.1e} off"])


def read(source: str, teacher_from_student: bool = False) -> tuple[Full, list[str]]:
    """The full form of whatever `source` is, and what to tell the user of it."""
    path = Path(source).expanduser()
    if path.suffix == authors.SUFFIX:
        return authors.read(source, teacher_from_student)
    if (path / "config.json").is_file():
        return import_module(HUGGING_FACE).read(source, teacher_from_student), []
    return full.read(source), []


if __name__ == "__main__":
    sys.exit(main())
