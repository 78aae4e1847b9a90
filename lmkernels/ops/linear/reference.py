"""The definition of a linear layer and of its activations in plain torch: any float dtype, differentiable."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# In the order of enum class Activation of the compiled library.
ACTIVATIONS = {
    None: lambda x: x,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "relu": F.relu,
    "tanh": torch.tanh,
}


def unsupported(x: Tensor, weight: Tensor) -> str | None:
    return None


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x weight^T + bias in the accumulator's dtype, of operands in x's dtype."""
    acc = torch.float64 if x.dtype == torch.float64 else torch.float32
    y = x.to(acc) @ weight.to(x.dtype).to(acc).t()
    return y if bias is None else y + bias.to(acc)


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, activation: str | None) -> Tensor:
    """activation(x weight^T + bias) + residual; arguments as `linear` after its checks."""
    with torch.autocast(x.device.type, enabled=False):
        y = ACTIVATIONS[activation](product(x, weight, bias))
        return y.to(x.dtype) if residual is None else (y + residual.to(y.dtype)).to(residual.dtype)
