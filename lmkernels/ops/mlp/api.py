"""The feed-forward layers of transformers: the public functions and their gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _dispatch
from .._autograd import needs_gradient, reference_gradients
from .._checks import autocast
from ..linear.api import linear
from ..linear.checks import check_activation, check_bias, check_residual, check_weight, check_x
from ..quantize_weight.api import QuantizedWeight
from . import native, reference, triton

BACKENDS = {"native": native, "triton": triton, "reference": reference}


def mlp(
    x: Tensor,
    w_in: Tensor | QuantizedWeight,
    b_in: Tensor | None,
    w_out: Tensor | QuantizedWeight,
    b_out: Tensor | None,
    *,
    activation: str | None = "gelu_tanh",
    residual: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """activation(x w_in^T + b_in) w_out^T + b_out + residual.

    x: (..., d_model)
    w_in: (d_ff, d_model), b_in: (d_ff,) or None
    w_out: (d_out, d_ff), b_out: (d_out,) or None; d_out is usually d_model
    activation: "gelu", "gelu_tanh", "silu", "relu", "tanh" or None
    residual: (..., d_out)
    Dtypes, layouts of the weights and the result are those of `linear`, which also takes weights from
    `quantize_weight`. Of the hidden layer, what the activation is applied to is kept for the backward, (..., d_ff), and
    nothing else.
    """
    (x,) = autocast(x)
    if isinstance(w_in, QuantizedWeight) or isinstance(w_out, QuantizedWeight):
        hidden = linear(x, w_in, b_in, activation=activation, backend=backend)
        return linear(hidden, w_out, b_out, residual=residual, backend=backend)
    check_x(x)
    check_activation(activation)
    check_weight("w_in", w_in, x, x.shape[-1])
    check_weight("w_out", w_out, x, w_in.shape[0])
    b_in, b_out = check_bias("b_in", b_in, x, w_in.shape[0]), check_bias("b_out", b_out, x, w_out.shape[0])
    check_residual(residual, x, w_out.shape[0])
    module = _dispatch.choose("mlp", BACKENDS, backend, x, w_in)
    if module is reference:
        return reference.mlp(x, w_in, b_in, w_out, b_out, residual, activation)
    rows, residual = _rows(x), None if residual is None else _rows(residual)
    if needs_gradient(x, w_in, b_in, w_out, b_out, residual):
        out = _MLP.apply(module.__name__.rpartition(".")[2], activation, rows, w_in, b_in, w_out, b_out, residual)
    else:
        out, _ = module.mlp_forward(rows, w_in, b_in, w_out, b_out, residual, activation, False)
    return out.view(*x.shape[:-1], w_out.shape[0])


def swiglu_mlp(
    x: Tensor,
    w_gate: Tensor | QuantizedWeight,
    w_up: Tensor | QuantizedWeight,
    w_down: Tensor | QuantizedWeight,
    *,
    residual: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """(silu(x w_gate^T) * x w_up^T) w_down^T + residual (Shazeer 2020, arXiv:2002.05202).

    x: (..., d_model)
    w_gate, w_up: (d_ff, d_model), w_down: (d_out, d_ff)
    residual: (..., d_out)
    Dtypes, layouts of the weights and the result are those of `linear`, which also takes weights from
    `quantize_weight`.
    """
    (x,) = autocast(x)
    if any(isinstance(weight, QuantizedWeight) for weight in (w_gate, w_up, w_down)):
        hidden = linear(x, w_gate, activation="silu", backend=backend) * linear(x, w_up, backend=backend)
        return linear(hidden, w_down, residual=residual, backend=backend)
    check_x(x)
    check_weight("w_gate", w_gate, x, x.shape[-1])
    check_weight("w_up", w_up, x, x.shape[-1], w_gate.shape[0])
    check_weight("w_down", w_down, x, w_gate.shape[0])
    check_residual(residual, x, w_down.shape[0])
    module = _dispatch.choose("swiglu_mlp", BACKENDS, backend, x, w_gate)
    if module is reference:
        return reference.swiglu_mlp(x, w_gate, w_up, w_down, residual)
    rows, residual = _rows(x), None if residual is None else _rows(residual)
    if needs_gradient(x, w_gate, w_up, w_down, residual):
        out = _SwiGLU.apply(module.__name__.rpartition(".")[2], rows, w_gate, w_up, w_down, residual)
    else:
        out, _, _ = module.swiglu_forward(rows, w_gate, w_up, w_down, residual, False)
    return out.view(*x.shape[:-1], w_down.shape[0])


def _rows(x: Tensor) -> Tensor:
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


class _MLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx, name, activation, x, w_in, b_in, w_out, b_out, residual):
        out, pre = BACKENDS[name].mlp_forward(x, w_in, b_in, w_out, b_out, residual, activation, True)
        ctx.save_for_backward(x, w_in, b_in, w_out, b_out, residual, pre)
        ctx.name, ctx.activation = name, activation
        return out

    @staticmethod
    def backward(ctx, dout):
        x, w_in, b_in, w_out, b_out, residual, pre = ctx.saved_tensors
        needs = ctx.needs_input_grad[2:]
        if torch.is_grad_enabled():
            return (
                None,
                None,
                *reference_gradients(
                    lambda *tensors: reference.mlp(*tensors, ctx.activation),
                    (x, w_in, b_in, w_out, b_out, residual),
                    needs,
                    (dout,),
                ),
            )
        dx, dw_in, db_in, dw_out, db_out = BACKENDS[ctx.name].mlp_backward(
            dout, x, pre, w_in, w_out, ctx.activation, needs[:5]
        )
        gradients = (
            dx,
            dw_in,
            db_in.to(b_in.dtype) if needs[2] else None,
            dw_out,
            db_out.to(b_out.dtype) if needs[4] else None,
            dout,
        )
        return None, None, *(g if needed else None for g, needed in zip(gradients, needs, strict=True))


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, name, x, w_gate, w_up, w_down, residual):
        out, gate, up = BACKENDS[name].swiglu_forward(x, w_gate, w_up, w_down, residual, True)
        ctx.save_for_backward(x, w_gate, w_up, w_down, residual, gate, up)
        ctx.name = name
        return out

    @staticmethod
    def backward(ctx, dout):
        x, w_gate, w_up, w_down, residual, gate, up = ctx.saved_tensors
        needs = ctx.needs_input_grad[1:]
        if torch.is_grad_enabled():
            inputs = (x, w_gate, w_up, w_down, residual)
            return None, *reference_gradients(reference.swiglu_mlp, inputs, needs, (dout,))
        backend = BACKENDS[ctx.name]
        gradients = (*backend.swiglu_backward(dout, x, gate, up, w_gate, w_up, w_down, needs[:4]), dout)
        return None, *(g if needed else None for g, needed in zip(gradients, needs, strict=True))
