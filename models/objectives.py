"""The network that `model.objective` asks for. Those of the baselines wait for it: `transformers` takes seconds to
import."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from models.baselines.config import DATA2VEC2
from models.config import ModelConfig
from models.data2vec import Data2Vec, Encoder


def network(config: ModelConfig) -> Any:
    """`models.data2vec.Data2Vec`, or a `models.baselines.encoder.Baseline`."""
    return Data2Vec(config) if config.objective == DATA2VEC2 else _baseline(config).network(config)


def encoder(config: ModelConfig) -> Any:
    """`models.data2vec.Encoder`, or a `models.baselines.encoder.BorrowedEncoder`."""
    return Encoder(config) if config.objective == DATA2VEC2 else _baseline(config).encoder(config)


def _baseline(config: ModelConfig) -> Any:
    return import_module(f"models.baselines.{config.objective}")
