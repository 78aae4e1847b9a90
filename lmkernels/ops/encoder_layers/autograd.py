"""One layer of an encoder with its gradient, in a call each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .._autograd import reference_gradients
from .._precision import float32_parts
from ..attention import attention
from ..attention_varlen import attention_varlen
from ..dropout import STEPS, drop_by
from ..linear import linear
from ..linear.activations import CODES
from ..norms import layer_norm
from . import native
from .reference import pairs


@dataclass(frozen=True)
class Layer:
    """What one layer of `encoder_layers` is, besides its parameters, while it is trained.

    attention_p, p: how much is dropped of the attention's weights, and of what is added to the residual
    cu_seqlens, max_seqlen: of packed sequences; None where x is `batch` sequences of one length
    """

    heads: int
    activation: str | None
    eps: float
    attention_p: float = 0.0
    p: float = 0.0
    batch: int = 1
    cu_seqlens: Tensor | None = None
    max_seqlen: int = 0

    def __call__(self, x: Tensor, parameters: Sequence[Tensor]) -> Tensor:
        """The layer after x (t, d_model), with parameters as `encoder_layers` takes them; all of them get a gradient.

        Under autocast products are in its dtype, x and the result stay as they are. The numbers of dropout are those
        that the layer's modules would draw one by one.
        """
        dtype = product_dtype(x)
        dropped = round(self.p * STEPS)
        attention_seed = torch.randint(2**62, (), dtype=torch.int64) if self.attention_p > 0 else None
        seed1, seed2 = (int(torch.randint(2**62, ())) if dropped else 0 for _ in range(2))
        return _Layer.apply(self, (attention_seed, dropped, seed1, seed2, dtype), x.contiguous(), *parameters)

    def composed(self, chance: tuple, x: Tensor, *parameters: Tensor) -> Tensor:
        """The same of ops that can be differentiated again."""
        attention_seed, dropped, *seeds, dtype = chance
        query, key, value, output, norm1, up, down, norm2 = pairs(parameters)
        with torch.autocast("cpu", enabled=False):
            narrow = x.to(dtype)
            q, k, v = (linear(narrow, *part).unflatten(-1, (self.heads, -1)) for part in (query, key, value))
            chances = {"dropout_p": self.attention_p, "seed": attention_seed} if self.attention_p else {}
            if self.cu_seqlens is None:
                q, k, v = (part.unflatten(0, (self.batch, -1)) for part in (q, k, v))
                out = attention(q, k, v, **chances).flatten(0, 1)
            else:
                bounds = self.cu_seqlens, self.cu_seqlens, self.max_seqlen, self.max_seqlen
                out = attention_varlen(q, k, v, *bounds, **chances)

            def add_and_norm(y: Tensor, dense, residual: Tensor, norm, seed: int) -> Tensor:
                if dropped == 0:
                    return layer_norm(linear(y, *dense, residual=residual), *norm, self.eps)
                return layer_norm(drop_by(linear(y, *dense), dropped, seed), *norm, self.eps, residual=residual)[0]

            x = add_and_norm(out.flatten(-2), output, x, norm1, seeds[0])
            hidden = linear(x.to(dtype), *up, activation=self.activation)
            return add_and_norm(hidden, down, x, norm2, seeds[1])

    def _numbers(self, x: Tensor) -> tuple:
        scale = (x.shape[-1] // self.heads) ** -0.5
        return self.cu_seqlens, self.batch, self.max_seqlen, self.heads, scale, CODES[self.activation]


def product_dtype(x: Tensor) -> torch.dtype:
    if x.dtype == torch.float64 or not torch.is_autocast_enabled("cpu"):
        return x.dtype
    return torch.get_autocast_dtype("cpu")


def trains(x: Tensor, parameters: Sequence, shape: tuple, chances: tuple) -> bool:
    """Whether a Layer(*shape, *chances) can be called with these: all of them want a gradient."""
    dtype = product_dtype(x)
    heads, (attention_p, p) = shape[0], chances
    return (
        native.unsupported(x, parameters, heads) is None
        and dtype in native.DTYPES
        and x.dtype in (dtype, torch.float32)
        and all(type(w) is torch.nn.Parameter and w.requires_grad for w in parameters)
        and all(w.is_cpu and w.dtype in (dtype, x.dtype, torch.float32) for w in parameters)
        and attention_p < 1
        and (p == 0 or 0 < round(p * STEPS) < STEPS)
    )


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(ctx, layer, chance, x, *parameters):
        attention_seed, dropped, seed1, seed2, dtype = chance
        drops = attention_seed, layer.attention_p, dropped, seed1, seed2
        numbers, code = layer._numbers(x), native.DTYPES.index(dtype)
        results = native.layer_fwd(x, parameters, *numbers, layer.eps, *drops, code, float32_parts())
        y, q, k, v, heads, lse, s1, rstd1, mean1, y1, pre, hidden, s2, rstd2, mean2, *narrowed = results
        source, middle = narrowed or (x, y1)
        saved = q, k, v, heads, lse, s1, rstd1, mean1, pre, hidden, s2, rstd2, mean2, source, middle
        ctx.save_for_backward(x, *parameters, *saved)
        ctx.layer, ctx.chance, ctx.numbers, ctx.drops = layer, chance, numbers, drops
        return y

    @staticmethod
    def backward(ctx, dy):
        x, *rest = ctx.saved_tensors
        parameters, saved = rest[:16], rest[16:]
        if torch.is_grad_enabled():
            return (
                None,
                None,
                *reference_gradients(
                    lambda *inputs: ctx.layer.composed(ctx.chance, *inputs),
                    (x, *parameters),
                    ctx.needs_input_grad[2:],
                    (dy,),
                ),
            )
        needed = any(ctx.needs_input_grad[3:])
        dx, *rest = native.layer_bwd(dy, saved, parameters, *ctx.numbers, *ctx.drops, needed, float32_parts())
        return None, None, dx, *(rest if needed else [None] * len(parameters))
