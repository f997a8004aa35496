"""Speech recognition: connectionist temporal classification (Graves et al. 2006) over letters."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jiwer
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from finetune.config import Config
from finetune.task import Examples, Some, Split, Task
from finetune.transcripts import Spelling, Transcribed, open_transcribed
from models.config import RATE
from models.masks import draw_spans, row_keys
from pretrain import full
from pretrain.config import BatchPlan
from pretrain.data.audio import AudioDataset
from pretrain.data.fetch import resolve
from pretrain.data.names import digest, few
from pretrain.data.packs import PackSampler
from pretrain.data.sampler import permutation
from pretrain.data.sources import DataError, Sample
from pretrain.labelled.audio import shortest, sizes
from pretrain.labelled.samples import pad

BLANK, BETWEEN = 0, 1  # outputs: no letter; the end of a word
LABELS = ["<blank>", "|"]  # and letters


@dataclass(frozen=True)
class Spoken(Examples):
    """Targets (B, S) are letters, 0 behind the shorter ones. What the loss wants to know of their sizes stays on the
    host."""

    frames: tuple[int, ...] = ()  # (B,) that are no padding
    letters: tuple[int, ...] = ()  # (B,)
    genuine: Tensor | None = None  # (B,) bool: no other clip stands in for it
    hidden: Tensor | None = None  # (B, T) bool
    channels: Tensor | None = None  # (B, D) bool


@dataclass(frozen=True)
class References:
    """What is said in each clip of a data set: as text, and as labels if there are some for all of its letters. Labels
    are packed: no objects whose reference counts unshare a worker's memory."""

    texts: list[str]
    packed: NDArray[np.int32]
    ends: NDArray[np.int64]  # (n + 1,)
    learned: bool = False  # clips are learned from, and spans of them hidden

    @classmethod
    def of(cls, texts: list[str], labels: Sequence[str]) -> References:
        number = {label: i for i, label in enumerate(labels)}
        letters = [spelt(text, number) for text in texts]
        ends = np.cumsum([0, *map(len, letters)])
        return cls(texts, np.concatenate(letters).astype(np.int32), ends)

    def letters(self, index: int) -> NDArray[np.int64]:
        """(S,) labels of a clip; none if one is missing."""
        return self.packed[self.ends[index] : self.ends[index + 1]].astype(np.int64)


class Heard(NamedTuple):
    """In a clip: words, and the CTC loss of what is said, in nats, with the `letters` that it is a sum over."""

    text: str
    loss: float
    letters: int


class Utterances(Some):
    """Some clips, and what is said in them."""

    def __init__(self, dataset: AudioDataset, indices: NDArray[np.int64], references: References) -> None:
        super().__init__(dataset, indices)
        self.lengths = dataset.lengths[indices]
        self._texts = digest(*(references.texts[i].encode() for i in indices))

    def fingerprint(self) -> str:
        return digest(super().fingerprint().encode(), self._texts.encode())


