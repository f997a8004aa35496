"""The modalities that probes know."""

from __future__ import annotations

from pretrain.labelled.audio import AUDIO
from pretrain.labelled.image import IMAGE
from pretrain.labelled.samples import Modality
from pretrain.labelled.text import TEXT

MODALITIES: dict[str, Modality] = {"image": IMAGE, "audio": AUDIO, "text": TEXT}
