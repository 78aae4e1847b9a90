"""The gradient of softmax attention, and the gradient of the gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from .._autograd import needs_gradient, reference_gradients
from . import native, reference

BACKENDS = {"native": native, "reference": reference}

# What follows q, k and v, in the order of the op's schema (see native.py): six tensors or None, then six numbers.
Features = tuple  # mask, bias, alibi_slopes, sink, kv_lengths, seed, left, right, offset, scale, softcap, dropout_p
_TENSORS = 6


def run(module, q: Tensor, k: Tensor, v: Tensor, features: Features, deterministic: bool) -> tuple[Tensor, Tensor]:
    """out and lse from a backend; autograd is entered only where a gradient is wanted."""
    if module is reference or not needs_gradient(q, k, v, *features[1:4]):
        return module.forward(q, k, v, *features)
    return _Attention.apply(module.__name__.rpartition(".")[2], deterministic, q, k, v, *features)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, name, deterministic, q, k, v, *features):
        out, lse = BACKENDS[name].forward(q, k, v, *features)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, k, v, out, lse, *features[:_TENSORS])
        ctx.name, ctx.deterministic, ctx.numbers = name, deterministic, features[_TENSORS:]
        return out, lse

    @staticmethod
    def backward(ctx, dout, dlse):
        needs = ctx.needs_input_grad[6:9]  # bias, alibi_slopes, sink
        q, k, v, out, lse, *features = ctx.saved_tensors
        if torch.is_grad_enabled():
            gradients = reference_gradients(
                lambda *tensors: reference.forward(*tensors, *ctx.numbers),
                (q, k, v, *features),
                ctx.needs_input_grad[2:11],
                (dout, dlse),
            )
        else:
            dq, dk, dv, *optional = BACKENDS[ctx.name].backward(
                dout, dlse, q, k, v, out, lse, *features, *ctx.numbers, *needs, ctx.deterministic
            )
            dbias, dslopes, dsink = (g if needed else None for g, needed in zip(optional, needs, strict=True))
            gradients = dq, dk, dv, None, dbias, dslopes, dsink, None, None
        return None, None, *gradients, *(None,) * len(ctx.numbers)
