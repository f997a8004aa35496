"""The reference's vocabulary and ours, as tables that are read in both directions: parameters, then settings.

The reference is fairseq's data2vec 2.0 (docs/method.md). Its words are on the left, ours on the right.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from models.config import RATE, ImageConfig

# Parameters. {n} is a layer's number, {rest} what follows; {encoder} is modality_encoders.IMAGE and so on, {owner}
# student or teacher. What has no modality is everyone's.
NAMES: tuple[tuple[str, str, str], ...] = (
    ("blocks.{rest}", "{owner}.blocks.{rest}", ""),
    ("{encoder}.extra_tokens", "{owner}.extra_tokens.weight", ""),
    ("{encoder}.context_encoder.norm.{rest}", "{owner}.context_norm.{rest}", ""),
    ("{encoder}.context_encoder.blocks.{rest}", "{owner}.prenet.{rest}", ""),
    ("{encoder}.decoder.blocks.{n}.0.{rest}", "decoder.convs.{n}.{rest}", ""),
    ("{encoder}.decoder.proj.{rest}", "decoder.proj.{rest}", ""),
    ("{encoder}.local_encoder.proj.{rest}", "{owner}.local.proj.{rest}", "image"),
    ("{encoder}.alibi_scale", "{owner}.alibi.scale", "audio"),
    ("{encoder}.relative_positional_encoder.{n+1}.0.{rest}", "{owner}.positions.convs.{n}.{rest}", "audio"),
    ("{encoder}.local_encoder.conv_layers.{n}.0.{rest}", "{owner}.local.convs.{n}.{rest}", "audio"),
    ("{encoder}.local_encoder.conv_layers.{n}.2.1.{rest}", "{owner}.local.norms.{n}.{rest}", "audio"),
    ("{encoder}.project_features.1.{rest}", "{owner}.local.norm.{rest}", "audio"),
    ("{encoder}.project_features.2.{rest}", "{owner}.local.proj.{rest}", "audio"),
    ("{encoder}.local_encoder.embed_tokens.{rest}", "{owner}.local.tokens.{rest}", "text"),
    ("{encoder}.local_encoder.embed_positions.{rest}", "{owner}.local.positions.{rest}", "text"),
    ("{encoder}.local_encoder.layernorm_embedding.{rest}", "{owner}.local.norm.{rest}", "text"),
)
POSITIONS = "{encoder}.fixed_positional_encoder.positions"  # of images: computed here, never loaded
ALIBI = "alibi_scale"  # (1, 1, H, 1, 1) there, (H,) here

SENTENCE = "classification_heads.sentence_classification_head"
HEAD_NAMES: tuple[tuple[str, str, str], ...] = (
    ("fc_norm.{rest}", "head.norm.{rest}", "image"),
    ("head.{rest}", "head.linear.{rest}", "image"),
    ("w2v_encoder.proj.{rest}", "head.linear.{rest}", "audio"),
    (SENTENCE + ".dense.{rest}", "head.dense.{rest}", "text"),
    (SENTENCE + ".out_proj.{rest}", "head.linear.{rest}", "text"),
)


class FineTuned(NamedTuple):
    """A fine-tuned model: what it is called here and there; where its encoder's parameters are, and the settings of its
    pre-training; what says the head's dropout; its task; settings of its own that have to be one of a few values, of
    which the first is written."""

    ours: str
    name: str
    prefix: str
    settings: str
    dropout: str
    task: str
    fixed: dict[str, tuple[Any, ...]]


FINE_TUNED = {
    "image": FineTuned(
        "image",
        "mae_image_classification",
        "model.",
        "pretrained_model_args",
        "",
        "mae_image_classification",
        {"use_fc_norm": (True,), "prediction_mode": ("MEAN_POOLING", 1)},
    ),
    "audio": FineTuned(
        "speech",
        "wav2vec_ctc",
        "w2v_encoder.w2v_model.",
        "w2v_args",
        "final_dropout",
        "audio_finetuning",
        {"normalize": (True,), "blank_weight": (0.0,)},
    ),
    "text": FineTuned(
        "text",
        "data2vec_text_classification",
        "model.",
        "pretrained_model_args",
        "pooler_dropout",
        "sentence_prediction",
        {"pooler_activation_fn": ("tanh",)},
    ),
}

FIELD = re.compile(r"\{(n|rest)\}")
FIELDS = {"n": r"(?P<n>\d+)", "rest": r"(?P<rest>.+)"}


def encoder_of(modality: str) -> str:
    return f"modality_encoders.{modality.upper()}"


def their_name(name: str, modality: str, fine_tuned: bool = False) -> str:
    """The reference's name of one of our parameters; of `teacher.*` the name within `_ema`. Raises KeyError if it has
    none."""
    owner = name.partition(".")[0]
    names = HEAD_NAMES if owner == "head" else NAMES
    found = _translated(name, names, modality, owner)
    if found is None:
        raise KeyError(f"the reference has no parameter for our {name}")
    if owner == "teacher" and modality == "text":
        return found.removeprefix("blocks.")
    return FINE_TUNED[modality].prefix + found if fine_tuned and owner == "student" else found


def _translated(name: str, names: tuple[tuple[str, str, str], ...], modality: str, owner: str) -> str | None:
    """What the first row that fits our `name` makes of it."""
    for row in names:
        if row[2] not in ("", modality):
            continue
        theirs, ours = (word.replace("{encoder}", encoder_of(modality)).replace("{owner}", owner) for word in row[:2])
        parts = FIELD.split(ours)
        pattern = "".join(FIELDS[part] if i % 2 else re.escape(part) for i, part in enumerate(parts))
        if match := re.fullmatch(pattern, name):
            fields = match.groupdict()
            return theirs.format_map(fields | {"n+1": int(fields.get("n", 0)) + 1})
    return None


class Key(NamedTuple):
    """Settings of theirs and of ours that say the same; {m} is the modality. Values go over as they are, or by the two
    functions, from as many as there are on one side to as many as on the other. What is `optional` may be missing."""

    theirs: tuple[str, ...]
    ours: tuple[str, ...]
    modality: str = ""
    to_ours: Callable[..., tuple[Any, ...]] = lambda *values: values
    to_theirs: Callable[..., tuple[Any, ...]] = lambda *values: values
    optional: bool = False


def _layers(spec: str) -> tuple[Any, ...]:
    """ "[(512, 10, 5)] + [(512, 3, 2)] * 4" -> channels, kernels, strides. Raises ValueError if it is none of ours."""
    layers: list[tuple[int, int, int]] = []
    for part in spec.split("+"):
        layer, _, times = part.partition("*")
        layers += list(ast.literal_eval(layer.strip())) * min(int(times or 1), 1000)
    (channels, *others), kernels, strides = zip(*layers, strict=True)
    if set(others) - {channels}:
        raise ValueError("convolutions of different widths")
    return channels, list(kernels), list(strides)


def _spec(channels: int, kernels: list[int], strides: list[int]) -> tuple[str]:
    return (" + ".join(f"[({channels}, {k}, {s})]" for k, s in zip(kernels, strides, strict=True)),)


def _normalised(channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation of pixels, which the reference has in its code: ImageNet's, of three channels."""
    usual = ImageConfig()
    return (usual.mean, usual.std) if channels == usual.channels else ((0.5,) * channels, (0.5,) * channels)


