"""The tokenizer of a model, as the tokenizer.json that transformers reads; its ids are those that the model knows."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers
from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from pretrain.checkpoint import CheckpointError
from pretrain.data.tokenizer import SPECIALS, SentencePieceTokenizer, Tokenizer

NORMAL, CONTROL, OWN, UNUSED = 1, 3, 4, 5  # kinds of pieces; the others are the unknown one and bytes
UNIGRAM, BPE = 1, 2
SPACE = "\u2581"
UNKNOWN = "\ue000"  # a private character, in no vocabulary
NEVER = -1e6  # the score of what is no text, so that no text becomes it
RANDOM = 64  # texts of random ids that ids are compared on
TEXTS = (
    "",
    " ",
    "The quick brown fox jumps over the lazy dog.",
    "  two  spaces, a tab\tand a\nnew line ",
    "</s> and <s> are text, <pad> and <unk> too; <0x41> is no A",
    "3.14159, 1/2, 100 %, $5 & 50 ct #1 a_b (c) [d] {e} e-mail@example.org",
    "don't can't we'll DON'T naïve café coöperate Ærø Straße \u0130stanbul",
    "Příliš žluťoučký kůň úpěl ďábelské ódy; zażółć gęślą jaźń",
    "Съешь ещё этих мягких французских булок, 我能吞下玻璃而不伤身体。 すべての人間は",
    "fi ligature \ufb01, full width \uff21\uff22, dots\u2026 \u201cquotes\u201d \u2013 dash \u00a0 space \u3000 wide",
    "combining e\u0301 a\u030a, emoji \U0001f600\U0001f1f3\U0001f1f1, zero\u200bwidth, soft\u00adhyphen",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa lllllllllll mississippi banananana",
)


def write(tokenizer: Tokenizer, folder: Path, longest: int) -> None:
    """Writes tokenizer.json and tokenizer_config.json; one sentence becomes `<s> a </s>`, a pair
    `<s> a </s> </s> b </s>`, of `longest` tokens if they are to be cut.

    Raises CheckpointError, in one line, for a SentencePiece model that cannot be written so.
    """
    content = tokenizer.content
    if isinstance(tokenizer, SentencePieceTokenizer):
        fast = from_sentencepiece(tokenizer, content)
    else:
        fast = tokenizers.Tokenizer.from_str(content.decode())
        fast.no_truncation()
        fast.no_padding()
    ids = {"bos": tokenizer.bos, "pad": tokenizer.pad, "eos": tokenizer.eos, "unk": tokenizer.unk}
    special = {name: fast.id_to_token(i) for name, i in ids.items()}
    bos, eos = special["bos"], special["eos"]
    fast.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
        single=f"{bos} $A {eos}",
        pair=f"{bos} $A {eos} {eos}:0 $B:0 {eos}:0",
        special_tokens=[(bos, ids["bos"]), (eos, ids["eos"])],
    )
    fast.save(str(folder / "tokenizer.json"))
    config: dict[str, Any] = {f"{name}_token": token for name, token in special.items()}
    config |= {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "cls_token": bos,
        "sep_token": eos,
        "model_max_length": longest,
        "model_input_names": ["input_ids", "attention_mask"],
        "padding_side": "right",
        "split_special_tokens": True,  # `</s>` within a text is text
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")


def from_sentencepiece(tokenizer: SentencePieceTokenizer, content: bytes) -> tokenizers.Tokenizer:
    """The same BPE or unigram model, without the special tokens that are put around a text.

    Where two cuts of a text are equally likely to a unigram model, SentencePiece lets the rounding of its sums choose,
    and another cut may be chosen here. BPE has no such cases.
    """
    proto = sentencepiece_model_pb2.ModelProto.FromString(content)  # type: ignore[attr-defined]
    trainer, rules, pieces = proto.trainer_spec, proto.normalizer_spec, proto.pieces
    if strange := [
        what
        for what, there in (
            (
                f"a model of type {trainer.model_type}, neither unigram nor BPE",
                trainer.model_type not in (UNIGRAM, BPE),
            ),
            ("spaces as suffixes", trainer.treat_whitespace_as_suffix),
            ("spaces that are not escaped", not rules.escape_whitespaces),
            ("pieces of a user's own, or unused", any(p.type in (OWN, UNUSED) for p in pieces)),
        )
        if there
    ]:
        raise CheckpointError(f"{tokenizer.path.name} has {' and '.join(strange)}; there is no tokenizer.json of that")
    names = [piece.piece for piece in pieces]
    unknown: list[Any] = []
    if trainer.model_type == BPE:
        fast = tokenizers.Tokenizer(
            models.BPE(
                {name: i for i, name in enumerate(names)},
                merges({piece.piece: piece.score for piece in pieces if piece.type == NORMAL}),
                unk_token=names[tokenizer.unk],
                fuse_unk=True,
                byte_fallback=trainer.byte_fallback,
            )
        )
    else:
        scores = [(piece.piece, piece.score if piece.type == NORMAL else NEVER) for piece in pieces]
        fast = tokenizers.Tokenizer(models.Unigram(scores, tokenizer.unk, trainer.byte_fallback))
        ends = "|".join(re.escape(piece.piece[1:]) for piece in pieces if piece.type != NORMAL)
        opening = Regex(f"<(?={ends})")  # of what looks like a special piece, but is text
        if trainer.byte_fallback:
            fast.pre_tokenizer = pre_tokenizers.Split(opening, "isolated")  # type: ignore[assignment]
        elif "<" not in names:
            unknown.append(normalizers.Replace(opening, UNKNOWN))
    steps: list[Any] = []
    if rules.precompiled_charsmap:
        steps.append(normalizers.Precompiled(rules.precompiled_charsmap))
    if rules.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex("^ +| +$"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if rules.add_dummy_prefix:
        steps.append(normalizers.Prepend(SPACE))
    fast.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE), *unknown])  # type: ignore[assignment]
    fast.decoder = decoders.Sequence(  # type: ignore[assignment]
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    known = [names[i] for i in range(len(names)) if pieces[i].type == CONTROL]
    added = zip(SPECIALS, (tokenizer.bos, tokenizer.pad, tokenizer.eos), strict=False)
    lacking = [name for name, i in added if i >= len(names)]
    fast.add_special_tokens([AddedToken(name, normalized=False) for name in (*known, *lacking)])
    return fast


def merges(scores: dict[str, float]) -> list[tuple[str, str]]:
    """Every pair of pieces that makes a third one, the third's score falling."""
    found = [
        (-score, i, piece[:i], piece[i:])
        for piece, score in scores.items()
        for i in range(1, len(piece))
        if piece[:i] in scores and piece[i:] in scores
    ]
    return [(left, right) for _, _, left, right in sorted(found)]


def texts(tokenizer: Tokenizer) -> list[str]:
    """What ids are compared on: fixed texts, and such as random ids make."""
    drawn = random.Random(0)
    made = [[drawn.randrange(tokenizer.vocabulary) for _ in range(drawn.randint(1, 24))] for _ in range(RANDOM)]
    return [*TEXTS, *map(tokenizer.decode, made)]


def refuse_other_ids(tokenizer: Tokenizer, texts: Sequence[str], found: Sequence[Sequence[int]], pad: int) -> None:
    """Raises CheckpointError, naming a text, if transformers' ids of the `texts` and of padding are others."""
    for text, ids, others in zip(texts, tokenizer.encode_batch(texts), found, strict=True):
        if [tokenizer.bos, *ids, tokenizer.eos] != list(others):
            raise CheckpointError(
                f"{tokenizer.path.name} has no equal tokenizer.json: {text!r:.80} has ids {ids[:20]}, there, between "
                f"bos and eos, {list(others)[1:21]}"
            )
    if pad != tokenizer.pad:
        raise CheckpointError(
            f"{tokenizer.path.name} has no equal tokenizer.json: padding is id {tokenizer.pad}, not {pad}"
        )
