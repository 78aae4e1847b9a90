"""The definition of rotary position embedding in plain torch (Su et al. 2021, arXiv:2104.09864)."""

from __future__ import annotations

import torch
from torch import Tensor


def unsupported(x: Tensor, cos: Tensor, sin: Tensor) -> str | None:
    return None


def forward(
    x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, interleaved: bool, inverse: bool = False
) -> Tensor:
    """x (b, s, h, d) or (t, h, d), pairs of its columns rotated by the angle of each token, or by minus the angle."""
    acc = torch.promote_types(x.dtype, torch.float32)
    cos, sin = (_of_tokens(table, positions, x.shape[-3]).to(acc)[..., None, :] for table in (cos, sin))
    if inverse:
        sin = -sin
    rotated, rest = x.to(acc).tensor_split([2 * cos.shape[-1]], -1)
    # first and second: the coordinates of the pairs, (..., h, pairs)
    first, second = rotated.unflatten(-1, (-1, 2)).unbind(-1) if interleaved else rotated.chunk(2, -1)
    turned = first * cos - second * sin, second * cos + first * sin
    rotated = torch.stack(turned, -1).flatten(-2) if interleaved else torch.cat(turned, -1)
    return torch.cat([rotated, rest], -1).to(x.dtype)


def _of_tokens(table: Tensor, positions: Tensor | None, s: int) -> Tensor:
    """The rows of the tokens: (s, pairs) or (b, s, pairs)."""
    if positions is not None:
        return table[positions]
    return table[:s] if table.dim() == 2 else table
