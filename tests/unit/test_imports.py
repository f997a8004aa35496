"""The layers, read off the syntax tree: models < pretrain < finetune, convert < benchmarks < tests."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LAYERS = {"models": 0, "pretrain": 1, "finetune": 2, "convert": 2, "benchmarks": 3, "tests": 4}
DEEPSPEED = {
    f"pretrain/{name}.py"
    for name in ("engine", "optim", "parallel", "launchers", "ema", "pieces", "checkpoint", "train")
}
MAX_LINES = 450
FOLDERS = [d for d in ROOT.iterdir() if d.is_dir() and not d.name.startswith(".") and d.name != "runs"]
FILES = sorted([*ROOT.glob("*.py"), *(file for d in FOLDERS for file in d.rglob("*.py"))])
NAMES = [str(file.relative_to(ROOT)) for file in FILES]
every_file = pytest.mark.parametrize("name", NAMES)


def imported(source, name):
    """Full names of the modules that the file `name` imports anywhere, functions and import_module("...") included."""
    package = name.split("/")[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            yield ".".join([*above, *filter(None, [node.module])])
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__"):
                yield str(node.args[0].value)


def violations(source, name):
    own = name.split("/")[0]
    for module in imported(source, name):
        top = module.split(".")[0]
        if top in LAYERS and top != own and LAYERS[top] >= LAYERS.get(own, 0):
            yield f"{name} imports {module}"
        if top == "deepspeed" and own != "tests" and name not in DEEPSPEED:
            yield f"{name} imports {module}"


@every_file
def test_imports_go_down(name):
    assert list(violations((ROOT / name).read_text(), name)) == []


def test_the_libraries_of_a_task_wait_for_it():
    program = "import sys, finetune.__main__; print(*(n for n in ('jiwer', 'kornia', 'sklearn') if n in sys.modules))"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert found.returncode == 0 and found.stdout.split()[-1:] == [], found


def test_shapes_and_split_layers_go_without_torchs_compiler():
    """Of every modality, nor with sympy, which torch.randn imports there; and megatron-core's, which asks for it."""
    program = """
import sys
from pretrain.config import load
from pretrain.eager import uncompiled
from pretrain.layout import groups
for modality in ("image", "audio", "text"):
    groups(load(f"configs/pretrain/{modality}_demo.yaml"))
print("sympy" in sys.modules)
with uncompiled():
    from megatron.core import parallel_state
from models import tp_layers
print("torch._dynamo" in sys.modules)
"""
    found = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, cwd=ROOT, timeout=120
    )
    assert found.returncode == 0 and found.stdout.split()[-2:] == ["False", "False"], found


@every_file
def test_files_are_short_and_named_for_what_they_hold(name):
    assert len((ROOT / name).read_text().splitlines()) <= MAX_LINES or name.startswith("tests/")
    assert Path(name).stem not in ("utils", "helpers", "base", "common", "misc")


def test_every_package_has_its_layer_and_a_name_of_its_own():
    tops = {name.split("/")[0].removesuffix(".py") for name in NAMES}
    assert tops - set(LAYERS) == set()
    assert tops & set(sys.stdlib_module_names) == set()


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("models/masks.py", "from pretrain import config"),
        ("models/masks.py", "def f():\n    import pretrain.config"),
        ("models/masks.py", "import deepspeed"),
        ("models/masks.py", "from importlib import import_module\nimport_module('finetune.probe')"),
        ("pretrain/data/image.py", "if True:\n    from finetune.probe import x"),
        ("pretrain/plan.py", "from deepspeed.utils import x"),
        ("finetune/probe.py", "import benchmarks.step as step"),
        ("finetune/probe.py", "import convert"),
        ("benchmarks/step.py", "import tests.parity"),
    ],
)
def test_a_forbidden_import_is_seen(name, source):
    assert len(list(violations(source, name))) == 1


def test_relative_imports_are_resolved():
    assert list(imported("from . import a\nfrom ..config import b", "pretrain/data/image.py")) == [
        "pretrain.data",
        "pretrain.config",
    ]
