"""The reference, which every backend is measured against, is itself what the documentation says."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from lmkernels import attention
from lmkernels.testing import cases


def tiny(case: cases.AttentionCase) -> cases.AttentionCase:
    """The case with every feature, in a size that a Python loop can do."""
    return replace(
        case,
        s_q=min(case.s_q, 6),
        s_k=min(case.s_k, 7),
        d=min(case.d, 4),
        d_v=case.d_v and min(case.d_v, 3),
        window=tuple(min(size, 2) for size in case.window),
        kv_lengths=tuple(min(n, 7) for n in case.kv_lengths),
    )


def philox_words(counter: list[int], key: list[int]) -> list[int]:
    """Philox-4x32-10 on Python integers."""
    for _ in range(10):
        first, second = counter[0] * 0xD2511F53, counter[2] * 0xCD9E8D57
        counter = [
            second >> 32 ^ counter[1] ^ key[0],
            second & 0xFFFFFFFF,
            first >> 32 ^ counter[3] ^ key[1],
            first & 0xFFFFFFFF,
        ]
        key = [key[0] + 0x9E3779B9 & 0xFFFFFFFF, key[1] + 0xBB67AE85 & 0xFFFFFFFF]
    return counter


def attention_by_loops(
    q,
    k,
    v,
    *,
    causal,
    window,
    scale,
    softcap,
    mask=None,
    bias=None,
    alibi_slopes=None,
    sink=None,
    kv_lengths=None,
    dropout_p=0.0,
    seed=0,
):
    """One weight at a time, in Python floats, as the documentation of `attention` words it."""
    (b, s_q, h, d), (_, s_k, h_kv, d_v) = q.shape, v.shape
    scale = 1 / math.sqrt(d) if scale is None else scale
    mask = None if mask is None else mask.broadcast_to(b, h, s_q, s_k).tolist()
    bias = None if bias is None else bias.broadcast_to(b, h, s_q, s_k).tolist()
    slopes = None if alibi_slopes is None else alibi_slopes.broadcast_to(b, h).tolist()
    q, k, v = q.tolist(), k.tolist(), v.tolist()
    out, lse = torch.zeros(b, s_q, h, d_v, dtype=torch.float64), torch.zeros(b, h, s_q, dtype=torch.float64)
    for bi in range(b):
        for hi in range(h):
            kv_head = hi // (h // h_kv)
            for i in range(s_q):
                diagonal = i + s_k - s_q
                scores = {}
                for j in range(s_k):
                    x = scale * sum(q[bi][i][hi][c] * k[bi][j][kv_head][c] for c in range(d))
                    if softcap > 0:
                        x = softcap * math.tanh(x / softcap)
                    if slopes is not None:
                        x -= slopes[bi][hi] * abs(diagonal - j)
                    if bias is not None:
                        x += bias[bi][hi][i][j]
                    hidden = (
                        (mask is not None and not mask[bi][hi][i][j])
                        or (causal and j > diagonal)
                        or (window[0] >= 0 and j < diagonal - window[0])
                        or (window[1] >= 0 and j > diagonal + window[1])
                        or (kv_lengths is not None and j >= kv_lengths[bi])
                        or x == -math.inf
                    )
                    if not hidden:
                        scores[j] = x
                if not scores:
                    lse[bi, hi, i] = -math.inf
                    continue
                logits = list(scores.values()) + ([] if sink is None else [sink[hi].item()])
                lse[bi, hi, i] = max(logits) + math.log(sum(math.exp(x - max(logits)) for x in logits))
                for j, x in scores.items():
                    if dropout_p > 0:
                        word = philox_words([j // 4, i, hi, bi], [seed & 0xFFFFFFFF, seed >> 32])[j % 4]
                        if word < dropout_p * 2**32:
                            continue
                    weight = math.exp(x - lse[bi, hi, i].item()) / (1 - dropout_p)
                    for c in range(d_v):
                        out[bi, i, hi, c] += weight * v[bi][j][kv_head][c]
    return out, lse


@pytest.mark.parametrize("case", cases.ATTENTION, ids=str)
def test_the_reference_is_what_a_loop_over_the_documentation_gives(case):
    inputs = tiny(case).make(torch.float64)
    out, lse = attention(inputs.q, inputs.k, inputs.v, **inputs.options, return_lse=True, backend="reference")
    expected_out, expected_lse = attention_by_loops(inputs.q, inputs.k, inputs.v, **inputs.options)
    torch.testing.assert_close(out, expected_out, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-12, atol=1e-12)


def _sdpa(q, k, v, **options):
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), **options).transpose(1, 2)


TORCH_HAS = [
    cases.AttentionCase("plain", 2, 3, 20, 30, 16),
    cases.AttentionCase("causal", 2, 3, 30, 30, 16, causal=True),
    cases.AttentionCase("scale", 2, 3, 20, 30, 16, scale=0.7),
    cases.AttentionCase("grouped", 2, 6, 20, 30, 16, h_kv=2, d_v=8),
    cases.AttentionCase("mask", 2, 3, 20, 30, 16, mask="bk"),
    cases.AttentionCase("bias", 2, 3, 20, 30, 16, bias="hqk"),
]


@pytest.mark.parametrize("case", TORCH_HAS, ids=str)
def test_the_reference_agrees_with_torch_where_torch_has_the_feature(case):
    inputs = case.make(torch.float64)
    leaves = [x.requires_grad_() for x in inputs.differentiable().values()]
    out = attention(inputs.q, inputs.k, inputs.v, **inputs.options, backend="reference")
    attn_mask = inputs.options.get("mask", inputs.options.get("bias"))
    expected = _sdpa(
        inputs.q,
        inputs.k,
        inputs.v,
        attn_mask=attn_mask,
        is_causal=case.causal,
        scale=case.scale,
        enable_gqa=case.h_kv is not None,
    )
    torch.testing.assert_close(out, expected, rtol=1e-11, atol=1e-11)
    for actual, wanted in zip(*(torch.autograd.grad(x, leaves, inputs.dout) for x in (out, expected)), strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-11, atol=1e-11)


def _function_of_leaves(case: cases.AttentionCase, **options):
    """attention as a function of its differentiable inputs alone, and those; lse is 0 where it is -inf."""
    inputs = tiny(case).make(torch.float64)
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.differentiable().items()}

    def function(*tensors):
        arguments = inputs.options | dict(zip(leaves, tensors, strict=True))
        out, lse = attention(**arguments, return_lse=True, **options)
        return out, torch.where(lse.isfinite(), lse, 0.0)

    return function, tuple(leaves.values())


@pytest.mark.parametrize("case", cases.ATTENTION, ids=str)
def test_gradients_agree_with_finite_differences(case, backend):
    function, leaves = _function_of_leaves(case, backend=backend)
    assert torch.autograd.gradcheck(function, leaves, fast_mode=True, nondet_tol=1e-12)


@pytest.mark.parametrize("case", cases.ATTENTION, ids=str)
def test_second_gradients_agree_with_finite_differences(case, backend):
    function, leaves = _function_of_leaves(case, backend=backend)
    assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True, nondet_tol=1e-12)


@pytest.mark.parametrize("name", ["everything at once", "sink, causal, rows that see no key"])
def test_every_entry_of_the_jacobian_agrees_with_finite_differences(name, backend):
    case = next(case for case in cases.ATTENTION if case.name == name)
    function, leaves = _function_of_leaves(replace(case, b=2, s_q=4, s_k=4, d=2, d_v=2, kv_lengths=()), backend=backend)
    assert torch.autograd.gradcheck(function, leaves, nondet_tol=1e-12)


def test_second_gradients_are_right_where_arguments_depend_on_each_other(backend):
    """The same tensor as query and key, and values computed from it."""
    x = torch.randn(1, 3, 2, 4, dtype=torch.float64, requires_grad=True)
    function = lambda x: attention(x, x, x.square(), backend=backend)  # noqa: E731
    assert torch.autograd.gradgradcheck(function, (x,), nondet_tol=1e-12)
