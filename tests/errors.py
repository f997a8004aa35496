"""What every refusal of data has in common."""

import pytest

from pretrain.data.sources import DataError


def failure(call, *words):
    """The DataError of `call()`: one line that has all of `words` in it."""
    with pytest.raises(DataError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert str(word) in message
    return message
