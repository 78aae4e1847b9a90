"""Rotary position embedding in the compiled library."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import _library
from .._autograd import needs_gradient

_library.LIBRARY.define(
    "rotary(Tensor x, Tensor cos, Tensor sin, Tensor? positions, bool interleaved, bool inverse) -> Tensor"
)
_rotary = torch.ops.lmkernels.rotary.default


@torch.library.register_fake("lmkernels::rotary", lib=_library.LIBRARY)
def _(x, cos, sin, positions, interleaved, inverse):
    return x.new_empty(x.shape)


def unsupported(x: Tensor, cos: Tensor, sin: Tensor) -> str | None:
    if _library.native_error is not None:
        return _library.native_error
    if not x.is_cpu:
        return f"the compiled library has no kernel for device {x.device.type!r}"
    if needs_gradient(cos, sin):
        return "the kernel has no gradient of cos and sin"
    return None


def forward(
    x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, interleaved: bool, inverse: bool = False
) -> Tensor:
    """x rotated, contiguous."""
    return _rotary(x, cos, sin, positions, interleaved, inverse)


def backward(
    dout: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, interleaved: bool, inverse: bool
) -> Tensor:
    """A rotation's transpose is its inverse."""
    return _rotary(dout, cos, sin, positions, interleaved, not inverse)
