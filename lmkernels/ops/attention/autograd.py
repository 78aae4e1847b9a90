"""The gradient of softmax attention, and the gradient of the gradient."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from .._autograd import needs_gradient, reference_gradients
from . import capture, native, reference, triton

BACKENDS = {"native": native, "triton": triton, "reference": reference}

# What follows q, k and v, in the order of the op's schema (see native.py): tensors or None, the first of them mask,
# bias, alibi_slopes and sink; then numbers. For native (right, offset, scale) will do where nothing else is asked for:
# torch takes a tenth of a microsecond and more for each argument.
Features = tuple


def full(features: Features) -> Features:
    """All that the other backends want."""
    if len(features) > 3:
        return features
    right, offset, scale = features
    return *(None,) * 6, -1, right, offset, scale, 0.0, 0.0


def run(module, q: Tensor, k: Tensor, v: Tensor, features: Features, deterministic: bool) -> tuple[Tensor, Tensor]:
    """out and lse from a backend; autograd is entered only where a gradient is wanted."""
    if capture.listening:
        capture.record(reference.weights, q, k, *full(features))
    tensors, numbers = ((), features) if len(features) == 3 else (features[:6], features[6:])
    if module is reference or not needs_gradient(q, k, v, *tensors[1:4]):
        return module.forward(q, k, v, *features)
    return _Attention.apply((module.__name__.rpartition(".")[2], deterministic, numbers), q, k, v, *tensors)


def gradient_of(backends: dict[str, ModuleType]) -> type[torch.autograd.Function]:
    """The function of ((backend's name, deterministic, numbers), q, k, v, *tensors).

    The tensors and the numbers are a backend's features.
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
            name, deterministic, numbers = ctx.call
            q, k, v, out, lse, *tensors = ctx.saved_tensors
            if torch.is_grad_enabled():
                gradients = reference_gradients(
                    lambda q, k, v, *tensors: backends["reference"].forward(q, k, v, *full((*tensors, *numbers))),
                    (q, k, v, *tensors),
                    ctx.needs_input_grad[1:],
                    (dout, dlse),
                )
                return None, *gradients
            given = dout, dlse, q, k, v, out, lse
            if not tensors:
                return None, *backends[name].backward(*given, *numbers, deterministic)
            needs = ctx.needs_input_grad[5:8]  # bias, alibi_slopes, sink
            dq, dk, dv, *optional = backends[name].backward(*given, *tensors, *numbers, *needs, deterministic)
            dbias, dslopes, dsink = (g if needed else None for g, needed in zip(optional, needs, strict=True))
            return None, dq, dk, dv, None, dbias, dslopes, dsink, *(None,) * (len(tensors) - 4)

    return Attention


_Attention = gradient_of(BACKENDS)
