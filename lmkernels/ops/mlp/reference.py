"""The definitions of the feed-forward layers in plain torch: any float dtype, differentiable."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..linear import reference as linear


def unsupported(x: Tensor, weight: Tensor) -> str | None:
    return None


def mlp(x, w_in, b_in, w_out, b_out, residual, activation) -> Tensor:
    """activation(x w_in^T + b_in) w_out^T + b_out + residual."""
    return linear.forward(linear.forward(x, w_in, b_in, None, activation), w_out, b_out, residual, None)


def swiglu_mlp(x, w_gate, w_up, w_down, residual) -> Tensor:
    """(silu(x w_gate^T) * x w_up^T) w_down^T + residual (Shazeer 2020, arXiv:2002.05202)."""
    with torch.autocast(x.device.type, enabled=False):
        hidden = F.silu(linear.product(x, w_gate, None)) * linear.product(x, w_up, None)
    return linear.forward(hidden.to(x.dtype), w_down, None, residual, None)