class SpeechTask(Task):
    """Learns letters from whole clips; the best checkpoint has the lowest word error rate, greedily decoded."""

    def __init__(self, config: Config, progress: bool, labels: list[str] | None = None) -> None:
        """With the `labels` of a network that has learned, only what it is evaluated on is opened."""
        super().__init__(config, progress)
        self.progress = progress
        self.largest = config.train.micro_batch or config.model.length
        if labels is None:
            self._open_training()
        else:
            self.labels = labels
        self.evaluated, self.notes = {}, list[str]()
        for split in config.eval.splits:
            transcribed = self._open(config.speech.held_out or config.data.path, split)
            dataset, references = self._clips(transcribed)
            self.evaluated[split] = Split(dataset, references)
            silent = told_of(dataset, self._without_loss(dataset, references), "no loss for")
            self.notes += (f"{split}: {note}" for note in (*dataset.notes, *transcribed.notes, *silent))
        if labels is None:
            self.train.dataset.notes += tuple(self.notes)

    def _open_training(self) -> None:
        config = self.config
        transcribed = self._open(config.data.path, config.data.split)
        self.labels = given_labels(config.train.init_from) or collected_labels(transcribed.texts)
        dataset, references = self._clips(transcribed, config.data.audio.min_seconds)
        indices, notes = self._learnable(dataset, references)
        utterances = Utterances(dataset, indices, references)
        hours = utterances.lengths.sum() / RATE / 3600
        utterances.notes += (f"{hours:.3g} h of them", *transcribed.notes, *notes)
        self.train = Split(utterances, replace(references, texts=[], learned=True))

    def _open(self, path: str, split: str) -> Transcribed:
        if not path:
            raise DataError("data.path is not given: where do the recordings lie? (a path, or fetch:NAME)")
        speech = self.config.speech
        spell = Spelling(speech.case, speech.punctuation)
        return open_transcribed(resolve(path), split, speech.language, spell, progress=self.progress)

    def _clips(self, transcribed: Transcribed, min_seconds: float = 0.0) -> tuple[AudioDataset, References]:
        """Whole clips of any length, of one frame and `min_seconds` at least, and what is said in them."""
        source = transcribed.source
        least = max(min_seconds, shortest(self.config.model) / RATE)
        most = max(least, float(source.lengths.max() / RATE))
        dataset = AudioDataset(source, seed=self.config.train.seed, min_seconds=least, max_seconds=most, train=False)
        said = {source.name(i): text for i, text in enumerate(transcribed.texts)}
        texts = [said[dataset.name(i)] for i in range(len(dataset))]
        return dataset, References.of(texts, self.labels)

    def _learnable(self, dataset: AudioDataset, references: References) -> tuple[NDArray[np.int64], list[str]]:
        """Clips that can be learned from, `data.minutes` of them, ascending; and what is left out."""
        config = self.config
        model, minutes = config.model, config.data.minutes
        long = {f"longer than model.audio.seconds={model.audio.seconds:g}": dataset.lengths > model.length}
        reasons = long | self._without_loss(dataset, references)
        notes = told_of(dataset, reasons, "left out")
        usable = np.flatnonzero(~np.logical_or.reduce(list(reasons.values())))
        if not len(usable):
            raise DataError(f"data.path={config.data.path}: no clip can be learned from; {'; '.join(notes)}")
        if minutes is not None:
            usable = usable[permutation(len(usable), config.train.seed, 0)]
            until = np.searchsorted(dataset.lengths[usable].cumsum(), minutes * 60 * RATE, side="right")
            if until == len(usable):
                total = dataset.lengths[usable].sum() / RATE / 60
                notes.append(f"data.minutes={minutes:g} is more than there are: {total:.1f}")
            usable = np.sort(usable[: max(1, until)])
        return usable, notes

    def _without_loss(self, dataset: AudioDataset, references: References) -> dict[str, NDArray[np.bool_]]:
        """Reason -> (n,) the clips that it keeps from having a finite loss."""
        needed = np.array([frames_for(references.letters(i)) for i in range(len(dataset))])
        frames = np.array([self.config.model.audio.frames(int(n)) for n in dataset.lengths])
        return {
            "with letters that the network has no output for": np.diff(references.ends) == 0,
            "with more letters than frames to tell them in": needed > frames,
        }

    def sampler(self, plan: BatchPlan, rank: int, first_batch: int) -> PackSampler:
        seed, pool = self.config.train.seed, self.config.data.audio.pool
        return PackSampler(self.train.dataset.lengths, plan, rank, seed, first_batch, pool, padded=True)

    def sizes(self, dataset: AudioDataset) -> NDArray[np.int64]:
        return sizes(dataset)

    def arguments(self, examples: Examples) -> dict[str, Any]:
        assert isinstance(examples, Spoken)
        return {"hidden": examples.hidden, "channels": examples.channels}

    def collate(self, references: References, samples: Sequence[Sample]) -> Spoken:
        """-> (B, samples) float32, silence behind the shorter clips, and (B, S) letters; in training spans that are
        functions of (seed, epoch, clip)."""
        model, speech = self.config.model, self.config.speech
        genuine = [not sample.failures for sample in samples]
        sizes = [len(sample.inputs) for sample in samples]
        longest = max((n for n, own in zip(sizes, genuine, strict=True) if own), default=min(sizes))
        cut = [replace(sample, inputs=sample.inputs[:longest]) for sample in samples]  # what stands in for others
        inputs, lengths, _ = pad(cut, model)
        frames = tuple(model.audio.frames(len(sample.inputs)) for sample in cut)
        none = torch.zeros(0, dtype=torch.int64)
        letters = [none if s.failures else torch.from_numpy(references.letters(s.index)) for s in samples]
        hidden = channels = None
        if references.learned:
            ids = np.array([[sample.epoch, sample.index] for sample in samples])
            keys = row_keys(self.config.train.seed, ids[:, 0], ids[:, 1], 2).reshape(-1, 2)
            t, d = max(frames), np.full(len(cut), model.width)
            in_time = draw_spans(keys[:, 0], np.array(frames), t, speech.frame_prob, speech.frame_length, least=2)
            hidden = torch.from_numpy(in_time) if speech.frame_prob else None
            of_width = draw_spans(keys[:, 1], d, model.width, speech.channel_prob, speech.channel_length)
            channels = torch.from_numpy(of_width) if speech.channel_prob else None
        return Spoken(
            inputs,
            torch.nn.utils.rnn.pad_sequence(letters, batch_first=True),
            sum(map(len, letters)),
            lengths,
            tuple(failure for sample in samples for failure in sample.failures),
            frames=frames,
            letters=tuple(map(len, letters)),
            genuine=torch.tensor(genuine),
            hidden=hidden,
            channels=channels,
        )

    def loss(self, outputs: Tensor, examples: Examples) -> Tensor:
        """Infinite, if a clip had fewer frames than its letters need; none has."""
        assert isinstance(examples, Spoken) and examples.genuine is not None
        return torch.where(examples.genuine, ctc_losses(outputs.float().log_softmax(-1), examples), 0).sum()

    def hear(self, log_probs: Tensor, frames: Sequence[int]) -> list[str]:
        """(B, T, C), of which `frames` of each clip are looked at -> words."""
        rows = zip(log_probs.argmax(dim=-1).cpu().numpy(), frames, strict=True)
        return [greedy(row[:count], self.labels) for row, count in rows]

    def predict(self, outputs: Tensor, examples: Examples) -> list[Heard | None]:
        assert isinstance(examples, Spoken) and examples.genuine is not None
        log_probs = outputs.float().log_softmax(-1)
        genuine = examples.genuine.tolist()
        texts = self.hear(log_probs, [frames * own for frames, own in zip(examples.frames, genuine, strict=True)])
        losses = ctc_losses(log_probs, examples).tolist()
        rows = zip(map(Heard, texts, losses, examples.letters), genuine, strict=True)
        return [heard if own else None for heard, own in rows]

    def judge(self, split: str, indices: list[int], predictions: list[Heard]) -> dict[str, float]:
        """Error rates, and the loss per letter, ends of words included, over the clips that have one."""
        texts = self.evaluated[split].references.texts
        rates = error_rates([texts[i] for i in indices], [heard.text for heard in predictions])
        judged = [heard for heard in predictions if heard.letters and heard.loss != math.inf]
        letters = sum(heard.letters for heard in judged)
        return rates | ({"loss": sum(heard.loss for heard in judged) / letters} if judged else {})

    def best(self, figures: dict[str, float]) -> float:
        return -figures["wer"]


