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
    return _Attention.apply(module.__name__.rpartition(".")[2], deterministic, q, k, v, *features)


def gradient_of(backends: dict[str, ModuleType], n_tensors: int) -> type[torch.autograd.Function]:
    """The function of (backend's name, deterministic, q, k, v, *features) whose features begin with so many tensors."""

    class Attention(torch.autograd.Function):
        @staticmethod
        def forward(ctx, name, deterministic, q, k, v, *features):
            out, lse = backends[name].forward(q, k, v, *features)
            ctx.set_materialize_grads(False)
            ctx.save_for_backward(q, k, v, out, lse, *features[:n_tensors])
            ctx.name, ctx.deterministic, ctx.numbers = name, deterministic, features[n_tensors:]
            return out, lse

        @staticmethod
        def backward(ctx, dout, dlse):
            needs = ctx.needs_input_grad[6:9]  # bias, alibi_slopes, sink
            q, k, v, out, lse, *features = ctx.saved_tensors
            if torch.is_grad_enabled():
                gradients = reference_gradients(
                    lambda *tensors: backends["reference"].forward(*tensors, *ctx.numbers),
                    (q, k, v, *features),
                    ctx.needs_input_grad[2 : 5 + n_tensors],
                    (dout, dlse),
                )
            else:
                dq, dk, dv, *optional = backends[ctx.name].backward(
                    dout, dlse, q, k, v, out, lse, *features, *ctx.numbers, *needs, ctx.deterministic
                )
                dbias, dslopes, dsink = (g if needed else None for g, needed in zip(optional, needs, strict=True))
                gradients = dq, dk, dv, None, dbias, dslopes, dsink, *(None,) * (n_tensors - 4)
            return None, None, *gradients, *(None,) * len(ctx.numbers)

    return Attention


_Attention = gradient_of(BACKENDS, n_tensors=6)
