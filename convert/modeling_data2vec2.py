"""data2vec 2.0's encoders of images and speech (Baevski, Babu, Hsu & Auli, ICML 2023, arXiv 2212.07525) as
transformers models. This file needs torch and transformers alone.

Shapes: B samples, T positions (patches or frames), E extra tokens, D width, H heads, C outputs.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling, CausalLMOutput, ImageClassifierOutput


class Data2Vec2Config(PretrainedConfig):
    """`num_hidden_layers` counts the `num_prenet_layers` too. `position_grid`: the side of the grid of patches whose
    positions were learned (0: that of `image_size`). Of the dropouts, `hidden` acts behind attention, `activation`
    within the MLP and `mlp` behind it, `prenet` in front of the first block and `head` in front of the outputs."""

    model_type = "data2vec2"

    def __init__(
        self,
        modality: str = "image",
        hidden_size: int = 768,
        num_attention_heads: int = 12,
        num_hidden_layers: int = 12,
        num_prenet_layers: int = 2,
        intermediate_size: int = 3072,
        layer_norm_eps: float = 1e-6,
        hidden_dropout: float = 0.0,
        attention_dropout: float = 0.0,
        activation_dropout: float = 0.0,
        mlp_dropout: float = 0.0,
        prenet_dropout: float = 0.0,
        head_dropout: float = 0.0,
        image_size: int = 224,
        patch_size: int = 16,
        position_grid: int = 0,
        num_channels: int = 3,
        num_extra_tokens: int = 1,
        conv_dim: int = 512,
        conv_kernel: tuple[int, ...] = (10, 3, 3, 3, 3, 2, 2),
        conv_stride: tuple[int, ...] = (5, 2, 2, 2, 2, 2, 2),
        num_position_layers: int = 5,
        position_kernel: int = 19,
        position_groups: int = 16,
        initializer_range: float = 0.02,
        ctc_loss_reduction: str = "mean",
        ctc_zero_infinity: bool = True,
        **kwargs: Any,
    ) -> None:
        self.modality = modality
        self.hidden_size = hidden_size
        self.num_attention_heads = num_attention_heads
        self.num_hidden_layers = num_hidden_layers
        self.num_prenet_layers = num_prenet_layers
        self.intermediate_size = intermediate_size
        self.layer_norm_eps = layer_norm_eps
        self.hidden_dropout = hidden_dropout
        self.attention_dropout = attention_dropout
        self.activation_dropout = activation_dropout
        self.mlp_dropout = mlp_dropout
        self.prenet_dropout = prenet_dropout
        self.head_dropout = head_dropout
        self.image_size = image_size
        self.patch_size = patch_size
        self.position_grid = position_grid
        self.num_channels = num_channels
        self.num_extra_tokens = num_extra_tokens
        self.conv_dim = conv_dim
        self.conv_kernel = list(conv_kernel)
        self.conv_stride = list(conv_stride)
        self.num_position_layers = num_position_layers
        self.position_kernel = position_kernel
        self.position_groups = position_groups
        self.initializer_range = initializer_range
        self.ctc_loss_reduction = ctc_loss_reduction
        self.ctc_zero_infinity = ctc_zero_infinity
        super().__init__(**kwargs)

    @property
    def inputs_to_logits_ratio(self) -> int:
        """Waveform samples a frame."""
        ratio = 1
        for stride in self.conv_stride:
            ratio *= stride
        return ratio


class PatchEmbedding(nn.Module):
    """A convolution whose kernel and stride are the patch; fixed 2-D sin-cos positions are added. Where grey images
    are wanted, coloured ones become grey (ITU-R 601)."""

    def __init__(self, config: Data2Vec2Config) -> None:
        super().__init__()
        self.proj = nn.Conv2d(config.num_channels, config.hidden_size, config.patch_size, config.patch_size)
        self.grid = config.position_grid or config.image_size // config.patch_size

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, channels, height, width) -> (B, T, D)."""
        if self.proj.in_channels == 1 and pixels.shape[1] == 3:
            pixels = torch.einsum("bchw,c->bhw", pixels, pixels.new_tensor([0.299, 0.587, 0.114]))[:, None]
        x = self.proj(pixels.to(self.proj.weight.dtype))
        positions = sincos_positions(x.shape[1], x.shape[2], x.shape[3], self.grid, x.device)
        return x.flatten(2).transpose(1, 2) + positions.to(x.dtype)