def told_of(dataset: AudioDataset, reasons: dict[str, NDArray[np.bool_]], what: str) -> list[str]:
    """Notes for the user, one for each reason that some clips (n,) have."""
    found = {reason: np.flatnonzero(some) for reason, some in reasons.items() if some.any()}
    return [
        f"{what} {len(some):,} clips {reason}: {few(some, told=lambda i: dataset.name(int(i)))}"
        for reason, some in found.items()
    ]


def ctc_losses(log_probs: Tensor, examples: Spoken) -> Tensor:
    """(B, T, C) -> (B,) in nats, of all letters of a clip."""
    frames: Any = examples.frames  # of tensors the values would be fetched from the device
    letters: Any = examples.letters
    return F.ctc_loss(log_probs.transpose(0, 1), examples.targets, frames, letters, BLANK, "none")


def given_labels(start: str) -> list[str] | None:
    """The outputs of a fine-tuned network to start from."""
    if not start or full.head_of(full.settings(start)) is None:
        return None
    content = full.assets(start).get(full.LABELS)
    found = json.loads(content) if content else None
    if found is None or found[:2] != LABELS:
        raise DataError(f"train.init_from={start} is fine-tuned for something else: its outputs are no letters")
    return found


def collected_labels(texts: Sequence[str]) -> list[str]:
    return [*LABELS, *sorted(set().union(*texts) - {" "})]


def spelt(text: str, number: dict[str, int]) -> NDArray[np.int64]:
    """(S,) labels, each word with its end; none if one is missing."""
    letters = [number.get(letter) for letter in f"{text} ".replace(" ", LABELS[BETWEEN])]
    return np.array([] if None in letters else letters, np.int64)


def frames_for(letters: NDArray[np.int64]) -> int:
    """The least number of frames that can tell them: between two that are the same there has to be a blank."""
    return len(letters) + int((letters[1:] == letters[:-1]).sum())


def greedy(best: NDArray[np.int64], labels: Sequence[str]) -> str:
    """What the likeliest label of each frame (T,) spells: those in a row are one, blanks are none."""
    changes = best[np.flatnonzero(np.diff(best, prepend=-1))]
    return " ".join("".join(labels[i] for i in changes[changes != BLANK]).replace(LABELS[BETWEEN], " ").split())


def error_rates(said: list[str], heard: list[str]) -> dict[str, float]:
    """Insertions, deletions and substitutions over all clips, by word and by letter of what is said."""
    return {"wer": jiwer.wer(said, heard), "cer": jiwer.cer(said, heard)}
