"""Philox-4x32-10 gives the published words, and dropout reads them as documented."""

from __future__ import annotations

import pytest
import torch

from lmkernels.ops.philox import attention_keep, dropout_threshold, philox

# The known answers of Random123, https://github.com/DEShawResearch/random123, file tests/kat_vectors.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def _words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


def _seed(key: list[int]) -> torch.Tensor:
    unsigned = key[0] | key[1] << 32
    return torch.tensor(unsigned - (1 << 64) if unsigned >= 1 << 63 else unsigned)


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_the_published_words_come_out(counter, key, expected):
    words = philox(tuple(torch.tensor(word) for word in _words(counter)), _seed(_words(key)))
    assert [word.item() for word in words] == _words(expected)


def test_a_weight_reads_word_j_mod_4_of_the_counter_j_div_4_i_h_b():
    seed = torch.tensor(0x0123_4567_89AB_CDEF)
    keep = attention_keep(seed, 2, 3, 4, 9, 0.5)
    for b, h, i, j in [(0, 0, 0, 0), (1, 2, 3, 8), (1, 0, 2, 5), (0, 2, 1, 7)]:
        words = philox(tuple(torch.tensor(n) for n in (j // 4, i, h, b)), seed)
        assert keep[b, h, i, j].item() == (words[j % 4].item() >= 1 << 31)


@pytest.mark.parametrize("dropout_p", [0.1, 0.5, 0.9])
def test_the_share_of_dropped_weights_is_dropout_p(dropout_p):
    keep = attention_keep(torch.tensor(7), 2, 4, 64, 256, dropout_p)
    deviation = (dropout_p * (1 - dropout_p) / keep.numel()) ** 0.5
    assert abs((~keep).double().mean().item() - dropout_p) < 4 * deviation


def test_nothing_is_dropped_at_0_and_every_word_but_the_last_at_1():
    assert dropout_threshold(0.0) == 0
    assert dropout_threshold(1.0) == 2**32 - 1
    assert dropout_threshold(0.25) == 2**30


def test_neighbouring_seeds_share_no_mask():
    first, second = (attention_keep(torch.tensor(seed), 1, 2, 32, 32, 0.5) for seed in (1, 2))
    assert 0.4 < (first == second).double().mean().item() < 0.6
