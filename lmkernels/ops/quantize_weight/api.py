"""Weights in 8 or 4 bits for inference: the public function and the linear layer on them."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _dispatch
from .._autograd import needs_gradient
from .._checks import check_floating
from ..linear.checks import check_activation, check_bias, check_residual, check_x
from . import native, reference

BACKENDS = {"native": native, "reference": reference}


class QuantizedWeight:
    """A weight (d_out, d_in) in 8 or 4 bits, which `linear` takes in place of a tensor.

    dtype_name: "int8" or "int4"
    shape: (d_out, d_in)
    data, scales: the contiguous tensors that hold it, in the layout of the kernels; the weight is made of them again by
        QuantizedWeight(data, scales, shape, dtype_name)
    """

    __slots__ = ("bits", "data", "dtype_name", "scales", "shape")

    def __init__(self, data: Tensor, scales: Tensor, shape: tuple[int, int], dtype_name: str):
        self.bits = _bits(dtype_name)
        self.dtype_name = dtype_name
        self.shape = torch.Size(shape)
        for name, x, like in zip(("data", "scales"), (data, scales), reference.empty(shape, self.bits, "meta")):
            _check_storage(name, x, like.dtype, tuple(like.shape), self)
        self.data, self.scales = data, scales

    @classmethod
    def empty(cls, shape: tuple[int, int], dtype_name: str, *, device=None) -> QuantizedWeight:
        """One whose tensors are not filled yet."""
        return cls(*reference.empty(shape, _bits(dtype_name), device), shape, dtype_name)

    @property
    def device(self) -> torch.device:
        return self.data.device

    @property
    def nbytes(self) -> int:
        return self.data.nbytes + self.scales.nbytes

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight (d_out, d_in) as a tensor."""
        return reference.dequantize(self.data, self.scales, *self.shape, self.bits).to(dtype)

    def rows(self, index: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Rows of the weight, (n, d_in), for index (n,), int32 or int64 below d_out."""
        return reference.rows(self.data, self.scales, self.shape[1], self.bits, index.long()).to(dtype)

    def __repr__(self) -> str:
        return f"QuantizedWeight(shape={tuple(self.shape)}, dtype_name={self.dtype_name!r}, nbytes={self.nbytes})"


def quantize_weight(weight: Tensor, dtype: str) -> QuantizedWeight:
    """A weight in fewer bits, for inference: `linear` takes it in place of the tensor.

    weight: (d_out, d_in), any strides, any float dtype
    dtype: "int8": a scale per row of the weight, float32
           "int4": a scale per 32 neighbours in a row, bfloat16, the one of 17 tried with the least square error;
               4.5 bits per weight
    Both are symmetric around 0. Of Gaussian weights, int8 loses 0.8 % and int4 8.1 % (root mean square).

    `linear` rounds x too: each row to integers up to 127 times a scale of its own, by which the result of Gaussian x
    moves by 0.6 to 0.9 % (root mean square). A row has the same bits in any batch.

    Raises ValueError or TypeError for bad arguments, and for a weight that is not finite.
    """
    check_floating("weight", weight)
    if weight.dim() != 2:
        raise ValueError(f"weight must be (out, in), got {tuple(weight.shape)}")
    bits = _bits(dtype)
    if not weight.isfinite().all():
        raise ValueError("weight must be finite, got an infinity or a NaN")
    with torch.no_grad():
        data, scales = reference.quantize(weight, bits)
    return QuantizedWeight(data, scales, weight.shape, dtype)


def quantized_linear(
    x: Tensor,
    weight: QuantizedWeight,
    bias: Tensor | None,
    activation: str | None,
    residual: Tensor | None,
    backend: str | None,
) -> Tensor:
    """`linear` for a quantised weight."""
    check_x(x)
    check_activation(activation)
    d_out, d_in = weight.shape
    if x.shape[-1] != d_in:
        raise ValueError(f"weight must be (out, in) = (out, {x.shape[-1]}), got {tuple(weight.shape)}")
    if weight.device != x.device:
        raise ValueError(f"weight must be on x's device {x.device}, got {weight.device}")
    bias = check_bias("bias", bias, x, d_out)
    check_residual(residual, x, d_out)
    if needs_gradient(x, bias, residual):
        raise ValueError(
            f"weight must be a tensor where a gradient is wanted, got {weight.dtype_name}; call linear under "
            "torch.no_grad() or torch.inference_mode(), or with weight.dequantize()"
        )
    module = _dispatch.choose("linear", BACKENDS, backend, x)
    rows = x.reshape(-1, d_in) if x.dim() != 2 else x
    if residual is not None and x.dim() != 2:
        residual = residual.reshape(-1, d_out)
    out = module.forward(rows, weight.data, weight.scales, d_out, weight.bits, bias, residual, activation)
    return out if x.dim() == 2 else out.view(*x.shape[:-1], d_out)


def _bits(dtype_name: str) -> int:
    if dtype_name not in reference.BITS:
        raise ValueError(f"dtype must be one of {', '.join(map(repr, reference.BITS))}, got {dtype_name!r}")
    return reference.BITS[dtype_name]


def _check_storage(name: str, x, dtype: torch.dtype, shape: tuple[int, ...], weight: QuantizedWeight) -> None:
    if not isinstance(x, Tensor) or x.dtype != dtype or tuple(x.shape) != shape or not x.is_contiguous():
        got = f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(
            f"{name} of an {weight.dtype_name} weight {tuple(weight.shape)} must be a contiguous {dtype} tensor of "
            f"{shape}, got {got}"
        )
