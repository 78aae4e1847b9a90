"""linear on weights of 8 and 4 bits against F.linear in bfloat16, and against torch's own products of such weights."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from benchmarks import harness
from benchmarks.ops.skinny_linear import ring, through
from lmkernels import linear, quantize_weight
from lmkernels.ops.quantize_weight.reference import rounded
from lmkernels.testing import cases

KINDS = ("int8", "int4")


def lines() -> list[harness.Line]:
    return [
        line(case, kind, dtype)
        for case in [*cases.SKINNY_BENCHMARKS, *cases.PREFILL_BENCHMARKS]
        for kind in KINDS
        for dtype in ("float32", "bfloat16")
    ]


def inputs(case: cases.SkinnyCase, dtype: torch.dtype) -> tuple:
    return torch.randn(case.m, case.k).to(dtype), torch.randn(case.n, case.k) * case.k**-0.5


def wrong(case: cases.SkinnyCase, kind: str, dtype: torch.dtype) -> str | None:
    """Against x in 8 bits times the dequantised weight in float64: the rounding of the result."""
    x, weight = inputs(case, dtype)
    weight = quantize_weight(weight, kind)
    golden = rounded(x.float()).double() @ weight.dequantize(torch.float64).t()
    error = ((linear(x, weight).double() - golden).norm() / golden.norm()).item()
    limit = 1e-4 + torch.finfo(dtype).eps / 2
    return None if error < limit else f"relative error {error:.2e}, allowed {limit:.2e}"


def competitors(case: cases.SkinnyCase, kind: str, dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    x, weight = inputs(case, dtype)
    ours = quantize_weight(weight, kind)

    def copy():
        return type(ours)(ours.data.clone(), ours.scales.clone(), ours.shape, kind)

    half, half_x = weight.bfloat16(), x.bfloat16()
    calls = {
        "ours": through(ring(copy, ours.nbytes), lambda w: linear(x, w)),
        "F.linear bfloat16": through(ring(half.clone, half.nbytes), lambda w: F.linear(half_x, w)),
    }
    if kind == "int8" or case.n % 16 == 0:  # all that torch's int4 takes
        calls["torch"] = torchs(case, kind, x, weight)
    return calls


def torchs(case: cases.SkinnyCase, kind: str, x: torch.Tensor, weight: torch.Tensor) -> Callable[[], object]:
    """_weight_int8pack_mm, and _weight_int4pack_mm_for_cpu with groups of 32, on random integers."""
    if kind == "int8":
        integers = torch.randint(-127, 128, weight.shape, dtype=torch.int8)
        scales = torch.rand(case.n).to(x.dtype)
        weights = ring(integers.clone, integers.nbytes)
        return through(weights, lambda w: torch.ops.aten._weight_int8pack_mm(x, w, scales))
    integers = torch.randint(0, 16, weight.shape, dtype=torch.int32)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(integers, 1)
    scales = torch.rand(case.k // 32, case.n, 2).to(x.dtype)
    weights = ring(packed.clone, packed.nbytes + scales.nbytes)
    return through(weights, lambda w: torch.ops.aten._weight_int4pack_mm_for_cpu(x, w, 32, scales))


def line(case: cases.SkinnyCase, kind: str, dtype: str) -> harness.Line:
    torch_dtype = harness.DTYPES[dtype]
    bits = 8 if kind == "int8" else 4.5  # with the scales of int4
    return harness.Line(
        f"m{case.m} {kind}",
        f"{case.name} {kind}",
        dtype,
        "",
        competitors=lambda: competitors(case, kind, torch_dtype),
        wrong=lambda: wrong(case, kind, torch_dtype),
        flops=2 * case.m * case.n * case.k,
        bytes_read=case.n * case.k * bits / 8,
    )
