"""The projection to queries, keys and values on a GPU: a product for each of the three, and rotation in place.

One product for all three would need another pass to tell the heads apart; of the three, only what is rotated is read
and written again.
"""

from __future__ import annotations

from torch import Tensor

from .. import _triton
from ..linear import triton as linear
from ..rotary import triton as rotary


@_triton.op("qkv_projection_fwd")
def _fwd(x, weight, bias, cos, sin, positions, seq, heads, heads_kv, interleaved):
    rows, d = x.shape[0], weight.shape[0] // (heads + 2 * heads_kv)
    found = []
    for first, n in ((0, heads), (heads, heads_kv), (heads + heads_kv, heads_kv)):
        part = slice(first * d, (first + n) * d)
        y, _ = linear.linear_fwd(x, weight[part], None if bias is None else bias[part], None, None, 0, False)
        found.append(y.view(rows, n, d))
    if cos is not None and rows:
        for y in found[:2]:
            heads_of = y.view(rows // seq, seq, -1, d)
            rotary.rotate(heads_of, heads_of, cos, sin, _of_sequences(positions, seq), interleaved, False)
    return tuple(found)


@_triton.op("qkv_projection_bwd")
def _bwd(
    dq,
    dk,
    dv,
    x,
    weight,
    cos,
    sin,
    positions,
    seq,
    heads,
    heads_kv,
    interleaved,
    need_dx,
    need_dweight,
    need_dbias,
):
    rows, d = x.shape[0], weight.shape[0] // (heads + 2 * heads_kv)
    douts = x.new_empty(rows, heads + 2 * heads_kv, d)
    for dout, part in zip((dq, dk, dv), douts.split((heads, heads_kv, heads_kv), 1), strict=True):
        if cos is None or dout is dv or not rows:
            part.copy_(dout)
        else:
            of_sequences = _of_sequences(positions, seq)
            source, target = (y.unflatten(0, (rows // seq, seq)) for y in (dout, part))
            rotary.rotate(source, target, cos, sin, of_sequences, interleaved, True)
    return linear.linear_bwd(douts.flatten(1), x, weight, None, 0, need_dx, need_dweight, need_dbias)


def _of_sequences(positions: Tensor | None, seq: int) -> Tensor | None:
    return None if positions is None else positions.view(-1, seq)


def unsupported(x: Tensor, weight: Tensor) -> str | None:
    return _triton.unsupported(x)


def forward(x: Tensor, weight: Tensor, *features) -> tuple[Tensor, Tensor, Tensor]:
    """q (rows, h, d), k and v (rows, h_kv, d) for x (rows, d_model); `features` in the order of the schema."""
    return _fwd(x, weight, *features)


def backward(dq: Tensor, dk: Tensor, dv: Tensor, x: Tensor, weight: Tensor, *features_and_needs):
    """dx, dweight, dbias (float32); those not needed are empty."""
    return _bwd(dq, dk, dv, x, weight, *features_and_needs)
