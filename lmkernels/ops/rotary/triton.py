"""Rotary position embedding in Triton."""

from __future__ import annotations

from torch import Tensor

from .. import _triton
from .._autograd import needs_gradient


def rotate(
    x: Tensor, out: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, interleaved: bool, inverse: bool
) -> None:
    """x (b, s, h, d) turned into `out`, any strides but on the last axis of out; in place where it is x itself.

    cos, sin: (n, pairs) or (b or 1, s, pairs); positions: (b or 1, s) or None. Those outside the tables are clamped.
    """
    from . import triton_kernels as kernels

    b, s, h, d = x.shape
    pairs = cos.shape[-1]
    cos, sin = (t if t.stride(-1) == 1 else t.contiguous() for t in (cos, sin))
    if cos.stride() != sin.stride():
        cos, sin = cos.contiguous(), sin.contiguous()
    table_b = cos.stride(0) if cos.dim() == 3 and cos.shape[0] > 1 else 0
    position_strides = (0, 0) if positions is None else _triton.broadcast_strides(positions)
    rest = 0 if out is x else d - 2 * pairs  # the columns that are copied
    rows = b * s * h
    tile_rows = min(64, max(1, 4096 // _triton.next_power_of_2(d)))
    _triton.launch(
        kernels.rotate, (_triton.ceil_div(rows, tile_rows),),
        x, out, cos, sin, positions, rows, s, h, d, pairs, cos.shape[-2],
        *x.stride(), *out.stride()[:3], table_b, cos.stride(-2), *position_strides,
        INTERLEAVED=interleaved, INVERSE=inverse, ROWS=tile_rows, PAIRS=_triton.next_power_of_2(pairs),
        REST=_triton.next_power_of_2(rest) if rest else 0, num_warps=4,
    )  # fmt: skip


@_triton.op("rotary")
def _rotary(x, cos, sin, positions, interleaved, inverse):
    out = x.new_empty(x.shape)
    if cos.shape[-1] == 0:
        out.copy_(x)
    elif x.numel():
        x4, out4 = (x, out) if x.dim() == 4 else (x[None], out[None])
        rotate(x4, out4, cos, sin, positions, interleaved, inverse)
    return out


def unsupported(x: Tensor, cos: Tensor, sin: Tensor) -> str | None:
    if needs_gradient(cos, sin):
        return "the kernel has no gradient of cos and sin"
    return _triton.unsupported(x)


def forward(
    x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, interleaved: bool, inverse: bool = False
) -> Tensor:
    """x rotated, contiguous."""
    return _rotary(x, cos, sin, positions, interleaved, inverse)


def backward(
    dout: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, interleaved: bool, inverse: bool
) -> Tensor:
    """A rotation's transpose is its inverse."""
    return _rotary(dout, cos, sin, positions, interleaved, not inverse)
