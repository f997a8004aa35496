"""An encoder made of layers of `transformers`, with the manners of `models.data2vec.Encoder`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

from torch import Tensor, nn

from models.config import ModelConfig
from models.data2vec import FullView, dropped_blocks
from models.fused.linear import Linear
from models.masks import real_positions, without_padding


class BorrowedEncoder(nn.Module, ABC):
    """Local features, `enter`, blocks, `leave`. What lies behind the end of a padded sample tells others nothing."""

    local: Any
    blocks: nn.ModuleList
    leading = 0  # tokens in front of the positions

    @abstractmethod
    def enter(self, features: Tensor, ids_keep: Tensor | None) -> Tensor:
        """Local features (B, T, D), zero behind a sample's end -> input of the blocks (B, E+T, D), or (B, E+K, D)."""

    def leave(self, x: Tensor) -> Tensor:
        """The last block's output -> the encoder's."""
        return x

    def layers(
        self,
        features: Tensor,
        ids_keep: Tensor | None = None,
        lengths: Tensor | None = None,
        dropped: Collection[int] = (),
    ) -> Iterator[Tensor]:
        """Output of each block in turn but the `dropped`, of features that are zero behind a sample's end. `ids_keep`
        is for samples that are not padded."""
        mask = None
        x = self.enter(features, ids_keep)
        if lengths is not None:
            mask = real_positions(x, lengths + self.leading)[..., 0].bool()[:, None, None]  # of keys
        for i, block in enumerate(self.blocks):
            if i not in dropped:
                x = block(x, mask)
                yield x

    def states(self, features: Tensor, lengths: Tensor | None = None) -> Iterator[Tensor]:
        """Local features and then each block's output, the last being the encoder's: (B, T, D) in fp32."""
        features = without_padding(features, lengths)
        yield features.float()
        for i, x in enumerate(self.layers(features, lengths=lengths), start=1):
            yield (self.leave(x) if i == len(self.blocks) else x)[:, self.leading :].float()

    def forward(
        self,
        features: Tensor,
        ids_keep: Tensor | None = None,
        lengths: Tensor | None = None,
        dropped: Collection[int] = (),
        ends: Tensor | None = None,
    ) -> Tensor:
        """Local features -> output of the last block (B, E+T, D), or (B, E+K, D) of what is kept. Samples end at
        `lengths`, whether `ends` are given or not."""
        x = features = without_padding(features, lengths)
        for output in self.layers(features, ids_keep, lengths, dropped):
            x = output
        return x


class Summed(NamedTuple):
    """What one micro-batch adds to the step: sums, because the divisor is the number of hidden positions of the global
    batch."""

    loss: Tensor  # ()
    figures: dict[str, Tensor]  # (), of what is worth watching


class Baseline(nn.Module, ABC):
    """An encoder, called student as data2vec's is, and what its objective puts on it."""

    student: Any  # BorrowedEncoder
    step = 0
    """Optimizer steps taken so far, where something follows a schedule."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config

    def tracked(self) -> Iterator[tuple[nn.Parameter, nn.Parameter]]:
        """Nothing is averaged: there is no teacher."""
        return iter(())

    def forward(self, batch: Any, seed: int = 0) -> Summed | Tensor:
        """One micro-batch -> what it adds to the step; of a FullView, what is seen in the encoder's states. `seed`
        chooses the blocks that layer drop leaves out; give the same to all ranks."""
        if isinstance(batch, FullView):
            features = self.student.local(batch.inputs, batch.lengths)
            return batch.see(self.student.states(features, batch.lengths), batch.lengths)
        return self.learn(batch, dropped_blocks(self.config, seed) if self.training else frozenset())

    @abstractmethod
    def learn(self, batch: Any, dropped: Collection[int]) -> Summed: ...


def ours(module: nn.Module) -> Any:
    """The same module, its Linear layers computed as those of data2vec are, so that neither is the faster for it."""
    for child in module.modules():
        if type(child) is nn.Linear and child.bias is not None:
            child.__class__ = Linear
    return module


def sizes(config: ModelConfig) -> dict[str, Any]:
    """What all configs of `transformers` have of ours."""
    return {
        "hidden_size": config.width,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads,
        "intermediate_size": int(config.width * config.mlp_ratio),
        "layer_norm_eps": config.norm_eps,
        "attn_implementation": "sdpa",
    }
