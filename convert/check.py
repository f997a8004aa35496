"""Whether two checkpoints are one model: what they compute of the same input."""

from __future__ import annotations

import torch
from torch import Tensor

from models.config import RATE, ModelConfig
from models.data2vec import Data2Vec
from pretrain.checkpoint import CheckpointError
from pretrain.full import Full

BOUND = 1e-5  # on features that LayerNorm has made about 1


def refuse_other(source: Full, target: Full, what: str) -> float:
    """The largest difference between all that the two compute. Raises CheckpointError if it is above BOUND."""
    expected, found = outputs(source), outputs(target)
    errors = [_distance(expected[name], found[name]) for name in expected if name in found]
    error = torch.tensor(errors if expected.keys() == found.keys() else [float("nan")]).max().item()  # NaN stays
    if not error <= BOUND:
        raise CheckpointError(
            f"{what} is another model: its features are {error:.1e} off, at most {BOUND:.0e} is allowed"
        )
    return error


def _distance(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().max().item() if a.shape == b.shape else float("nan")


def outputs(full: Full) -> dict[str, Tensor]:
    """What each part makes of `sample`, (B, ...): student, teacher and decoder, or student and head. A baseline's other
    parts, which begin with what is hidden, are the weights themselves."""
    network = full.network()
    network.load_state_dict(full.tensors, assign=True)  # without a copy
    network.eval()
    inputs = sample(full.model)
    with torch.inference_mode():
        features = network.student.local(inputs)
        encoded = network.student(features)
        found = {"student": encoded}
        positions = encoded[:, full.model.extra_tokens :]
        if isinstance(network, Data2Vec):
            own = features if network.teacher.local is None else network.teacher.local(inputs)
            found["teacher"] = network.teacher(own)
            found["decoder"] = network.decoder.proj(network.decoder(positions))
        elif full.head is not None:
            found["head"] = network.head(positions)
        else:
            found |= full.tensors
    return found


def sample(config: ModelConfig) -> Tensor:
    """Two fixed random inputs: images, half a second of speech, a row of ids."""
    generator = torch.Generator().manual_seed(0)
    if config.modality == "image":
        return torch.randn(2, config.image.channels, config.image.size, config.image.size, generator=generator)
    if config.modality == "audio":
        return torch.randn(2, RATE // 2, generator=generator)
    ids = torch.randint(config.text.vocabulary, (2, min(config.text.tokens, 64)), generator=generator)
    return torch.where(ids == config.text.pad, (config.text.pad + 1) % config.text.vocabulary, ids)
