"""attention against torch's scaled_dot_product_attention: forward, and forward with backward."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from benchmarks import harness
from lmkernels import attention
from lmkernels.testing import cases, numerics

PASSES = ("forward", "forward+backward")


def lines() -> list[harness.Line]:
    """One per case, dtype and pass."""
    return [
        line(group, case, dtype, direction)
        for group, members in cases.ATTENTION_BENCHMARKS.items()
        for dtype in harness.DTYPES
        for case in members
        for direction in passes(case)
    ]


def passes(case: cases.AttentionCase) -> tuple[str, ...]:
    """Nobody trains with one query."""
    return PASSES if case.s_q > 1 else PASSES[:1]


def wrong(case: cases.AttentionCase, dtype: torch.dtype) -> str | None:
    """Why the results of this case are wrong, or None: all of the first heads against float64, by the tests' rule."""
    inputs = case.make(dtype)
    actual = numerics.attention_results(attention, inputs)
    part = inputs.first_heads()
    golden, plain = numerics.golden_attention(part), numerics.plain_attention_results(part)
    for name, expected in golden.items():
        b, s_or_h, h_or_s = expected.shape[:3]
        try:
            numerics.assert_as_accurate(
                actual[name][:b, :s_or_h, :h_or_s], expected, plain[name], name, dtype=dtype, samples=part.rows
            )
        except AssertionError as error:
            return str(error)
    return None


def competitors(case: cases.AttentionCase, dtype: torch.dtype, direction: str) -> dict[str, Callable[[], object]]:
    """The calls to compare, each on tensors of its own in the layout that suits it."""
    inputs = case.make(dtype)
    backward = direction != "forward"
    own = [inputs.q, inputs.k, inputs.v, inputs.dout]  # (b, s, h, d)
    torchs = [x.transpose(1, 2).contiguous() for x in own]  # (b, h, s, d)

    def ours(q, k, v):
        return attention(q, k, v, causal=case.causal)

    def sdpa(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=case.causal, enable_gqa=case.h_kv is not None)

    def call(function, q, k, v, dout):
        leaves = [x.detach().requires_grad_(backward) for x in (q, k, v)]
        if backward:
            return lambda: torch.autograd.grad(function(*leaves), leaves, dout)
        return lambda: function(*leaves)

    return {"ours": call(ours, *own), "SDPA": call(sdpa, *torchs)}


def line(group: str, case: cases.AttentionCase, dtype: str, direction: str) -> harness.Line:
    d, d_v, torch_dtype = case.d, case.d_v or case.d, harness.DTYPES[dtype]
    pairs = case.b * case.h * case.visible_pairs()
    flops, tensors = 2 * pairs * (d + d_v), 1
    if direction != "forward":
        # again q k^T, and dout v^T, dv, dq, dk; reads and writes what the forward did, the gradients too
        flops, tensors = flops + 2 * pairs * (3 * d + 2 * d_v), 3
    queries, keys = case.b * case.h * case.s_q, case.b * (case.h_kv or case.h) * case.s_k
    return harness.Line(
        group,
        case.name,
        dtype,
        direction,
        competitors=lambda: competitors(case, torch_dtype, direction),
        wrong=lambda: wrong(case, torch_dtype),
        flops=flops,
        bytes_read=tensors * (queries + keys) * (d + d_v) * torch_dtype.itemsize,
    )
