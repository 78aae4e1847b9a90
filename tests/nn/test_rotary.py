"""RotaryEmbedding: `rotary` with tables that fit the call."""

from __future__ import annotations

import copy

import pytest
import torch

from lmkernels import nn, rotary, rotary_tables


def heads(s, d=8, dtype=torch.float32):
    return torch.randn(2, s, 4, d).to(dtype), torch.randn(2, s, 2, d).to(dtype)


def expected(x, rows, dim=8, interleaved=False, positions=None, **options):
    cos, sin = rotary_tables(rows, dim, **options)
    return rotary(x, cos, sin, interleaved=interleaved, positions=positions)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dim", [4, 8])
def test_rotates_queries_and_keys(dim, interleaved, dtype):
    module = nn.RotaryEmbedding(dim, max_positions=10, base=500.0, interleaved=interleaved).to(dtype)
    for x, y in zip(qk := heads(6, dtype=dtype), module(*qk), strict=True):
        assert torch.equal(y, expected(x, 10, dim, interleaved, base=500.0)) and not torch.equal(x, y)


def test_positions():
    module = nn.RotaryEmbedding(8, max_positions=10)
    positions = torch.tensor([[9, 8, 0], [1, 1, 1]])
    for x, y in zip(qk := heads(3), module(*qk, positions), strict=True):
        assert torch.equal(y, expected(x, 10, positions=positions))


def test_tables_grow_with_the_sequence_and_with_positions():
    module = nn.RotaryEmbedding(8, max_positions=4)
    for s, positions in ((7, None), (2, torch.tensor([30, 100])), (9, None), (0, torch.zeros(0, dtype=torch.int64))):
        for x, y in zip(qk := heads(s), module(*qk, positions), strict=True):
            assert torch.equal(y, expected(x, 101, positions=positions))
    assert module.cos.shape[0] == 101


@pytest.mark.parametrize("rope_type", ["dynamic", "longrope"])
def test_frequencies_that_depend_on_the_length_follow_it_both_ways(rope_type):
    scaling = {"rope_type": rope_type, "factor": 2.0, "original_max_position_embeddings": 4}
    if rope_type == "longrope":
        scaling |= {"long_factor": [3.0] * 4, "short_factor": [1.0] * 4}
    module = nn.RotaryEmbedding(8, max_positions=4, scaling=scaling)
    for s in (3, 9, 6, 4, 12):
        for x, y in zip(qk := heads(s), module(*qk), strict=True):
            assert torch.equal(y, expected(x, max(s, 4), scaling=scaling))


def test_tables_stay_float32_and_are_not_saved():
    module = nn.RotaryEmbedding(8, max_positions=300)
    before = module.cos.clone()
    for moved in (module.bfloat16(), module.double(), copy.deepcopy(module)):
        assert torch.equal(moved.cos, before) and moved.sin.dtype == torch.float32
    assert not module.state_dict()
    with torch.device("meta"):
        meta = nn.RotaryEmbedding(8, max_positions=300)
    assert meta.cos.is_meta and torch.equal(meta.to_empty(device=torch.get_default_device()).cos, before)


def test_compiles_whole_and_refuses_what_the_tables_lack():
    module = nn.RotaryEmbedding(8, max_positions=10)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for x, y in zip(qk := heads(6), compiled(*qk), strict=True):
        assert torch.equal(y, expected(x, 10))
    with pytest.raises(Exception, match="must have a row for each of the 11 positions"):
        compiled(*heads(11))


def test_gradients():
    module = nn.RotaryEmbedding(8, max_positions=10)
    q, k = (x.double().requires_grad_() for x in heads(5))
    torch.autograd.gradcheck(module, (q, k))
