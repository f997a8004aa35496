"""What all ranks must have in common, told apart at the start: config, code, data, random numbers, checkpoint.

Each is a list of facts, small texts with a name. Ranks whose facts are not those of most ranks are named, and how they
differ; the run does not start.
"""

from __future__ import annotations

import json
import platform
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

from models.masks import row_keys
from pretrain.config import Settings
from pretrain.data.loader import Dataset
from pretrain.data.names import digest
from pretrain.data.sampler import permutation
from pretrain.engine import read_mechanics
from pretrain.peers import Peers
from pretrain.settings import flat

OWN = ("data.path", "data.workers", "train.threads", "train.init_from")  # settings that a machine may have for itself
PACKAGES = ("torch", "deepspeed", "numpy", "safetensors")
Facts = dict[str, str]


def settings(config: Settings) -> Facts:
    """The resolved config and the content of its DeepSpeed JSON, but for what may differ from machine to machine."""
    return {
        **{key: str(value) for key, value in flat(config).items() if key not in OWN},
        f"the content of {config.train.deepspeed}": json.dumps(read_mechanics(config.train.deepspeed), sort_keys=True),
    }


def code() -> Facts:
    """Versions, and digests of the files of `models` and `pretrain`."""
    root = Path(__file__).parent.parent
    files = sorted(path for folder in ("models", "pretrain") for path in (root / folder).rglob("*.py"))
    digests = {str(path.relative_to(root)): digest(path.read_bytes()) for path in files}
    return {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}, **digests}


def data(dataset: Dataset) -> Facts:
    """How many samples there are, and which."""
    return {"samples": str(len(dataset)), "index": dataset.fingerprint()}


def streams(seed: int) -> Facts:
    """What the generators make of `seed`: the samples' order, masks, dropout."""
    some = np.arange(64)
    numbers = torch.randint(2**62, (64,), generator=torch.Generator().manual_seed(seed))
    return {
        "order": digest(permutation(1000, seed, 0)),
        "masks": digest(row_keys(seed, some, some, 4)),
        "torch": digest(numbers.numpy()),
    }


def require_agreement(peers: Peers, topics: dict[str, Facts]) -> None:
    """Raises ConfigError, on all ranks, naming the ranks whose facts on a topic are not the majority's. Waits for all
    ranks."""
    name = " and ".join(topics)
    peers.agree(name, json.dumps(topics), lambda values: disagreement([json.loads(value) for value in values], peers))


def disagreement(found: list[dict[str, Facts]], peers: Peers) -> str:
    """One sentence on the first topic on which ranks differ; empty if they agree."""
    for topic in found[0]:
        groups: dict[str, list[int]] = {}
        for rank, topics in enumerate(found):
            groups.setdefault(json.dumps(topics[topic]), []).append(rank)
        (most, usual), *others = sorted(groups.items(), key=lambda group: -len(group[1]))
        if others:
            expected = json.loads(most)
            told = [f"{peers.names(ranks)} has {_difference(json.loads(facts), expected)}" for facts, ranks in others]
            return f"ranks disagree on the {topic}: {'; '.join(told[:4])}; compared with {peers.names(usual)}"
    return ""


def _difference(facts: Facts, usual: Facts) -> str:
    keys = [key for key in {**usual, **facts} if facts.get(key) != usual.get(key)]
    told = [f"{key}={facts.get(key, 'missing')[:80]}, not {usual.get(key, 'missing')[:80]}" for key in keys[:4]]
    return " and ".join(told) + (f" and {len(keys) - 4} more" if len(keys) > 4 else "")
