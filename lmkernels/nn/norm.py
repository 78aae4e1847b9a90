"""LayerNorm and RMSNorm."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops.norms import layer_norm, rms_norm
from ._scope import is_for_torch


class LayerNorm(torch.nn.LayerNorm):
    """`torch.nn.LayerNorm` by `lmkernels.layer_norm`: over the last axes, of which there may be several.

    Where the input has 16 bits, the parameters may be float32.
    """

    def forward(self, input: Tensor) -> Tensor:
        shape, axes = self.normalized_shape, len(self.normalized_shape)
        if is_for_torch(input, self.weight, self.bias) or input.shape[-axes:] != shape:  # torch's error is as good
            return super().forward(input)
        if axes == 1:
            return layer_norm(input, self.weight, self.bias, self.eps)
        flat = layer_norm(input.flatten(-axes), _flat(self.weight), _flat(self.bias), self.eps)
        return flat.view(input.shape)


class RMSNorm(torch.nn.RMSNorm):
    """`torch.nn.RMSNorm` by `lmkernels.rms_norm`: over the last axes, of which there may be several.

    Where the input has 16 bits, the weight may be float32. eps=None is, as in torch, that of the dtype which the sums
    have: float32, or float64 for float64.
    """

    def forward(self, x: Tensor) -> Tensor:
        shape, axes = self.normalized_shape, len(self.normalized_shape)
        if is_for_torch(x, self.weight) or x.shape[-axes:] != shape:
            return super().forward(x)
        eps = self.eps
        if eps is None:
            eps = torch.finfo(torch.float64 if x.dtype == torch.float64 else torch.float32).eps
        if axes == 1:
            return rms_norm(x, self.weight, eps)
        return rms_norm(x.flatten(-axes), _flat(self.weight), eps).view(x.shape)


def _flat(parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else parameter.flatten()
