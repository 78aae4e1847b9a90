"""The projection to queries, keys and values: the public function and its gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _dispatch
from .._autograd import needs_gradient, reference_gradients
from .._checks import autocast, check_device, check_floating
from ..linear.api import linear
from ..linear.checks import check_bias, check_weight, check_x
from ..quantize_weight.api import QuantizedWeight
from ..rotary.api import rotary
from . import native, reference, triton

BACKENDS = {"native": native, "triton": triton, "reference": reference}


def qkv_projection(
    x: Tensor,
    weight: Tensor | QuantizedWeight,
    bias: Tensor | None = None,
    *,
    num_heads: int,
    num_kv_heads: int | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    interleaved: bool = False,
    positions: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values from one projection, split into heads and rotated in the same pass.

    x: (b, s, d_model)                         float32, bfloat16, float16 or (on the CPU) float64
    weight: ((h + 2 h_kv) d, d_model)          rows of all queries, then keys, then values; either axis contiguous;
                                               or a weight from `quantize_weight`, for inference
    bias: ((h + 2 h_kv) d,)
    num_heads, num_kv_heads: h and h_kv; h_kv is h when None
    cos, sin: (positions, rotated / 2)         tables for queries and keys, without a gradient. They may have fewer
                                               columns than d / 2: the rest of a head is passed through
    interleaved: the pairs that are rotated are (2 i, 2 i + 1), else (i, i + rotated / 2)
    positions: (s,) or (b, s) int32 or int64   rows of the tables, default 0 .. s - 1
    backend: "native", "triton" or "reference"; None takes the first that can run this.

    weight and bias have x's dtype; where that has 16 bits they may be float32, as in `linear`.
    Returns q (b, s, h, d), k and v (b, s, h_kv, d), in x's dtype. Differentiable in x, weight and bias; twice by
    recomputation through the reference.

    Raises ValueError or TypeError for bad arguments, NotImplementedError when `backend` cannot run them.

    Su et al. 2021, arXiv:2104.09864.
    """
    (x,) = autocast(x)
    check_x(x)
    if x.dim() != 3:
        raise ValueError(f"x must be (b, s, d_model) with 3 axes, got {tuple(x.shape)}")
    b, s, d_model = x.shape
    h, h_kv = _check_heads(num_heads, num_kv_heads)
    quantized = isinstance(weight, QuantizedWeight)
    if not quantized:
        check_weight("weight", weight, x, d_model)
    if weight.shape[0] == 0 or weight.shape[0] % (h + 2 * h_kv):
        raise ValueError(
            f"weight must have (h + 2 h_kv) d rows, a multiple of {h + 2 * h_kv} for {h} and {h_kv} heads, "
            f"got {tuple(weight.shape)}"
        )
    d = weight.shape[0] // (h + 2 * h_kv)
    bias = check_bias("bias", bias, x, weight.shape[0])
    cos, sin, positions = _check_tables(cos, sin, positions, x, d)
    if quantized:
        heads = linear(x, weight, bias, backend=backend).view(b, s, h + 2 * h_kv, d)
        q, k, v = heads.split((h, h_kv, h_kv), 2)
        if cos is not None:
            options = {"interleaved": bool(interleaved), "positions": positions, "backend": backend}
            q, k = rotary(q, cos, sin, **options), rotary(k, cos, sin, **options)
        return q, k, v
    module = _dispatch.choose("qkv_projection", BACKENDS, backend, x, weight)
    if module is reference:
        return reference.forward(x, weight, bias, cos, sin, positions, h, h_kv, bool(interleaved))
    if positions is not None:
        positions = positions.expand(b, s).reshape(b * s)
    features = (cos, sin, positions, s, h, h_kv, bool(interleaved))
    if needs_gradient(x, weight, bias):
        q, k, v = _QKVProjection.apply(
            module.__name__.rpartition(".")[2], b, x.reshape(b * s, d_model), weight, bias, *features
        )
    else:
        q, k, v = module.forward(x.reshape(b * s, d_model), weight, bias, *features)
    return q.view(b, s, h, d), k.view(b, s, h_kv, d), v.view(b, s, h_kv, d)