def sincos_positions(width: int, rows: int, columns: int, grid: int, device: torch.device) -> Tensor:
    """(rows * columns, width): the column in the first half, the row in the second, by sines and cosines. A grid of
    another size than the learned `grid` is laid over it, centres between the same borders."""
    omega = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width / 4))

    def axis(count: int) -> Tensor:
        place = (torch.arange(count, dtype=torch.float64) + 0.5) * (grid / count) - 0.5
        angle = place[:, None] * omega
        return torch.cat([angle.sin(), angle.cos()], dim=1)

    x = axis(columns)[None, :, :].expand(rows, -1, -1)
    y = axis(rows)[:, None, :].expand(-1, columns, -1)
    return torch.cat([x, y], dim=2).flatten(0, 1).to(device, torch.float32)


class WaveformEncoder(nn.Module):
    """Strided convolutions without bias, each followed by LayerNorm over channels and GELU; LayerNorm, Linear."""

    def __init__(self, config: Data2Vec2Config) -> None:
        super().__init__()
        self.kernels, self.strides = config.conv_kernel, config.conv_stride
        widths = [1] + [config.conv_dim] * len(config.conv_kernel)
        self.convs = nn.ModuleList(
            nn.Conv1d(width, config.conv_dim, kernel, stride, bias=False)
            for width, kernel, stride in zip(widths, config.conv_kernel, config.conv_stride, strict=False)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(config.conv_dim) for _ in self.convs)
        self.norm = nn.LayerNorm(config.conv_dim)
        self.proj = nn.Linear(config.conv_dim, config.hidden_size)

    def forward(self, waveform: Tensor) -> Tensor:
        """(B, samples), mean 0 and variance 1 -> (B, T, D)."""
        x = waveform.to(self.proj.weight.dtype)[..., None]
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = F.gelu(norm(conv(x.transpose(1, 2)).transpose(1, 2)))
        return self.proj(self.norm(x))

    def frames(self, samples: Tensor) -> Tensor:
        """How many frames so many samples give."""
        for kernel, stride in zip(self.kernels, self.strides, strict=True):
            samples = (samples - kernel) // stride + 1
        return samples


class RelativePositions(nn.Module):
    """What layers of {grouped convolution, LayerNorm without affine, GELU} make of the frames around each one."""

    def __init__(self, config: Data2Vec2Config) -> None:
        super().__init__()
        width, kernel = config.hidden_size, config.position_kernel
        self.convs = nn.ModuleList(
            nn.Conv1d(width, width, kernel, padding=kernel // 2, groups=config.position_groups)
            for _ in range(config.num_position_layers)
        )

    def forward(self, features: Tensor, real: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D), to be added to the features. Where `real` (B, T, 1) is 0 each layer sees zeros, as
        behind the end of a clip."""
        x = features
        for conv in self.convs:
            x = conv(x.transpose(1, 2)).transpose(1, 2)
            x = F.gelu(F.layer_norm(x, x.shape[-1:])) * real
        return x


class Alibi(nn.Module):
    """Attention with linear biases (Press, Smith & Lewis 2022), symmetric, with a learned scale a head."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(heads))

    def forward(self, length: int) -> Tensor:
        """(H, T, T) fp32: -slope * max(scale, 0) * |i - j|, for attention's logits."""
        slope = slopes(len(self.scale)).to(self.scale.device) * self.scale.float().clamp(min=0)
        place = torch.arange(length, device=slope.device, dtype=torch.float32)
        return -slope[:, None, None] * (place[:, None] - place).abs()


def slopes(heads: int) -> Tensor:
    """(H,) a geometric series; where H is no power of two, that of the power below it, and then every other slope of
    twice that power."""
    power = 2 ** (heads.bit_length() - 1)
    ratio = 2 ** (-8 / power)
    return torch.tensor([ratio ** (i + 1) for i in range(power)] + [ratio ** (i + 0.5) for i in range(heads - power)])


class Attention(nn.Module):
    def __init__(self, config: Data2Vec2Config) -> None:
        super().__init__()
        self.heads, self.dropout = config.num_attention_heads, config.attention_dropout
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """(B, T, D) and what is added to the logits, broadcast to (B, H, T, T), in fp32 -> (B, T, D)."""
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        dropout = self.dropout if self.training else 0.0
        if bias is None:
            x = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
        else:
            logits = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).float() + bias
            x = F.dropout(logits.softmax(-1), dropout).to(v.dtype) @ v
        return self.proj(x.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self, config: Data2Vec2Config) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)
        self.dropout = nn.Dropout(config.activation_dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.dropout(F.gelu(self.fc1(x))))


