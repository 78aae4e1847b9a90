"""The linear layers of a model: computed inside a kernel where nobody looks on, called where somebody does."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..nn import Linear
from ..nn.encoder import is_watched
from ..ops.linear import linear

# the activations of `linear`, for layers that it does not compute
FUNCTIONS = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
    "tanh": torch.tanh,
}


def weights_of(layer: nn.Module) -> tuple[Tensor, Tensor | None] | None:
    """weight (d_out, d_in) and bias, for a kernel; None of a layer that has hooks or was exchanged (for LoRA)."""
    if is_watched(layer):
        return None
    if type(layer) is Linear:
        return layer.weight, layer.bias
    return layer.parameters_of_linear() if hasattr(layer, "parameters_of_linear") else None


def project(layer: nn.Module, x: Tensor, activation: str | None = None, residual: Tensor | None = None) -> Tensor:
    """activation(layer(x)) + residual."""
    if (weights := weights_of(layer)) is not None:
        return linear(x, *weights, activation=activation, residual=residual)
    x = layer(x)
    if activation is not None:
        x = FUNCTIONS[activation](x)
    return x if residual is None else x + residual
