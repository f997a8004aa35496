"""The modalities that probes know."""

from __future__ import annotations

from finetune.audio import AUDIO
from finetune.image import IMAGE
from finetune.samples import Modality
from finetune.text import TEXT

MODALITIES: dict[str, Modality] = {"image": IMAGE, "audio": AUDIO, "text": TEXT}
