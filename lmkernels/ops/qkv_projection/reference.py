"""The definition of the projection to queries, keys and values in plain torch: any float dtype, differentiable."""

from __future__ import annotations

import torch
from torch import Tensor

from ..linear.reference import product


def unsupported(x: Tensor, weight: Tensor) -> str | None:
    return None


def rotate(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, interleaved: bool) -> Tensor:
    """x (b, s, h, d) with the leading 2 * cos.shape[1] elements of each head rotated."""
    b, s = x.shape[:2]
    if positions is None:
        positions = torch.arange(s, device=x.device).expand(b, s)
    cos, sin = (
        table.to(x.dtype)[positions.reshape(b, s)][:, :, None] for table in (cos, sin)
    )  # (b, s, 1, rotated / 2)
    rotated = 2 * cos.shape[-1]
    turning, rest = x[..., :rotated], x[..., rotated:]
    pairs = turning.unflatten(-1, (-1, 2) if interleaved else (2, -1))
    first, second = pairs.unbind(-1 if interleaved else -2)
    turned = torch.stack((first * cos - second * sin, second * cos + first * sin), -1 if interleaved else -2)
    return torch.cat((turned.flatten(-2), rest), -1)


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
            q, k = (rotate(y, cos, sin, positions, interleaved) for y in (q, k))
        return q.to(x.dtype), k.to(x.dtype), v.to(x.dtype)
