"""rotary against transformers' eager apply_rotary_pos_emb, written out: forward, and forward with backward."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch

from benchmarks import harness
from lmkernels import rotary
from lmkernels.ops.rotary import reference
from lmkernels.testing import cases, numerics

PASSES = ("forward", "forward+backward")


def lines() -> list[harness.Line]:
    """One per case, dtype and pass."""
    return [
        line(group, case, dtype, direction)
        for group, members in cases.ROTARY_BENCHMARKS.items()
        for dtype in harness.DTYPES
        for case in members
        for direction in (PASSES if case.s > 1 else PASSES[:1])
    ]


def eager(x, cos, sin, interleaved=False):
    """With tables (s, d) in x's dtype, which a model makes once for all layers."""
    cos, sin = cos[:, None], sin[:, None]
    if interleaved:
        turned = torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
    else:
        half = x.shape[-1] // 2
        turned = torch.cat((-x[..., half:], x[..., :half]), -1)
    return x * cos + turned * sin


def eager_tables(cos, sin, s, dtype, interleaved):
    """(s, d) from (n, d / 2)."""
    tables = (cos[:s].to(dtype), sin[:s].to(dtype))
    return [t.repeat_interleave(2, -1) if interleaved else torch.cat((t, t), -1) for t in tables]


@cache
def wrong(case: cases.RotaryCase, dtype: torch.dtype) -> str | None:
    """Why the results of this case are wrong, or None: by the tests' rule."""
    tensors, options = case.make(dtype)

    def plain(x, cos, sin, interleaved):
        return eager(x, *eager_tables(cos, sin, case.s, x.dtype, interleaved), interleaved)

    def definition(x, cos, sin, interleaved):
        return reference.forward(x, cos, sin, None, interleaved)

    try:
        numerics.assert_op_as_accurate(rotary, definition, plain, tensors, ["x"], dtype=dtype, **options)
    except AssertionError as error:
        return str(error)
    return None


def competitors(case: cases.RotaryCase, dtype: torch.dtype, direction: str) -> dict[str, Callable[[], object]]:
    tensors, options = case.make(dtype)
    tables = eager_tables(tensors["cos"], tensors["sin"], case.s, dtype, case.interleaved)
    x = tensors["x"].requires_grad_(direction != "forward")
    dout = torch.randn(x.shape).to(dtype)

    def call(function, *tables):
        if direction == "forward":
            return lambda: function(x, *tables, **options)
        return lambda: torch.autograd.grad(function(x, *tables, **options), x, dout)

    return {"ours": call(rotary, tensors["cos"], tensors["sin"]), "eager": call(eager, *tables)}


def line(group: str, case: cases.RotaryCase, dtype: str, direction: str) -> harness.Line:
    torch_dtype = harness.DTYPES[dtype]
    moved = (case.b or 1) * case.s * case.h * case.d * torch_dtype.itemsize * (1 if direction == "forward" else 2)
    return harness.Line(
        group,
        case.name,
        dtype,
        direction,
        competitors=lambda: competitors(case, torch_dtype, direction),
        wrong=lambda: wrong(case, torch_dtype),
        bytes_read=moved,
        bytes_written=moved,
    )
