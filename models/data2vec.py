"""data2vec 2.0 (Baevski, Babu, Hsu & Auli, ICML 2023): the whole method is `Data2Vec.forward`.

Shapes: B samples, M masks a sample, N = B*M rows, T positions, K kept positions, E extra tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from models.config import ModelConfig
from models.decoder import Decoder
from models.encoder import Block, init_linear
from models.image import ImageFrontEnd
from models.masks import gather_rows, scatter_rows
from models.targets import Moments, moments, normalise_layer, normalise_mean, summed_loss

FRONT_ENDS = {"image": ImageFrontEnd}


@dataclass(frozen=True)
class Batch:
    """One micro-batch. Rows of the masks are sample-major: row b*M + m is mask m of sample b."""

    inputs: Tensor  # image: (B, C, H, W), uint8 or already normalised floats
    ids_keep: Tensor  # (B*M, K) int64 ascending
    ids_mask: Tensor  # (B*M, T-K) int64 ascending
    seeds: tuple[int, ...]  # (B,) what each sample's noise is drawn from
    failures: tuple[str, ...] = ()  # files that had to be replaced while loading

    @property
    def masked(self) -> int:
        """Hidden positions over all rows: what the loss is divided by, known without asking the device."""
        return self.ids_mask.numel()

    def to(self, device: torch.device) -> Batch:
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """DataLoader calls this by name; it does not look inside dataclasses."""
        return self._each(lambda tensor: tensor.pin_memory())

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        return Batch(change(self.inputs), change(self.ids_keep), change(self.ids_mask), self.seeds, self.failures)


class Output(NamedTuple):
    """What one micro-batch adds to the step. Sums, because the divisors are those of the global batch."""

    regression: Tensor  # (), summed over hidden positions and channels
    cls: Tensor  # (), summed over rows and channels, not yet weighted
    prediction: Moments  # per channel over the hidden positions of all rows
    target: Moments


class Encoder(nn.Module):
    """Front end, extra tokens, context norm, prenet and main blocks: the student, and again the teacher."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.local = FRONT_ENDS[config.modality](config)
        self.extra_tokens = nn.Parameter(torch.randn(1, config.extra_tokens, config.width))
        self.context_norm = nn.LayerNorm(config.width, eps=config.norm_eps)  # also with an empty prenet

        def stack(depth: int) -> nn.ModuleList:
            blocks = (Block(config.width, config.heads, config.mlp_ratio, config.norm_eps) for _ in range(depth))
            return nn.ModuleList(blocks)

        self.prenet = stack(config.prenet_depth)
        self.blocks = stack(config.depth)
        init_linear(self.prenet)
        init_linear(self.blocks)

    def context(self, features: Tensor, ids_keep: Tensor | None = None) -> Tensor:
        """Local features (B, T, D) -> input of the main blocks (N, E+K, D), or (B, E+T, D) without masks."""
        x = self.local.keep(features, ids_keep)
        x = torch.cat([self.extra_tokens.to(x.dtype).expand(len(x), -1, -1), x], dim=1)
        x = self.context_norm(x)
        for block in self.prenet:
            x, _ = block(x)
        return x

    def layers(self, x: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """(output, MLP output) of each main block in turn, so that no caller has to keep them all."""
        for block in self.blocks:
            x, ffn = block(x)
            yield x, ffn

    def forward(self, inputs: Tensor, ids_keep: Tensor | None = None) -> Tensor:
        """Inputs -> final output (N, E+K, D)."""
        x = self.context(self.local.features(inputs), ids_keep)
        for output, _ in self.layers(x):
            x = output
        return x


class Data2Vec(nn.Module):
    """Student, decoder, and the teacher as a frozen child, so that one engine shards and gathers all three."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.student = Encoder(config)
        self.decoder = Decoder(config)
        self.teacher = Encoder(config).requires_grad_(False)
        self.teacher.load_state_dict(self.student.state_dict())

    def tracked(self) -> Iterator[tuple[nn.Parameter, nn.Parameter]]:
        """(student parameter, teacher parameter) of everything that the teacher averages."""
        yield from zip(self.student.parameters(), self.teacher.parameters(), strict=True)

    @torch.no_grad()
    def targets(self, inputs: Tensor) -> Tensor:
        """Contextualised targets (B, T, D) in fp32 from the full input: the mean over the top blocks, normalised."""
        config, extra = self.config.targets, self.config.extra_tokens
        first = self.config.depth - config.top_k_layers
        total: Tensor | None = None
        x = self.teacher.context(self.teacher.local.features(inputs))
        for i, (_, ffn) in enumerate(self.teacher.layers(x)):
            if i >= first:
                layer = normalise_layer(ffn[:, extra:], config)
                total = layer if total is None else total.add_(layer)
        assert total is not None
        return normalise_mean(total / config.top_k_layers, config)

    def predict(self, encoded: Tensor, batch: Batch) -> Tensor:
        """Student output (N, E+K, D) -> predictions (N, T-K, D) at the hidden positions."""
        config = self.config
        kept = encoded[:, config.extra_tokens :]
        full = scatter_rows(kept, batch.ids_keep, config.positions, config.mask.noise_std, batch.seeds)
        return self.decoder.proj(gather_rows(self.decoder(full), batch.ids_mask))

    def forward(self, batch: Batch) -> Output:
        """One micro-batch: targets from the teacher's full view, predictions from M masked views, their distance."""
        loss, scale = self.config.loss, self.config.loss_scale
        targets = self.targets(batch.inputs)
        encoded = self.student(batch.inputs, batch.ids_keep)
        prediction = self.predict(encoded, batch)
        target = gather_rows(targets, batch.ids_mask)

        regression = summed_loss(prediction, target, loss.beta, scale)
        cls = regression.new_zeros(())
        if loss.cls:
            token = encoded[:, self.config.extra_tokens - 1]
            mean = targets.mean(dim=1).repeat_interleave(self.config.num_masks, dim=0)
            cls = summed_loss(token, mean, loss.beta, scale)
        return Output(regression, cls, moments(prediction), moments(target))
