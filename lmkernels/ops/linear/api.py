"""A linear layer with what follows it: the public function and its gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _dispatch
from .._autograd import needs_gradient, reference_gradients
from .._checks import autocast
from ..quantize_weight.api import QuantizedWeight, quantized_linear
from . import native, reference, triton
from .checks import check_activation, check_bias, check_residual, check_weight, check_x

BACKENDS = {"native": native, "triton": triton, "reference": reference}


def linear(
    x: Tensor,
    weight: Tensor | QuantizedWeight,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """activation(x weight^T + bias) + residual, in one pass over the result.

    x: (..., d_in)          float32, bfloat16, float16 or (on the CPU) float64
    weight: (d_out, d_in)   either axis contiguous: the transpose of a (d_in, d_out) matrix is read as it lies;
                            or a weight from `quantize_weight`, for inference
    bias: (d_out,)
    activation: "gelu", "gelu_tanh", "silu", "relu", "tanh" or None
    residual: (..., d_out)
    backend: "native", "triton" or "reference"; None takes the first that can run this.

    weight, bias and residual have x's dtype; where that has 16 bits they may be float32. The product then rounds the
    weight to 16 bits, as autocast does but without a copy of it (float16: it need not), and its gradient is float32.
    Returns (..., d_out) in the dtype of residual, or of x. Sums are float32 (float64 for float64); factors in float32
    keep their digits, unless `torch.set_float32_matmul_precision` allows fewer where that is faster. Differentiable in
    x, weight, bias and residual; twice by recomputation through the reference.

    Raises ValueError or TypeError for bad arguments, NotImplementedError when `backend` cannot run them.
    """
    (x,) = autocast(x)
    if isinstance(weight, QuantizedWeight):
        return quantized_linear(x, weight, bias, activation, residual, backend)
    check_x(x)
    check_activation(activation)
    check_weight("weight", weight, x, x.shape[-1])
    d_out = weight.shape[0]
    bias = check_bias("bias", bias, x, d_out)
    check_residual(residual, x, d_out)
    module = _dispatch.choose("linear", BACKENDS, backend, x, weight)
    if module is reference:
        return reference.forward(x, weight, bias, residual, activation)
    rows = x.reshape(-1, x.shape[-1]) if x.dim() != 2 else x
    if residual is not None and x.dim() != 2:
        residual = residual.reshape(-1, d_out)
    if needs_gradient(x, weight, bias, residual):
        out = _Linear.apply(module.__name__.rpartition(".")[2], activation, rows, weight, bias, residual)
    else:
        out, _ = module.forward(rows, weight, bias, residual, activation)
    return out if x.dim() == 2 else out.view(*x.shape[:-1], d_out)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, name, activation, x, weight, bias, residual):
        out, pre = BACKENDS[name].forward(x, weight, bias, residual, activation, need_pre=activation is not None)
        ctx.save_for_backward(x, weight, bias, residual, pre if activation is not None else None)
        ctx.name, ctx.activation = name, activation
        return out

    @staticmethod
    def backward(ctx, dout):
        x, weight, bias, residual, pre = ctx.saved_tensors
        *_, need_dx, need_dweight, need_dbias, need_dresidual = ctx.needs_input_grad
        if torch.is_grad_enabled():
            return (
                None,
                None,
                *reference_gradients(
                    lambda *tensors: reference.forward(*tensors, ctx.activation),
                    (x, weight, bias, residual),
                    ctx.needs_input_grad[2:],
                    (dout,),
                ),
            )
        dx, dweight, dbias = BACKENDS[ctx.name].backward(
            dout, x, weight, pre, ctx.activation, need_dx, need_dweight, need_dbias
        )
        return (
            None,
            None,
            dx if need_dx else None,
            dweight if need_dweight else None,
            dbias.to(bias.dtype) if need_dbias else None,
            dout if need_dresidual else None,
        )
