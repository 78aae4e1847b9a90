"""Rotary position embedding: the public function."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _dispatch
from .._autograd import needs_gradient
from .._checks import check_device, check_floating, check_indices, check_range
from . import native, reference, triton

BACKENDS = {"native": native, "triton": triton, "reference": reference}


def rotary(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    interleaved: bool = False,
    positions: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Rotates pairs of columns of x by an angle for each token: (x1 cos - x2 sin, x2 cos + x1 sin).

    x: (b, s, h, d), or packed (t, h, d); float32, bfloat16, float16 or (on the CPU) float64; any strides
    cos, sin: (n, d_rot // 2), a row for each position (`rotary_tables`); or, beside a 4-d x, the rows of the tokens
        themselves, (b, s, d_rot // 2) or (1, s, d_rot // 2). In x's dtype or float32. d_rot <= d: columns of x from
        d_rot on are passed through. Tables that hold each angle twice, as those of Hugging Face models do, are cut to
        the first half: cos[..., : d_rot // 2].
    interleaved: the pairs are columns (2 i, 2 i + 1), as in GPT-J; else (i, i + d_rot // 2), as in GPT-NeoX and Llama.
    positions: (s,), (1, s) or (b, s), packed (t,); int32 or int64, the table's row for each token; None is 0, 1, 2, ...
    backend: "native", "triton" or "reference"; None takes the first that can run this.

    Returns x's shape and dtype, contiguous; computed in float32 (float64 for float64) and rounded once. Differentiable
    any number of times; in cos and sin too, by the reference.

    Raises ValueError or TypeError for bad arguments, a position outside the table among them, NotImplementedError when
    `backend` cannot run them.

    Su et al. 2021, arXiv:2104.09864.
    """
    _check(x, cos, sin, positions)
    if x.dtype == torch.float64:
        cos, sin = cos.to(torch.float64), sin.to(torch.float64)
    module = _dispatch.choose("rotary", BACKENDS, backend, x, cos, sin)
    if module is not native:
        check_range("positions", positions, cos.shape[0])
    return _rotate(module, x, cos, sin, positions, bool(interleaved), False)


def _check(x, cos, sin, positions) -> None:
    check_floating("x", x)
    if x.dim() not in (3, 4):
        raise ValueError(f"x must be (b, s, h, d) or (t, h, d), got {tuple(x.shape)}")
    for name, table in (("cos", cos), ("sin", sin)):
        check_floating(name, table)
        if table.dtype != x.dtype and table.dtype != torch.float32:
            allowed = x.dtype if x.dtype == torch.float32 else f"{x.dtype} or torch.float32"
            raise TypeError(f"{name} must be {allowed}, got {table.dtype}")
        check_device(name, table, "x", x)
    shape, d, s = tuple(cos.shape), x.shape[-1], x.shape[-3]
    if tuple(sin.shape) != shape or sin.dtype != cos.dtype:
        raise ValueError(f"sin must have cos's shape and dtype {shape} {cos.dtype}, got {tuple(sin.shape)} {sin.dtype}")
    if x.dim() == 4 and len(shape) == 3:
        if shape[0] not in (1, x.shape[0]) or shape[1] != s:
            raise ValueError(
                f"cos and sin with 3 axes must be (b, s, d_rot // 2) with (b, s) = {(x.shape[0], s)}, got {shape}"
            )
        if positions is not None:
            raise ValueError("positions must be None where cos and sin hold the rows of the tokens, (b, s, d_rot // 2)")
    elif len(shape) != 2:
        raise ValueError(f"cos and sin must be (n, d_rot // 2){' or (b, s, d_rot // 2)' * (x.dim() == 4)}, got {shape}")
    if 2 * shape[-1] > d:
        raise ValueError(
            f"cos and sin must have at most d // 2 = {d // 2} columns, got {shape[-1]}; of tables that hold each angle "
            "twice, pass the first half"
        )
    if positions is not None:
        b = x.shape[0]
        check_indices("positions", positions, ((s,), (1, s), (b, s)) if x.dim() == 4 else ((s,),), "x", x)
    elif shape[-2] < s:
        raise ValueError(f"cos and sin must have a row for each of the {s} positions, got {shape[-2]}")


def _rotate(module, x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, interleaved: bool, inverse: bool):
    if module is reference or not needs_gradient(x):
        return module.forward(x, cos, sin, positions, interleaved, inverse)
    return _Rotary.apply(module.__name__.rpartition(".")[2], x, cos, sin, positions, interleaved, inverse)


class _Rotary(torch.autograd.Function):
    """Linear in x, so its gradient is a rotation again, and differentiable as such."""

    @staticmethod
    def forward(ctx, name, x, cos, sin, positions, interleaved, inverse):
        ctx.save_for_backward(cos, sin, positions)
        ctx.name, ctx.interleaved, ctx.inverse = name, interleaved, inverse
        return BACKENDS[name].forward(x, cos, sin, positions, interleaved, inverse)

    @staticmethod
    def backward(ctx, dout):
        module, tables = BACKENDS[ctx.name], ctx.saved_tensors
        if torch.is_grad_enabled():
            dx = _rotate(module, dout, *tables, ctx.interleaved, not ctx.inverse)
        else:
            dx = module.backward(dout, *tables, ctx.interleaved, ctx.inverse)
        return None, dx, None, None, None, None, None
