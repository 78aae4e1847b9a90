"""linear, qkv_projection and mlp against torch's F.linear, and against the best that torch can be made to do."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import harness
from lmkernels import linear, mlp, qkv_projection
from lmkernels.testing import cases, numerics

PASSES = ("forward", "forward+backward")


def lines() -> list[harness.Line]:
    """One per layer of GPT-2 and BERT-base, dtype and pass."""
    return [
        line(case, make, dtype, direction)
        for dtype in harness.DTYPES
        for case, make in CASES.items()
        for direction in PASSES
    ]


def line(case: str, make: Callable, dtype: str, direction: str) -> harness.Line:
    backward = direction != "forward"

    def competitors():
        functions, inputs = make(harness.DTYPES[dtype])
        return {name: call(function, inputs, backward) for name, function in functions.items()}

    def wrong():
        functions, inputs = make(harness.DTYPES[dtype])
        actual, plain = (
            numerics.results(functions[name], inputs, inputs if backward else ()) for name in ("ours", "F.linear")
        )
        for name, expected in plain.items():
            error = (actual[name].double() - expected.double()).norm() / expected.double().norm()
            if not error < 8 * torch.finfo(harness.DTYPES[dtype]).eps + numerics.factor_rounding():
                return f"{name} differs from plain torch by {error:.1e}"
        return None

    rows, *widths = (int(part) for part in case.split()[-1].split("x"))
    products = [(widths[i], widths[i + 1]) for i in range(len(widths) - 1)]
    flops = sum(2 * rows * a * b for a, b in products)
    size = harness.DTYPES[dtype].itemsize
    moved = size * sum(rows * a + a * b + rows * b for a, b in products)
    return harness.Line(
        "layers",
        case,
        dtype,
        direction,
        competitors,
        wrong,
        (3 if backward else 1) * flops,
        (3 if backward else 1) * moved,
    )


def call(function: Callable, inputs: dict[str, Tensor], backward: bool) -> Callable[[], object]:
    if not backward:

        def forward():
            with torch.no_grad():
                return function(**inputs)

        return forward
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    outs = function(**leaves)
    douts = [torch.randn_like(out) for out in (outs if isinstance(outs, tuple) else (outs,))]
    return lambda: torch.autograd.grad(function(**leaves), leaves.values(), douts)


def one_dnn(x, weight, bias):
    """oneDNN where F.linear would take MKL, which does badly on some CPUs; it has no gradient of its own."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class _OneDNN(torch.autograd.Function):
    """F.linear with each of its three products by oneDNN."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return one_dnn(x, weight, bias)

    @staticmethod
    def backward(ctx, dout):
        x, weight = ctx.saved_tensors
        return one_dnn(dout, weight.t(), None), one_dnn(dout.t(), x.t(), None), dout.sum(0)


def make_linear(case: cases.LinearCase) -> Callable:
    def make(dtype):
        functions = {
            "ours": linear,
            "F.linear": lambda x, weight, bias: F.linear(x, weight, bias),
        }
        if harness.device.type == "cpu":
            functions["oneDNN"] = lambda x, weight, bias: _OneDNN.apply(x, weight, bias)
        return functions, case.make(dtype)

    return make


def make_qkv(dtype):
    def ours(x, weight, bias):
        return qkv_projection(x, weight, bias, num_heads=12)

    def plain(x, weight, bias):
        return tuple(y.contiguous() for y in F.linear(x, weight, bias).view(4, 256, 3, 12, 64).unbind(2))

    return {"ours": ours, "F.linear": plain}, cases.LinearCase("qkv", (4, 256), 768, 2304).make(dtype)


def make_mlp(dtype, rows=1024, d=768, d_ff=3072):
    def plain(x, w_in, b_in, w_out, b_out, residual):
        return residual + F.linear(F.gelu(F.linear(x, w_in, b_in), approximate="tanh"), w_out, b_out)

    first, second = (
        cases.LinearCase("", (rows,), d, d_ff).make(dtype),
        cases.LinearCase("", (rows,), d_ff, d).make(dtype),
    )
    inputs = {"x": first["x"], "w_in": first["weight"], "b_in": first["bias"]}
    inputs |= {"w_out": second["weight"], "b_out": second["bias"], "residual": first["x"].flip(0)}
    return {"ours": mlp, "F.linear": plain}, inputs


CASES = {
    **{case.name: make_linear(case) for case in cases.LINEAR_BENCHMARKS},
    "qkv_projection, heads split 1024x768x2304": make_qkv,
    "mlp with residual 1024x768x3072x768": make_mlp,
}
