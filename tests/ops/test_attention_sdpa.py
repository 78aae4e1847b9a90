"""scaled_dot_product_attention is torch's, and attention_weights is the map that attention uses."""

from __future__ import annotations

import inspect

import pytest
import torch
import torch.nn.functional as F

from lmkernels import attention, attention_weights, scaled_dot_product_attention
from lmkernels.testing import cases


def assert_same_as_torch(query, key, value, **options):
    """Result and gradients, in float64."""
    tensors = [x.double() for x in (query, key, value)]
    attn_mask = options.pop("attn_mask", None)
    if attn_mask is not None and attn_mask.is_floating_point():
        tensors.append(attn_mask.double())
    results = []
    for function in (scaled_dot_product_attention, F.scaled_dot_product_attention):
        leaves = [x.clone().requires_grad_() for x in tensors]
        mask = leaves[3] if len(leaves) == 4 else attn_mask
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            out = function(*leaves[:3], attn_mask=mask, **options)
        results.append([out, *torch.autograd.grad(out, leaves, torch.ones_like(out).cumsum(-2) / 10)])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


def test_the_signature_is_torchs():
    mine = inspect.signature(scaled_dot_product_attention).parameters
    assert list(mine) == ["query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa"]
    assert [p.default for p in mine.values()][3:] == [None, 0.0, False, None, False]


@pytest.mark.parametrize("lead", [(), (3,), (2, 3), (2, 2, 3)], ids=lambda lead: f"{len(lead) + 2} axes")
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(("s_q", "s_k"), [(7, 7), (5, 9), (9, 5)])
def test_it_agrees_with_torch_for_2_to_5_axes(lead, is_causal, s_q, s_k):
    """is_causal with s_q != s_k is aligned to the upper left, as torch's."""
    assert_same_as_torch(
        torch.randn(*lead, s_q, 8), torch.randn(*lead, s_k, 8), torch.randn(*lead, s_k, 4), is_causal=is_causal
    )


MASK_SHAPES = [(5, 9), (1, 9), (5, 1), (3, 5, 9), (1, 5, 9), (2, 1, 5, 9), (2, 3, 5, 9), (1, 1, 1, 9), (9,)]


@pytest.mark.parametrize("shape", MASK_SHAPES, ids=str)
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_attn_mask_broadcasts_as_in_torch_and_has_its_gradient(shape, kind):
    attn_mask = torch.randn(shape)
    if kind == "bool":
        attn_mask = attn_mask > -1
        attn_mask[..., :1] = True  # torch gives NaN where nothing is seen
    assert_same_as_torch(torch.randn(2, 3, 5, 8), torch.randn(2, 3, 9, 8), torch.randn(2, 3, 9, 8), attn_mask=attn_mask)


@pytest.mark.parametrize("mask_lead", [(2, 2, 3), (1, 2, 3), (2, 1, 3), (2, 1, 1), (1,), (3,), ()], ids=str)
def test_attn_mask_broadcasts_over_more_than_one_batch_axis(mask_lead):
    q, k, v = (torch.randn(2, 2, 3, s, 8) for s in (5, 9, 9))
    assert_same_as_torch(q, k, v, attn_mask=torch.randn(*mask_lead, 5, 9))


def test_a_three_axis_query_takes_a_mask_per_batch():
    assert_same_as_torch(
        torch.randn(3, 5, 8), torch.randn(3, 9, 8), torch.randn(3, 9, 8), attn_mask=torch.randn(3, 5, 9)
    )


def test_a_two_axis_query_takes_a_mask():
    assert_same_as_torch(torch.randn(5, 8), torch.randn(9, 8), torch.randn(9, 8), attn_mask=torch.randn(5, 9))