class Block(nn.Module):
    """A post-norm block."""

    def __init__(self, config: Data2Vec2Config) -> None:
        super().__init__()
        self.attn = Attention(config)
        self.norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = Mlp(config)
        self.norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attn_dropout, self.mlp_dropout = nn.Dropout(config.hidden_dropout), nn.Dropout(config.mlp_dropout)

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        x = self.norm1(x + self.attn_dropout(self.attn(x, bias)))
        return self.norm2(x + self.mlp_dropout(self.mlp(x)))


class ExtraTokens(nn.Module):
    """Learned tokens in front of the others; the last one is trained as a class token."""

    def __init__(self, count: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(1, count, width))

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, E+T, D)."""
        return torch.cat([self.weight.to(x.dtype).expand(len(x), -1, -1), x], dim=1)


class Data2Vec2PreTrainedModel(PreTrainedModel):
    config_class = Data2Vec2Config
    base_model_prefix = "encoder"
    _no_split_modules = ["Block"]  # noqa: RUF012
    _supports_sdpa = True  # of images; speech has a bias, which is added in fp32 in plain torch


class Data2Vec2Encoder(Data2Vec2PreTrainedModel):
    """LayerNorm, dropout, prenet and main blocks, as both kinds of inputs have them."""

    def __init__(self, config: Data2Vec2Config) -> None:
        super().__init__(config)
        prenet = config.num_prenet_layers
        self.context_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.context_dropout = nn.Dropout(config.prenet_dropout)
        self.prenet = nn.ModuleList(Block(config) for _ in range(prenet))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers - prenet))

    def encode(self, x: Tensor, bias: Tensor | None, keep: bool | None) -> tuple[Tensor, tuple[Tensor, ...] | None]:
        """(B, T, D) -> the last block's output; and, to `keep`, the first block's input with the output of each."""
        x = self.context_dropout(self.context_norm(x))
        keep = self.config.output_hidden_states if keep is None else keep
        states: tuple[Tensor, ...] | None = (x,) if keep else None
        for block in (*self.prenet, *self.blocks):
            x = block(x, bias)
            states = None if states is None else (*states, x)
        return x, states


class Data2Vec2VisionModel(Data2Vec2Encoder):
    """Images. Outputs: E extra tokens, then patches row by row; `pooler_output` is the patches' mean."""

    main_input_name = "pixel_values"

    def __init__(self, config: Data2Vec2Config) -> None:
        super().__init__(config)
        self.local = PatchEmbedding(config)
        self.extra_tokens = None
        if config.num_extra_tokens:
            self.extra_tokens = ExtraTokens(config.num_extra_tokens, config.hidden_size)
        self.post_init()

    def forward(self, pixel_values: Tensor, output_hidden_states: bool | None = None) -> BaseModelOutputWithPooling:
        """(B, channels, height, width), of any size that the patch divides."""
        x = self.local(pixel_values)
        if self.extra_tokens is not None:
            x = self.extra_tokens(x)
        x, states = self.encode(x, None, output_hidden_states)
        pooled = x[:, self.config.num_extra_tokens :].mean(dim=1)
        return BaseModelOutputWithPooling(last_hidden_state=x, pooler_output=pooled, hidden_states=states)


