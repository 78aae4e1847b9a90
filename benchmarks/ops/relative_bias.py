"""attention with a RelativeBias against SDPA with the expanded bias of transformers' T5: forward, and with backward."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import harness
from lmkernels import RelativeBias, attention, relative_bias
from lmkernels.ops.relative_bias.api import relative_buckets
from lmkernels.testing import cases, numerics

PASSES = ("forward", "forward+backward")
CASES = [cases.AttentionCase(f"s{s}-h12-d64", 1, 12, s, s, 64, scale=1.0) for s in (512, 1024)]
BIAS = {"bidirectional": True, "max_distance": 128}


def lines() -> list[harness.Line]:
    """One per case, dtype and pass."""
    return [line(case, dtype, direction) for dtype in harness.DTYPES for case in CASES for direction in PASSES]


def tensors(case: cases.AttentionCase, dtype: torch.dtype) -> dict[str, Tensor]:
    """q, k and v, scores of unit variance as T5 has them, and a table of 32 buckets."""
    inputs = case.make(dtype)
    table = torch.randn(32, case.h, generator=torch.Generator().manual_seed(1), device="cpu").to(inputs.q.device, dtype)
    return {"q": inputs.q * case.d**-0.5, "k": inputs.k, "v": inputs.v, "table": table}


def ours(q, k, v, table):
    return attention(q, k, v, scale=1.0, bias=RelativeBias(table, **BIAS))


def sdpa(q, k, v, table):
    """On (b, h, s, d), with T5's compute_bias."""
    s = q.shape[2]
    i = torch.arange(s, device=q.device)
    buckets = relative_buckets(i - i[:, None], True, table.shape[0], 128)
    bias = F.embedding(buckets, table).permute(2, 0, 1)[None]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0)


@cache
def wrong(case: cases.AttentionCase, dtype: torch.dtype) -> str | None:
    """Why the results of this case are wrong, or None: by the tests' rule."""

    def definition(q, k, v, table):
        expanded = relative_bias(table, case.s_q, case.s_k, **BIAS)
        return attention(q, k, v, scale=1.0, bias=expanded, backend="reference")

    def plain(q, k, v, table):
        expanded = relative_bias(table.float(), case.s_q, case.s_k, **BIAS)
        options = {"causal": False, "window": (-1, -1), "scale": 1.0, "softcap": 0.0}
        return numerics.plain_attention(q, k, v, bias=expanded, **options)[0]

    names = ["q", "k", "v", "table"]
    try:
        numerics.assert_op_as_accurate(ours, definition, plain, tensors(case, dtype), names, dtype=dtype, samples=32)
    except AssertionError as error:
        return str(error)
    return None


def competitors(case: cases.AttentionCase, dtype: torch.dtype, direction: str) -> dict[str, Callable[[], object]]:
    """Each on tensors of its own in the layout that suits it."""
    q, k, v, table = tensors(case, dtype).values()
    dout = case.make(dtype).dout

    def call(function, q, k, v, dout):
        leaves = [x.detach().requires_grad_(direction != "forward") for x in (q, k, v, table)]
        if direction == "forward":
            return lambda: function(*leaves)
        return lambda: torch.autograd.grad(function(*leaves), leaves, dout)

    turned = [x.transpose(1, 2).contiguous() for x in (q, k, v, dout)]
    return {"ours": call(ours, q, k, v, dout), "SDPA": call(sdpa, *turned)}


def line(case: cases.AttentionCase, dtype: str, direction: str) -> harness.Line:
    torch_dtype = harness.DTYPES[dtype]
    products = 2 if direction == "forward" else 7
    return harness.Line(
        "T5",
        case.name,
        dtype,
        direction,
        competitors=lambda: competitors(case, torch_dtype, direction),
        wrong=lambda: wrong(case, torch_dtype),
        flops=products * 2 * case.b * case.h * case.s_q * case.s_k * case.d,
    )
