"""The feed-forward layers on a GPU."""

from __future__ import annotations

from functools import partial

from ..linear import triton as linear
from ..linear.triton import unsupported
from . import layers

__all__ = ["mlp_backward", "mlp_forward", "swiglu_backward", "swiglu_forward", "unsupported"]

mlp_forward = partial(layers.mlp_forward, linear)
mlp_backward = partial(layers.mlp_backward, linear)
swiglu_forward = partial(layers.swiglu_forward, linear)
swiglu_backward = partial(layers.swiglu_backward, linear)