def _check_heads(num_heads, num_kv_heads) -> tuple[int, int]:
    h, h_kv = num_heads, num_heads if num_kv_heads is None else num_kv_heads
    for name, n in (("num_heads", h), ("num_kv_heads", h_kv)):
        if not isinstance(n, (int, torch.SymInt)) or n < 1:
            raise ValueError(f"{name} must be a positive integer, got {n!r}")
    if h % h_kv:
        raise ValueError(f"num_heads must be a multiple of num_kv_heads = {h_kv}, got {h}")
    return h, h_kv


def _check_tables(cos, sin, positions, x, d):
    """cos and sin in the accumulator's dtype and positions in int64, all contiguous and on x's device."""
    if cos is None and sin is None:
        if positions is not None:
            raise ValueError("positions say where cos and sin are read: give those too")
        return None, None, None
    b, s = x.shape[:2]
    if cos is None or sin is None:
        raise ValueError(f"cos and sin come together, got {'sin' if cos is None else 'cos'} alone")
    for name, table in (("cos", cos), ("sin", sin)):
        check_floating(name, table)
        check_device(name, table, "x", x)
        if table.dim() != 2 or table.shape != cos.shape or 2 * table.shape[1] > d or table.shape[1] == 0:
            raise ValueError(
                f"{name} must be (positions, rotated / 2) with rotated <= d = {d}, got {tuple(table.shape)}"
            )
        if table.requires_grad:
            raise ValueError(f"{name} must not require a gradient: the projection has none for its tables")
    acc = torch.float64 if x.dtype == torch.float64 else torch.float32
    cos, sin = cos.to(acc).contiguous(), sin.to(acc).contiguous()
    if positions is None:
        if s > cos.shape[0]:
            raise ValueError(f"cos and sin must cover {s} positions, got {cos.shape[0]}")
        return cos, sin, None
    if not isinstance(positions, Tensor) or positions.dtype not in (torch.int32, torch.int64):
        kind = positions.dtype if isinstance(positions, Tensor) else type(positions).__name__
        raise TypeError(f"positions must be an int32 or int64 tensor, got {kind}")
    check_device("positions", positions, "x", x)
    if tuple(positions.shape) not in ((s,), (b, s), (1, s)):
        raise ValueError(f"positions must be (s,) = ({s},) or (b, s) = ({b}, {s}), got {tuple(positions.shape)}")
    # reading the values would break a compiled graph and stall a GPU; the kernels clamp them
    if positions.is_cpu and not torch.compiler.is_compiling() and positions.numel():
        low, high = (int(p) for p in positions.aminmax())
        if low < 0 or high >= cos.shape[0]:
            raise ValueError(f"positions must lie in [0, {cos.shape[0]}), got values from {low} to {high}")
    return cos, sin, positions.long().expand(b, s).contiguous()


class _QKVProjection(torch.autograd.Function):
    @staticmethod
    def forward(ctx, name, batch, x, weight, bias, *features):
        ctx.save_for_backward(x, weight, bias, *features[:3])
        ctx.name, ctx.batch, ctx.numbers = name, batch, features[3:]
        return BACKENDS[name].forward(x, weight, bias, *features)

    @staticmethod
    def backward(ctx, dq, dk, dv):
        x, weight, bias, *tables = ctx.saved_tensors
        seq, h, h_kv, interleaved = ctx.numbers
        _, _, need_dx, need_dweight, need_dbias, *_ = ctx.needs_input_grad
        rest = (None,) * (3 + len(ctx.numbers))
        if torch.is_grad_enabled():

            def forward(x, weight, bias):
                x = x.view(ctx.batch, seq, -1)
                heads = reference.forward(x, weight, bias, *tables, h, h_kv, interleaved)
                return tuple(y.flatten(0, 1) for y in heads)

            return (
                None,
                None,
                *reference_gradients(forward, (x, weight, bias), ctx.needs_input_grad[2:5], (dq, dk, dv)),
                *rest,
            )
        dx, dweight, dbias = BACKENDS[ctx.name].backward(
            dq, dk, dv, x, weight, *tables, *ctx.numbers, need_dx, need_dweight, need_dbias
        )
        return (
            None,
            None,
            dx if need_dx else None,
            dweight if need_dweight else None,
            dbias.to(bias.dtype) if need_dbias else None,
            *rest,
        )