def _same(theirs: str, ours: str, modality: str = "", optional: bool = False) -> Key:
    return Key((theirs,), (ours,), modality, optional=optional)


SETTINGS: tuple[Key, ...] = (
    _same("model.embed_dim", "model.width"),
    _same("model.num_heads", "model.heads"),
    _same("model.depth", "model.depth"),
    _same("model.mlp_ratio", "model.mlp_ratio"),
    _same("model.norm_eps", "model.norm_eps"),
    _same("model.clone_batch", "model.num_masks"),
    _same("model.average_top_k_layers", "model.targets.top_k_layers"),
    _same("model.instance_norm_target_layer", "model.targets.instance_norm_layer"),
    _same("model.layer_norm_target_layer", "model.targets.layer_norm_layer"),
    _same("model.layer_norm_targets", "model.targets.layer_norm"),
    _same("model.instance_norm_targets", "model.targets.instance_norm"),
    _same("model.loss_scale", "model.loss.scale"),
    _same("model.loss_beta", "model.loss.beta"),
    _same("model.cls_loss", "model.loss.cls"),
    _same("model.encoder_dropout", "model.dropout.residual"),
    _same("model.attention_dropout", "model.dropout.attention"),
    _same("model.post_mlp_drop", "model.dropout.mlp"),
    _same("model.layerdrop", "model.dropout.layer"),
    _same("model.ema_decay", "ema.start", optional=True),
    _same("model.ema_end_decay", "ema.end", optional=True),
    _same("model.ema_anneal_end_step", "ema.anneal_steps", optional=True),
    _same("model.max_update", "train.steps", optional=True),
    _same("model.min_target_var", "watch.min_target_deviation", optional=True),
    _same("model.min_pred_var", "watch.min_prediction_deviation", optional=True),
    _same("model.modalities.{m}.prenet_depth", "model.prenet_depth"),
    _same("model.modalities.{m}.num_extra_tokens", "model.extra_tokens"),
    _same("model.modalities.{m}.prenet_dropout", "model.dropout.prenet"),
    _same("model.modalities.{m}.mask_prob", "model.mask.prob"),
    _same("model.modalities.{m}.mask_prob_adjust", "model.mask.adjust"),
    _same("model.modalities.{m}.mask_length", "model.mask.length"),
    _same("model.modalities.{m}.inverse_mask", "model.mask.inverse"),
    _same("model.modalities.{m}.mask_noise_std", "model.mask.noise_std"),
    _same("model.modalities.{m}.decoder.decoder_dim", "model.decoder.width"),
    _same("model.modalities.{m}.decoder.decoder_groups", "model.decoder.groups"),
    _same("model.modalities.{m}.decoder.decoder_kernel", "model.decoder.kernel"),
    _same("model.modalities.{m}.decoder.decoder_layers", "model.decoder.layers"),
    _same("model.modalities.{m}.decoder.decoder_residual", "model.decoder.residual"),
    _same("model.modalities.{m}.decoder.projection_layers", "model.decoder.projection_layers"),
    _same("model.modalities.{m}.decoder.input_dropout", "model.dropout.decoder"),
    _same("model.modalities.image.input_size", "model.image.size", "image"),
    _same("model.modalities.image.patch_size", "model.image.patch", "image"),
    Key(
        ("model.modalities.image.in_chans",),
        ("model.image.channels", "model.image.mean", "model.image.std"),
        "image",
        lambda channels: (channels, *(list(values) for values in _normalised(channels))),
        lambda channels, mean, std: (channels,),
    ),
    Key(
        ("dataset.batch_size", "model.clone_batch"),
        ("model.loss.cls_rows", "model.num_masks"),
        "image",
        lambda rows, masks: (rows * masks, masks),
        lambda rows, masks: (max(1, rows // masks), masks),
        optional=True,
    ),
    Key(
        ("model.modalities.audio.feature_encoder_spec",),
        ("model.audio.channels", "model.audio.kernels", "model.audio.strides"),
        "audio",
        _layers,
        _spec,
    ),
    Key(
        ("model.modalities.audio.conv_pos_width", "model.modalities.audio.conv_pos_depth"),
        ("model.audio.position_kernel", "model.audio.position_layers"),
        "audio",
        lambda width, depth: (max(3, width // max(1, depth)), depth),
        lambda kernel, depth: (kernel * max(1, depth), depth),
    ),
    _same("model.modalities.audio.conv_pos_groups", "model.audio.position_groups", "audio"),
    Key(
        ("task.max_sample_size",),
        ("model.audio.seconds",),
        "audio",
        lambda samples: (samples / RATE,),
        lambda seconds: (round(seconds * RATE),),
        optional=True,
    ),
    _same("model.modalities.text.max_source_positions", "model.text.tokens", "text"),
    _same("model.modalities.text.dropout", "model.dropout.embedding", "text"),
)

# What the reference could be told and we cannot: only this value is taken, and it is written.
FIXED: tuple[tuple[str, Any, str], ...] = (
    ("model._name", "data2vec_multi", ""),
    ("model.layer_norm_first", False, ""),
    ("model.norm_affine", True, ""),
    ("model.modalities.{m}.use_alibi_encoder", False, "image text"),
    ("model.modalities.{m}.use_alibi_encoder", True, "audio"),
    ("model.modalities.{m}.learned_alibi_scale_per_head", True, "audio"),
    ("model.modalities.{m}.learned_alibi_scale_per_layer", False, ""),
    ("model.modalities.{m}.learned_alibi", False, ""),
    ("model.modalities.image.fixed_positions", True, "image"),
    ("model.modalities.audio.extractor_mode", "layer_norm", "audio"),
    ("model.modalities.audio.conv_pos_pre_ln", False, "audio"),
    ("model.modalities.text.learned_pos", True, "text"),
    ("model.modalities.text.no_scale_embedding", True, "text"),
    ("model.modalities.text.layernorm_embedding", True, "text"),
    ("model.modalities.text.no_token_positional_embeddings", False, "text"),
    ("task.normalize", True, "audio"),
)
# The same, of pre-training alone.
FIXED_IN_TRAINING: tuple[tuple[str, Any, str], ...] = (
    ("model.end_of_block_targets", False, ""),
    ("model.batch_norm_target_layer", False, ""),
    ("model.activation_dropout", 0.0, ""),
    ("model.dropout_input", 0.0, ""),
    ("model.shared_decoder", None, ""),
    ("model.recon_loss", 0.0, ""),
    ("model.d2v_loss", 1.0, ""),
    ("model.ema_encoder_only", False, "image audio"),
    ("model.ema_encoder_only", True, "text"),
    ("model.modalities.{m}.ema_local_encoder", True, "image"),
    ("model.modalities.{m}.ema_local_encoder", False, "audio text"),
    ("model.modalities.{m}.learned_alibi_scale", True, "audio"),
    ("model.modalities.{m}.local_grad_mult", 1.0, ""),
    ("model.modalities.{m}.encoder_zero_mask", True, ""),
    ("model.modalities.{m}.keep_masked_pct", 0.0, ""),
    ("model.modalities.{m}.mask_channel_prob", 0.0, ""),
    ("model.modalities.{m}.mask_dropout", 0.0, ""),
    ("model.modalities.{m}.prenet_layerdrop", 0.0, ""),
    ("model.modalities.{m}.decoder.add_positions_masked", False, ""),
    ("model.modalities.{m}.decoder.add_positions_all", False, ""),
    ("model.modalities.{m}.decoder.projection_ratio", 2.0, ""),
    ("model.modalities.image.transformer_decoder", False, "image"),
)

# What the reference wants to be told beyond that, or where our settings are silent.
FILLED: tuple[tuple[str, Any, str], ...] = (
    ("_name", None, ""),
    ("common.seed", 1, ""),
    ("criterion._name", "model", ""),
    ("task._name", "mae_image_pretraining", "image"),
    ("task._name", "audio_pretraining", "audio"),
    ("task._name", "masked_lm", "text"),
    ("task.d2v2_multi", True, "text"),
    ("task.data", "", ""),
    ("model.ema_same_dtype", True, ""),
    ("model.log_norms", True, ""),
    ("model.max_update", 0, ""),
    ("model.ema_decay", 0.999, ""),
    ("model.ema_end_decay", 0.9999, ""),
    ("model.ema_anneal_end_step", 0, ""),
    ("model.min_target_var", 0.1, ""),
    ("model.min_pred_var", 0.01, ""),
    ("model.mae_init", False, ""),
    ("model.seed", 1, ""),
    ("model.skip_ema", False, ""),
    ("model.decoder_group", False, ""),
    ("model.start_drop_path_rate", 0.0, ""),
    ("model.end_drop_path_rate", 0.0, ""),
    ("model.modalities._name", None, ""),
    ("model.modalities.{m}.start_drop_path_rate", 0.0, ""),
    ("model.modalities.{m}.end_drop_path_rate", 0.0, ""),
    ("model.modalities.{m}.init_extra_token_zero", False, "image"),
    ("model.modalities.{m}.init_extra_token_zero", True, "audio text"),
    ("model.modalities.{m}.mask_prob_min", None, ""),
    ("model.modalities.{m}.add_masks", False, ""),
    ("model.modalities.{m}.remove_masks", False, ""),
    ("model.modalities.{m}.mask_channel_length", 64, ""),
    ("model.modalities.{m}.alibi_scale", 1.0, ""),
    ("model.modalities.{m}.alibi_max_pos", None, ""),
    ("model.modalities.{m}.learned_alibi_scale", False, "image text"),
    ("model.modalities.{m}.learned_alibi_scale_per_head", False, "image text"),
    ("model.modalities.image.alibi_dims", 2, "image"),
    ("model.modalities.image.alibi_distance", "manhattan", "image"),
    ("model.modalities.image.enc_dec_transformer", False, "image"),
)


class Unfit(ValueError):
    """Settings of theirs that no settings of ours say."""


def our_settings(cfg: Any, modality: str, fine_tuned: bool = False) -> dict[str, Any]:
    """Our settings, sections `model`, `ema` and `watch`, of the reference's `cfg` of a pre-training; `fine_tuned`: what
    fine-tuning has made of it.

    Raises Unfit, naming every setting that is missing or cannot be had here.
    """
    problems: list[str] = []
    out: dict[str, Any] = {"model": {"modality": modality}}
    for path, wanted, modalities in FIXED if fine_tuned else FIXED + FIXED_IN_TRAINING:
        path = path.replace("{m}", modality)
        value = value_at(cfg, path)
        if modality in (modalities or modality).split() and value is not MISSING and value != wanted:
            problems.append(f"{path} is {value!r:.40}, only {wanted!r} is known")
    for key in SETTINGS:
        if key.modality not in ("", modality):
            continue
        paths = [path.replace("{m}", modality) for path in key.theirs]
        values = [value_at(cfg, path) for path in paths]
        missing = [path for path, value in zip(paths, values, strict=True) if value is MISSING]
        if missing or (key.optional and None in values):
            problems += [f"{path} is missing" for path in missing if not key.optional]
            continue
        try:
            for path, value in zip(key.ours, key.to_ours(*values), strict=True):
                _set(out, path, value)
        except (ValueError, TypeError, AttributeError, SyntaxError, OverflowError, MemoryError):
            problems.append(f"{', '.join(paths)} cannot be read: {values!r:.80}")
    if problems:
        raise Unfit("; ".join(problems))
    return out


def their_settings(settings: Mapping[str, Any], modality: str) -> dict[str, Any]:
    """The reference's `cfg` for our settings; what they lack is the reference's to default."""
    out: dict[str, Any] = {}
    for path, value, modalities in FILLED + FIXED + FIXED_IN_TRAINING:
        if modality in (modalities or modality).split():
            _set(out, path.replace("{m}", modality), value)
    for key in SETTINGS:
        values = [value_at(settings, path) for path in key.ours]
        if key.modality in ("", modality) and MISSING not in values:
            for path, value in zip(key.theirs, key.to_theirs(*values), strict=True):
                _set(out, path.replace("{m}", modality), value)
    model = out["model"]
    encoder = model["modalities"][modality]
    encoder |= {"type": modality.upper(), "num_alibi_heads": model["num_heads"], "model_depth": model["depth"]}
    if modality == "image":
        encoder["embed_dim"] = model["embed_dim"]
    model["supported_modality"] = modality.upper()
    return out


MISSING = object()


def value_at(tree: Any, path: str, default: Any = MISSING) -> Any:
    """The value at a dotted path, a text, number or container; "${a.b}" stands for the value there."""
    value = tree
    for part in path.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return default
        value = value[part]
    if isinstance(value, str) and (match := re.fullmatch(r"\$\{([\w.]+)\}", value)) and match[1] != path:
        return value_at(tree, match[1], default)
    known = isinstance(value, str | int | float | list | tuple | dict | None) and value != "???"
    return value if known else MISSING


def _set(tree: dict[str, Any], path: str, value: Any) -> None:
    *parts, last = path.split(".")
    for part in parts:
        tree = tree.setdefault(part, {})
    tree[last] = value
