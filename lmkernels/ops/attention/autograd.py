"""The gradient of softmax attention, and the gradient of the gradient."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from .._autograd import needs_gradient, reference_gradients
from . import capture, native, reference, triton

BACKENDS = {"native": native, "triton": triton, "reference": reference}

# What follows q, k and v, in the order of the op's schema (see native.py): tensors or None, the first of them mask,
# bias, alibi_slopes and sink; then numbers.
Features = tuple


def run(module, q: Tensor, k: Tensor, v: Tensor, features: Features, deterministic: bool) -> tuple[Tensor, Tensor]:
    """out and lse from a backend; autograd is entered only where a gradient is wanted."""
    if capture.listening:
        capture.record(reference.weights, q, k, *features)
    if module is reference or not needs_gradient(q, k, v, *features[1:4]):
        return module.forward(q, k, v, *features)
    return _Attention.apply((module.__name__.rpartition(".")[2], deterministic, features[6:]), q, k, v, *features[:6])


def gradient_of(backends: dict[str, ModuleType], n_tensors: int) -> type[torch.autograd.Function]:
    """The function of ((backend's name, deterministic, numbers), q, k, v, *tensors).

    The tensors, n_tensors of them, and the numbers are a backend's features. Autograd takes time for each argument.
    """

    class Attention(torch.autograd.Function):
        @staticmethod
        def forward(ctx, call, q, k, v, *tensors):
            name, _, numbers = ctx.call = call
            out, lse = backends[name].forward(q, k, v, *tensors, *numbers)
            ctx.set_materialize_grads(False)
            ctx.save_for_backward(q, k, v, out, lse, *tensors)
            return out, lse

        @staticmethod
        def backward(ctx, dout, dlse):
            needs = ctx.needs_input_grad[5:8]  # bias, alibi_slopes, sink
            name, deterministic, numbers = ctx.call
            q, k, v, out, lse, *tensors = ctx.saved_tensors
            if torch.is_grad_enabled():
                gradients = reference_gradients(
                    lambda *inputs: backends["reference"].forward(*inputs, *numbers),
                    (q, k, v, *tensors),
                    ctx.needs_input_grad[1:],
                    (dout, dlse),
                )
            else:
                dq, dk, dv, *optional = backends[name].backward(
                    dout, dlse, q, k, v, out, lse, *tensors, *numbers, *needs, deterministic
                )
                dbias, dslopes, dsink = (g if needed else None for g, needed in zip(optional, needs, strict=True))
                gradients = dq, dk, dv, None, dbias, dslopes, dsink, *(None,) * (n_tensors - 4)
            return None, *gradients

    return Attention


_Attention = gradient_of(BACKENDS, n_tensors=6)
