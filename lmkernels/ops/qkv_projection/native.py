"""The projection to queries, keys and values in the compiled library."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import _library
from .._precision import float32_parts
from ..linear import native as linear

_TABLES = "Tensor? cos, Tensor? sin, Tensor? positions, SymInt seq, SymInt heads, SymInt heads_kv, bool interleaved"
_library.LIBRARY.define(
    f"qkv_projection_fwd(Tensor x, Tensor weight, Tensor? bias, {_TABLES}, int parts=3) -> (Tensor, Tensor, Tensor)"
)
_library.LIBRARY.define(
    f"qkv_projection_bwd(Tensor dq, Tensor dk, Tensor dv, Tensor x, Tensor weight, {_TABLES}, bool need_dx, "
    "bool need_dweight, bool need_dbias, int parts=3) -> (Tensor, Tensor, Tensor)"
)
_fwd = torch.ops.lmkernels.qkv_projection_fwd.default
_bwd = torch.ops.lmkernels.qkv_projection_bwd.default

# The kernel rotates whole heads in a buffer of this size.
MAX_HEAD_DIM = 1024


@torch.library.register_fake("lmkernels::qkv_projection_fwd", lib=_library.LIBRARY)
def _(x, weight, bias, cos, sin, positions, seq, heads, heads_kv, interleaved, parts=3):
    rows, d = x.shape[0], weight.shape[0] // (heads + 2 * heads_kv)
    return x.new_empty(rows, heads, d), x.new_empty(rows, heads_kv, d), x.new_empty(rows, heads_kv, d)


@torch.library.register_fake("lmkernels::qkv_projection_bwd", lib=_library.LIBRARY)
def _(
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
    parts=3,
):
    dweight, dbias = linear.weight_gradients(x, weight, need_dweight, need_dbias)
    return x.new_empty(x.shape if need_dx else (0, 0)), dweight, dbias


def unsupported(x: Tensor, weight: Tensor) -> str | None:
    return linear.unsupported(x, weight)


def forward(x: Tensor, weight: Tensor, *features) -> tuple[Tensor, Tensor, Tensor]:
    """q (rows, h, d), k and v (rows, h_kv, d) for x (rows, d_model); `features` in the order of the schema."""
    return _fwd(x, weight, *features, float32_parts())


def backward(dq: Tensor, dk: Tensor, dv: Tensor, x: Tensor, weight: Tensor, *features_and_needs):
    """dx, dweight, dbias (float32, or float64); those not needed are empty."""
    return _bwd(dq, dk, dv, x, weight, *features_and_needs, float32_parts())
