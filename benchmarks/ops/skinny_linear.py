"""linear on few rows against F.linear, where the cost is to read the weight."""

from __future__ import annotations

from collections.abc import Callable
from itertools import cycle

import torch
import torch.nn.functional as F

from benchmarks import harness
from lmkernels import linear
from lmkernels.testing import cases, numerics

# Calls go through different weights, as the layers of a model do: together they are larger than any L3 cache.
RING_BYTES = 2**28


def lines() -> list[harness.Line]:
    return [
        line(case, layout, dtype)
        for case in cases.SKINNY_BENCHMARKS
        for layout in ("(n, k)", "(k, n)")
        for dtype in harness.DTYPES
    ]


def ring(copy: Callable[[], object], nbytes: int) -> list:
    return [copy() for _ in range(max(2, -(-RING_BYTES // nbytes)))]


def through(ring: list, function: Callable) -> Callable[[], object]:
    """A call of the function on the next element of the ring."""
    elements = cycle(ring)
    return lambda: function(next(elements))


def inputs(case: cases.SkinnyCase, layout: str, dtype: torch.dtype) -> tuple:
    weight = (torch.randn(case.n, case.k) * case.k**-0.5).to(dtype)
    if layout == "(k, n)":
        weight = weight.t().contiguous().t()
    return torch.randn(case.m, case.k).to(dtype), weight, torch.randn(case.n).to(dtype)


def wrong(case: cases.SkinnyCase, layout: str, dtype: torch.dtype) -> str | None:
    """By the tests' rule."""
    x, weight, bias = inputs(case, layout, dtype)
    golden = F.linear(x.double(), weight.double(), bias.double())
    plain = F.linear(x.float(), weight.float(), bias.float()).to(dtype)
    try:
        numerics.assert_as_accurate(linear(x, weight, bias), golden, plain, "out", dtype=dtype)
    except AssertionError as error:
        return str(error)
    return None


def competitors(case: cases.SkinnyCase, layout: str, dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    x, weight, bias = inputs(case, layout, dtype)
    weights = ring(weight.clone, weight.nbytes)  # clones keep the layout
    return {
        "ours": through(weights, lambda w: linear(x, w, bias)),
        "F.linear": through(weights, lambda w: F.linear(x, w, bias)),
    }


def line(case: cases.SkinnyCase, layout: str, dtype: str) -> harness.Line:
    torch_dtype = harness.DTYPES[dtype]
    return harness.Line(
        f"m{case.m}",
        f"{case.name} {layout}",
        dtype,
        "",
        competitors=lambda: competitors(case, layout, torch_dtype),
        wrong=lambda: wrong(case, layout, torch_dtype),
        flops=2 * case.m * case.n * case.k,
        bytes_read=case.n * case.k * torch_dtype.itemsize,
    )
