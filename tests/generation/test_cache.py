"""The KV cache: growing, cropping, repeating and reordering leave the tokens of every sequence as they were."""

import pytest
import torch

from lmkernels.generation import KVCache

LAYERS, HEADS, DIM = 2, 3, 4


def filled(b: int, s: int, capacity: int = 4) -> tuple[KVCache, torch.Tensor]:
    """A cache of s tokens, and what every layer's keys hold, (b, s, h, d); the values hold their negative."""
    cache, k = KVCache(LAYERS, capacity), torch.randn(b, s, HEADS, DIM)
    append(cache, k)
    return cache, k


def append(cache: KVCache, k: torch.Tensor) -> None:
    for layer in range(LAYERS):
        cache.update(layer, k + layer, -k - layer)
    cache.advance(k.shape[1])


def assert_holds(cache: KVCache, k: torch.Tensor) -> None:
    """Also after one token more, which is written behind the others."""
    assert cache.length == cache.get_seq_length() == k.shape[1]
    new = torch.randn(k.shape[0], 1, HEADS, DIM)
    for layer in range(LAYERS):
        keys, values = cache.update(layer, new, -new)
        assert torch.equal(keys, torch.cat([k + layer, new], 1)) and torch.equal(values, -keys)
        held = cache.keys(layer)[:, :, : k.shape[1]]  # (b, h, s, d)
        assert torch.equal(held, (k + layer).transpose(1, 2))
        assert torch.equal(cache.values(layer)[:, :, : k.shape[1]], -held)


def test_reserve_keeps_the_tokens_and_makes_room_for_more():
    cache, k = filled(2, 3)
    cache.reserve(20)
    place = cache.keys(0).data_ptr()
    append(cache, k.repeat(1, 5, 1, 1))
    assert cache.keys(0).shape == (2, HEADS, 20, DIM) and cache.keys(0).data_ptr() == place
    assert_holds(cache, k.repeat(1, 6, 1, 1))


@pytest.mark.parametrize("length, left", [(2, 2), (-1, 4), (9, 5), (0, 0), (-9, 0), (5, 5)])
def test_crop_forgets_the_last_tokens(length, left):
    cache, k = filled(2, 5)
    cache.crop(length)
    assert_holds(cache, k[:, :left])


def test_repeat_lays_copies_side_by_side():
    cache, k = filled(2, 5, capacity=9)
    cache.repeat(3)
    assert cache.capacity == 9
    assert_holds(cache, k.repeat_interleave(3, 0))


@pytest.mark.parametrize("rows", [[0, 1, 2, 3], [1, 0, 3, 2], [0, 0, 0, 0], [3, 3, 1, 0], [0, 1, 3], [3], [0, 1]])
def test_reorder_moves_whole_sequences_and_drops_the_rest(rows):
    cache, k = filled(4, 5)
    cache.reorder(torch.tensor(rows))
    assert_holds(cache, k[rows])


def test_reorder_leaves_what_sequences_share():
    cache, k = filled(1, 3)
    cache.repeat(4)
    tails = torch.randn(4, 2, HEADS, DIM)
    append(cache, tails)
    rows = [2, 2, 0, 1]
    cache.reorder(torch.tensor(rows), start=3)
    assert_holds(cache, torch.cat([k.repeat(4, 1, 1, 1), tails[rows]], 1))
