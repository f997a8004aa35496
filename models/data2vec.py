"""data2vec 2.0 (Baevski, Babu, Hsu & Auli, ICML 2023): the whole method is `Data2Vec.forward`.

Shapes: B samples, M masks a sample, N = B*M rows, T positions, K kept positions, E extra tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.alibi import Alibi
from models.audio import RelativePositions, WaveformEncoder
from models.config import ModelConfig
from models.decoder import Decoder
from models.encoder import Block, init_linear
from models.fused.attention import Bias
from models.image import PatchEmbedding, SinCosPositions
from models.masks import scatter_rows, without_padding
from models.movable import Movable
from models.targets import Moments, mean_target, regression, summed_loss
from models.text import InFeatures, TokenEmbedding


class FrontEnd(NamedTuple):
    """What makes a modality.

    `local(config)(inputs, lengths)` -> features (B, T, D), once a sample; `positions(config)(features, ids_keep, ends)`
    -> (N, K, D), what the encoder sees of them. The teacher averages a local encoder of its own, or is `given` the
    student's features. `context_norm`: the norm before the blocks exists even where there is no prenet.
    """

    local: type[nn.Module]
    positions: type[nn.Module]
    given: bool
    alibi: bool
    context_norm: bool


FRONT_ENDS = {
    "image": FrontEnd(PatchEmbedding, SinCosPositions, given=False, alibi=False, context_norm=True),
    "audio": FrontEnd(WaveformEncoder, RelativePositions, given=True, alibi=True, context_norm=True),
    "text": FrontEnd(TokenEmbedding, InFeatures, given=True, alibi=False, context_norm=False),
}


@dataclass(frozen=True)
class Batch(Movable):
    """One micro-batch. Rows of the masks are sample-major: row b*M + m is mask m of sample b."""

    inputs: Tensor  # image: (B, C, H, W), uint8 or already normalised; audio: (B, samples); text: (B, T) ids
    ids_keep: Tensor  # (B*M, K) int64 ascending
    ids_mask: Tensor  # (B*M, T-K) int64 ascending
    seeds: tuple[int, ...]  # (B,) what each sample's noise is drawn from
    failures: tuple[str, ...] = ()  # files that had to be replaced while loading
    lengths: Tensor | None = None  # (B,) positions that are no padding, which is at the end; None: all

    @property
    def masked(self) -> int:
        """Hidden positions over all rows: what the loss is divided by, known without asking the device."""
        return self.ids_mask.numel()

    @property
    def rows(self) -> int:
        return len(self.ids_mask)


@dataclass(frozen=True)
class FullView(Movable):
    """Samples for the teacher alone; `see` makes a tensor of its states (`Encoder.states`) and of the lengths."""

    inputs: Tensor
    lengths: Tensor | None
    see: Callable[[Iterator[Tensor], Tensor | None], Tensor]


class Output(NamedTuple):
    """What one micro-batch adds to the step. Sums, because the divisors are those of the global batch."""

    regression: Tensor  # (), summed over hidden positions and channels
    cls: Tensor  # (), summed over rows and channels, not yet weighted
    prediction: Moments  # per channel over the hidden positions of all rows
    target: Moments


class ExtraTokens(nn.Module):
    """Learned tokens in front of the others. A module of its own, as ZeRO 3 gathers the weights of what is called."""

    def __init__(self, count: int, width: int) -> None:
        super().__init__()
        # torch.randn would have to import sympy where there are shapes alone (pretrain.eager.shapes_only)
        self.weight = nn.Parameter(torch.empty(1, count, width).normal_())

    def forward(self, x: Tensor) -> Tensor:
        """(N, K, D) -> (N, E+K, D)."""
        return torch.cat([self.weight.to(x.dtype).expand(len(x), -1, -1), x], dim=1)


class Encoder(nn.Module):
    """Local encoder, positions, extra tokens, context norm, prenet and main blocks: the student; and again the teacher,
    without a local encoder if it is `given` the student's features."""

    def __init__(self, config: ModelConfig, given: bool = False) -> None:
        super().__init__()
        front = FRONT_ENDS[config.modality]
        self.local: Any = None if given else front.local(config)
        self.positions = front.positions(config)
        self.alibi = Alibi(config.heads) if front.alibi else None
        self.leading = config.extra_tokens
        self.recompute = False  # blocks keep their input alone, and are computed again in the backward pass
        self.extra_tokens = ExtraTokens(config.extra_tokens, config.width) if config.extra_tokens else None
        self.context_norm: nn.Module = nn.Identity()
        if config.prenet_depth or front.context_norm:
            self.context_norm = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.context_dropout = nn.Dropout(config.dropout.prenet)
        blocks = [Block(config, path) for path in config.path_rates()]
        self.prenet = nn.ModuleList(blocks[: config.prenet_depth])
        self.blocks = nn.ModuleList(blocks[config.prenet_depth :])
        init_linear(self.prenet)
        init_linear(self.blocks)

    def context(
        self,
        features: Tensor,
        ids_keep: Tensor | None = None,
        lengths: Tensor | None = None,
        ends: Tensor | None = None,
    ) -> tuple[Tensor, Bias | None]:
        """Local features (B, T, D) -> input of the main blocks (N, E+K, D), or (B, E+T, D) without masks; and what
        all blocks add to attention's logits. With the `lengths` as `ends`, too, positions do not know how far a sample
        is padded, either; pre-training's do, as the reference's."""
        bias = self.bias(features, ids_keep, lengths)
        x = self.positions(features, ids_keep, ends)
        if self.extra_tokens is not None:
            x = self.extra_tokens(x)
        x = self.context_dropout(self.context_norm(x))
        for block in self.prenet:
            x, _ = self.through(block, x, bias)
        return x, bias

    def through(self, block: nn.Module, x: Tensor, bias: Bias | None) -> tuple[Tensor, Tensor]:
        """(output, MLP output) of one block."""
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(block, x, bias, use_reentrant=False)
        return block(x, bias)

    def bias(self, features: Tensor, ids_keep: Tensor | None, lengths: Tensor | None) -> Bias | None:
        """ALiBi between the kept positions, and which of them are padding."""
        if self.alibi is None and lengths is None:
            return None
        ids = torch.arange(features.shape[1], device=features.device)[None] if ids_keep is None else ids_keep
        padding = None
        if lengths is not None:
            per_row = lengths if ids_keep is None else lengths.repeat_interleave(len(ids_keep) // len(lengths))
            padding = ids >= per_row[:, None]
        return Bias(self.alibi(), ids, padding) if self.alibi is not None else Bias(padding=padding)

    def layers(
        self, x: Tensor, bias: Bias | None = None, dropped: Collection[int] = ()
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """(output, MLP output) of each main block in turn but the `dropped`, so that no caller has to keep them all."""
        for i, block in enumerate(self.blocks):
            if i not in dropped:
                x, ffn = self.through(block, x, bias)
                yield x, ffn

    def states(self, features: Tensor, lengths: Tensor | None = None) -> Iterator[Tensor]:
        """Local features and then each main block's output, without masks: (B, T, D) in fp32, extra tokens left out.

        Nothing comes from behind the end of a padded sample, as if it were alone.
        """
        features = without_padding(features, lengths)
        yield features.float()
        x, bias = self.context(features, lengths=lengths, ends=lengths)
        for output, _ in self.layers(x, bias):
            yield output[:, self.leading :].float()

    def forward(
        self,
        features: Tensor,
        ids_keep: Tensor | None = None,
        lengths: Tensor | None = None,
        dropped: Collection[int] = (),
        ends: Tensor | None = None,
    ) -> Tensor:
        """Local features -> final output (N, E+K, D)."""
        x, bias = self.context(features, ids_keep, lengths, ends)
        for output, _ in self.layers(x, bias, dropped):
            x = output
        return x


class Data2Vec(nn.Module):
    """Student, decoder, and the teacher as a frozen child, so that one engine shards and gathers all three."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.student = Encoder(config)
        self.decoder = Decoder(config)
        self.decoder_dropout = nn.Dropout(config.dropout.decoder)
        self.teacher = Encoder(config, FRONT_ENDS[config.modality].given).requires_grad_(False).eval()
        with torch.no_grad():
            for student, teacher in self.tracked():
                teacher.copy_(student)

    def train(self, mode: bool = True) -> Data2Vec:
        """The teacher stays in evaluation mode."""
        super().train(mode)
        self.teacher.eval()
        return self

    def tracked(self) -> Iterator[tuple[nn.Parameter, nn.Parameter]]:
        """(student parameter, teacher parameter) of everything that the teacher averages."""
        student = dict(self.student.named_parameters())
        for name, parameter in self.teacher.named_parameters():
            yield student[name], parameter

    @torch.no_grad()
    def targets(self, inputs: Tensor, features: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Contextualised targets (B, T, D) in fp32 from the full input: the mean over the top blocks, normalised.

        `features` are the student's, which the teacher takes unless it has a local encoder of its own.
        """
        config, extra = self.config.targets, self.config.extra_tokens
        if self.teacher.local is not None:
            features = self.teacher.local(inputs, lengths)
        x, bias = self.teacher.context(features, lengths=lengths)
        top = islice(self.teacher.layers(x, bias), self.config.depth - config.top_k_layers, None)
        return mean_target((ffn[:, extra:] for _, ffn in top), config)

    def teacher_states(self, inputs: Tensor, lengths: Tensor | None = None) -> Iterator[Tensor]:
        """What the teacher makes of full inputs: see `Encoder.states`."""
        local = self.student.local if self.teacher.local is None else self.teacher.local
        yield from self.teacher.states(local(inputs, lengths), lengths)

    def predict(self, encoded: Tensor, batch: Batch) -> Tensor:
        """Student output (N, E+K, D) -> predictions (N, T-K, D) at the hidden positions."""
        config = self.config
        kept = self.decoder_dropout(encoded[:, config.extra_tokens :])
        length = batch.ids_keep.shape[1] + batch.ids_mask.shape[1]
        full = scatter_rows(kept, batch.ids_keep, length, config.mask.noise_std, batch.seeds)
        return self.decoder.proj(self.decoder(full, batch.ids_mask))

    def forward(self, batch: Batch | FullView, seed: int = 0) -> Output | Tensor:
        """One micro-batch: targets from the teacher's full view, predictions from M masked views, their distance.

        `seed` chooses the blocks that layer drop leaves out; give the same to all ranks. Of a FullView, what is seen in
        it, and nothing else.
        """
        if isinstance(batch, FullView):
            return batch.see(self.teacher_states(batch.inputs, batch.lengths), batch.lengths)
        loss, scale = self.config.loss, self.config.loss_scale
        features = self.student.local(batch.inputs, batch.lengths)
        targets = self.targets(batch.inputs, features.detach(), batch.lengths)
        encoded = self.student(features, batch.ids_keep, batch.lengths, self.dropped_blocks(seed))
        prediction = self.predict(encoded, batch)

        error, predicted, wanted = regression(prediction, targets, batch.ids_mask, loss.beta, scale)
        cls = error.new_zeros(())
        if loss.cls:
            token = encoded[:, self.config.extra_tokens - 1]
            mean = targets.mean(dim=1).repeat_interleave(len(token) // len(targets), dim=0)
            cls = summed_loss(token, mean, loss.beta, scale)
        return Output(error, cls, predicted, wanted)

    def dropped_blocks(self, seed: int) -> frozenset[int]:
        return dropped_blocks(self.config, seed) if self.training else frozenset()


def dropped_blocks(config: ModelConfig, seed: int) -> frozenset[int]:
    """The main blocks that this micro-step leaves out, each with probability `dropout.layer`."""
    if not config.dropout.layer:
        return frozenset()
    draws = torch.rand(config.depth, generator=torch.Generator().manual_seed(seed))
    return frozenset((draws < config.dropout.layer).nonzero().flatten().tolist())
