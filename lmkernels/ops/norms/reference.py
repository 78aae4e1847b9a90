"""The definition of layer norm and RMS norm in plain torch: any float dtype, differentiable any number of times."""

from __future__ import annotations

import torch
from torch import Tensor


def unsupported(x: Tensor) -> str | None:
    return None


def forward(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float, center: bool
) -> tuple[Tensor, Tensor]:
    """y = norm(s) and s = x + residual, both (..., d) in s's dtype; without a residual s is x."""
    s = x if residual is None else x + residual
    h = s.to(torch.float64 if s.dtype == torch.float64 else torch.float32)
    if center:
        h = h - h.mean(-1, keepdim=True)
        h = h - h.mean(-1, keepdim=True)  # again: what the rounding of a large mean has left
    h = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        h = h * weight.to(h.dtype)
    if bias is not None:
        h = h + bias.to(h.dtype)
    return h.to(s.dtype), s
