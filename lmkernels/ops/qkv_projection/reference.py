"""The definition of the projection to queries, keys and values in plain torch: any float dtype, differentiable."""

from __future__ import annotations

import torch
from torch import Tensor

from ..linear.reference import product
from ..rotary import reference as rotary


def unsupported(x: Tensor, weight: Tensor) -> str | None:
    return None


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    positions: Tensor | None,
    num_heads: int,
    num_kv_heads: int,
    interleaved: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """q (b, s, h, d), k and v (b, s, h_kv, d) for x (b, s, d_model); arguments as `qkv_projection` after its checks."""
    with torch.autocast(x.device.type, enabled=False):
        heads = product(x, weight, bias).unflatten(-1, (num_heads + 2 * num_kv_heads, -1))
        q, k, v = heads.split((num_heads, num_kv_heads, num_kv_heads), 2)
        if cos is not None:
            q, k = (rotary.forward(y, cos, sin, positions, interleaved) for y in (q, k))
        return q.to(x.dtype), k.to(x.dtype), v.to(x.dtype)
