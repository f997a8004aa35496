"""The same global batch trains the same model, however ranks, micro-batches and ZeRO share it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.launch import TINY, assert_close, pretrain, weights

LAYOUTS = [
    # (ranks, micro-batch, ZeRO stage)
    (1, 4, 0),
    (2, 4, 0),
    (1, 8, 1),
    (2, 4, 1),
    (1, 4, 2),
    (2, 2, 2),
]
REFERENCE = (1, 8, 0)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, int, int], Path]:
    """The folders of all layouts' runs."""
    folder = tmp_path_factory.mktemp("layouts")
    folders = {layout: folder / "-".join(map(str, layout)) for layout in (REFERENCE, *LAYOUTS)}
    for ranks in (1, 2):
        mechanics = {
            layout: [f"train.micro_batch={layout[1]}", f"train.deepspeed=ds_configs/zero{layout[2]}.json"]
            for layout in folders
            if layout[0] == ranks
        }
        pretrain(*([TINY, f"run.dir={folders[layout]}", *given] for layout, given in mechanics.items()), ranks=ranks)
    return folders


@pytest.mark.parametrize("layout", LAYOUTS)
def test_same_weights(trained: dict[tuple[int, int, int], Path], layout: tuple[int, int, int]) -> None:
    assert_close(weights(trained[layout]), weights(trained[REFERENCE]))
