"""Philox-4x32-10 of the kernels gives the published words in every lane."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lmkernels.ops.philox import philox

# The known answers of Random123, https://github.com/DEShawResearch/random123, file tests/kat_vectors.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_the_published_words_come_out(isa, counter, key, expected):
    (low, high), (first, *rest) = words(key), words(counter)
    for lane in range(isa.float_lanes):
        run = isa.philox(low | high << 32, (first - lane) % 2**32, *rest)
        assert run[lane].tolist() == words(expected)


@pytest.mark.parametrize("first", [0, 12345, 2**32 - 3])
def test_neighbouring_counters_give_what_the_reference_gives(isa, first):
    """The first word of the counter runs on, and wraps."""
    seed, rest = 0x0123_4567_89AB_CDEF, (7, 2**31, 2**32 - 1)
    running = (torch.arange(isa.float_lanes) + first) % 2**32
    expected = torch.stack(philox((running, *map(torch.tensor, rest)), torch.tensor(seed)), -1)
    np.testing.assert_array_equal(isa.philox(seed, first, *rest), expected.numpy())