class Data2Vec2AudioModel(Data2Vec2Encoder):
    """Speech at 16 kHz. `pooler_output` is the mean of the frames that are no padding."""

    main_input_name = "input_values"

    def __init__(self, config: Data2Vec2Config) -> None:
        super().__init__(config)
        self.local = WaveformEncoder(config)
        self.positions = RelativePositions(config)
        self.alibi = Alibi(config.num_attention_heads)
        self.post_init()

    def frames(self, length: int, attention_mask: Tensor) -> Tensor:
        """(B, T) bool: which of `length` frames come of samples that are no padding, which is at the end."""
        counts = self.local.frames(attention_mask.long().sum(dim=1))
        return torch.arange(length, device=counts.device) < counts[:, None]

    def forward(
        self, input_values: Tensor, attention_mask: Tensor | None = None, output_hidden_states: bool | None = None
    ) -> BaseModelOutputWithPooling:
        """(B, samples), each clip of mean 0 and variance 1; the mask, of this shape, is 0 where they are padding. What
        is made of a clip does not depend on how far it is padded."""
        features = self.local(input_values)
        length = features.shape[1]
        bias = self.alibi(length)
        real = features.new_ones(len(features), length, 1)
        if attention_mask is not None:
            mask = self.frames(length, attention_mask)
            real = mask[..., None].to(features.dtype)
            features = features * real
            bias = bias.masked_fill(~mask[:, None, None, :], torch.finfo(bias.dtype).min)
        x, states = self.encode(features + self.positions(features, real), bias, output_hidden_states)
        pooled = (x * real).sum(dim=1) / real.sum(dim=1)
        return BaseModelOutputWithPooling(last_hidden_state=x, pooler_output=pooled, hidden_states=states)


class PooledHead(nn.Module):
    """LayerNorm, Linear on what is pooled. (B, D) -> (B, C)."""

    def __init__(self, config: Data2Vec2Config) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.hidden_size, eps=1e-6)
        self.dropout = nn.Dropout(config.head_dropout)
        self.linear = nn.Linear(config.hidden_size, config.num_labels)  # type: ignore[arg-type]

    def forward(self, pooled: Tensor) -> Tensor:
        return self.linear(self.dropout(self.norm(pooled)))


class FrameHead(nn.Module):
    """A Linear on every frame. (B, T, D) -> (B, T, C)."""

    def __init__(self, config: Data2Vec2Config) -> None:
        super().__init__()
        self.dropout = nn.Dropout(config.head_dropout)
        self.linear = nn.Linear(config.hidden_size, config.num_labels)  # type: ignore[arg-type]

    def forward(self, frames: Tensor) -> Tensor:
        return self.linear(self.dropout(frames))


class Data2Vec2ForImageClassification(Data2Vec2PreTrainedModel):
    main_input_name = "pixel_values"

    def __init__(self, config: Data2Vec2Config) -> None:
        super().__init__(config)
        self.encoder = Data2Vec2VisionModel(config)
        self.head = PooledHead(config)
        self.post_init()

    def forward(
        self, pixel_values: Tensor, labels: Tensor | None = None, output_hidden_states: bool | None = None
    ) -> ImageClassifierOutput:
        """Images and, for the mean cross-entropy, their classes (B,) -> logits (B, C)."""
        encoded = self.encoder(pixel_values, output_hidden_states)
        logits = self.head(encoded.pooler_output)
        loss = None if labels is None else F.cross_entropy(logits.float(), labels)
        return ImageClassifierOutput(loss=loss, logits=logits, hidden_states=encoded.hidden_states)


class Data2Vec2ForCTC(Data2Vec2PreTrainedModel):
    main_input_name = "input_values"

    def __init__(self, config: Data2Vec2Config) -> None:
        super().__init__(config)
        self.encoder = Data2Vec2AudioModel(config)
        self.head = FrameHead(config)
        self.post_init()

    def forward(
        self,
        input_values: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
    ) -> CausalLMOutput:
        """Waveforms and, for the CTC loss, their letters (B, S), padded with anything negative -> logits (B, T, C). The
        blank is `config.pad_token_id`."""
        encoded = self.encoder(input_values, attention_mask, output_hidden_states)
        logits = self.head(encoded.last_hidden_state)
        loss = None if labels is None else self.ctc_loss(logits, attention_mask, labels)
        return CausalLMOutput(loss=loss, logits=logits, hidden_states=encoded.hidden_states)

    def ctc_loss(self, logits: Tensor, attention_mask: Tensor | None, labels: Tensor) -> Tensor:
        frames = torch.full((len(logits),), logits.shape[1], device=logits.device)
        if attention_mask is not None:
            frames = self.encoder.frames(logits.shape[1], attention_mask).sum(dim=1)
        letters = labels >= 0
        return F.ctc_loss(
            logits.float().log_softmax(-1).transpose(0, 1),
            labels.masked_select(letters),
            frames,
            letters.sum(dim=1),
            blank=self.config.pad_token_id,
            reduction=self.config.ctc_loss_reduction,
            zero_infinity=self.config.ctc_zero_infinity,
        )