def test_scale_and_gqa_agree_with_torch():
    q, k, v = torch.randn(2, 6, 5, 8), torch.randn(2, 2, 9, 8), torch.randn(2, 2, 9, 8)
    assert_same_as_torch(q, k, v, scale=0.3, enable_gqa=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_other_dtypes_agree_with_torch(dtype):
    q, k, v = (torch.randn(2, 3, 20, 16).to(dtype) for _ in "qkv")
    actual = scaled_dot_product_attention(q, k, v, is_causal=True)
    assert actual.dtype == dtype
    tolerance = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(actual, F.scaled_dot_product_attention(q, k, v, is_causal=True), rtol=0, atol=tolerance)


def test_a_query_that_sees_no_key_gets_zeros():
    q = torch.randn(1, 2, 4, 8)
    mask = torch.ones(4, 4, dtype=torch.bool)
    mask[1] = False
    assert (scaled_dot_product_attention(q, q, q, attn_mask=mask)[:, :, 1] == 0).all()


def test_dropout_has_the_right_mean():
    q, k = torch.randn(4, 4, 64, 8), torch.randn(4, 4, 64, 8)
    v = torch.ones(4, 4, 64, 8)
    out = scaled_dot_product_attention(q, k, v, dropout_p=0.25)
    assert not torch.allclose(out, torch.ones_like(out)) and abs(out.mean().item() - 1) < 0.02


BAD_CALLS = {
    "attn_mask with is_causal": (
        lambda q: {"attn_mask": torch.ones(4, 4, dtype=torch.bool), "is_causal": True},
        ValueError,
        "attn_mask must be None when is_causal=True",
    ),
    "fewer heads without enable_gqa": (
        lambda q: {"key": q[:, :1], "value": q[:, :1]},
        ValueError,
        "must have query's 2 heads, got 1; enable_gqa=True allows fewer",
    ),
    "one axis": (lambda q: {"query": q[0, 0, 0]}, ValueError, r"query must be \(..., h, s, d\) with at least 2 axes"),
    "head sizes differ": (lambda q: {"key": q[..., :4]}, ValueError, "key must have query's head size 8"),
    "lengths differ": (lambda q: {"value": q[:, :, :3]}, ValueError, "value must have key's length and heads"),
    "dtypes differ": (lambda q: {"key": q.double()}, TypeError, "key must have query's dtype"),
    "mask does not broadcast": (
        lambda q: {"attn_mask": torch.zeros(3, 4)},
        ValueError,
        r"attn_mask must broadcast to \(b, h, s_q, s_k\)",
    ),
    "mask of integers": (lambda q: {"attn_mask": torch.zeros(4, 4, dtype=torch.int64)}, TypeError, "attn_mask must be"),
    "list for mask": (lambda q: {"attn_mask": [[True]]}, TypeError, "attn_mask must be"),
    "not a tensor": (lambda q: {"query": [1.0]}, TypeError, "query must be a torch.Tensor, got list"),
    "dropout above 1": (lambda q: {"dropout_p": 1.5}, ValueError, "dropout_p must be between 0 and 1, got 1.5"),
    "batches that do not broadcast": (
        lambda q: {"key": q.expand(3, 2, 4, 8).clone(), "query": q.expand(2, 2, 4, 8)},
        ValueError,
        "key",
    ),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_a_bad_call_names_the_argument(name):
    change, kind, text = BAD_CALLS[name]
    q = torch.randn(1, 2, 4, 8)
    with pytest.raises(kind, match=text):
        scaled_dot_product_attention(**{"query": q, "key": q, "value": q} | change(q))


# --- attention_weights ---

WITH_WEIGHTS = [case for case in cases.ATTENTION if case.dropout_p == 0]


@pytest.mark.parametrize("case", WITH_WEIGHTS, ids=str)
def test_weights_times_v_is_attention_and_rows_sum_to_one_or_less(case):
    inputs = case.make(torch.float64)
    weights = attention_weights(inputs.q, inputs.k, **inputs.options)  # (b, h, s_q, s_k)
    out, lse = attention(inputs.q, inputs.k, inputs.v, **inputs.options, return_lse=True)
    v = inputs.v.repeat_interleave(case.h // inputs.v.shape[2], 2)
    torch.testing.assert_close(torch.einsum("bhqk,bkhd->bqhd", weights, v), out)
    mass = torch.ones_like(lse) - (torch.exp(inputs.options["sink"][:, None] - lse) if case.sink else 0)
    torch.testing.assert_close(weights.sum(-1), torch.where(lse.isfinite(), mass, 0.0))
    assert (weights >= 0).all()


def test_weights_are_differentiable_and_in_the_dtype_of_q():
    q, k = (torch.randn(1, 5, 2, 8, dtype=torch.float64, requires_grad=True) for _ in "qk")
    assert torch.autograd.gradcheck(lambda q, k: attention_weights(q, k, causal=True), (q, k))
    assert attention_weights(q.bfloat16(), k.bfloat16()).dtype == torch.bfloat16
