"""Data of the modalities that this repository has no excerpt of."""

from __future__ import annotations

import numpy as np
import pytest
import soundfile

from tests.launch import run

SENTENCE = "the state of the union is strong and the people of these united states are free and will stay so"
WORDS = SENTENCE.split()


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """modality -> data.path: noise of 0.2 to 0.9 s at two rates, and a tokenised corpus."""
    folder, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    (folder / "clips").mkdir()
    for i in range(60):
        rate = (16_000, 22_050)[i % 2]
        noise = rng.normal(0, 0.1, int(rng.uniform(0.2, 0.9) * rate))
        soundfile.write(folder / "clips" / f"{i:02d}.wav", noise, rate)
    lines = [" ".join(rng.choice(WORDS, rng.integers(5, 30))) for _ in range(400)]
    (folder / "text.txt").write_text("\n".join(lines))
    tokenizer = folder / "spm.model"
    run("pretrain.data.tokenizer", "train", str(folder / "text.txt"), "--vocabulary", "300", "--out", str(tokenizer))
    run("pretrain.data.corpus", str(folder / "text.txt"), "--tokenizer", str(tokenizer), "--out", str(folder / "text"))
    return {"audio": str(folder / "clips"), "text": str(folder / "text")}
