"""TransformerEncoderLayer."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules import module as torch_module

from ..ops.attention import attention
from ..ops.linear import linear
from ..ops.mlp import mlp
from ..ops.norms import layer_norm
from ._nested import pack
from ._scope import is_for_torch
from .attention import MultiheadAttention
from .linear import Linear
from .norm import LayerNorm

_FUNCTIONS = {F.relu: "relu", torch.relu: "relu", F.gelu: "gelu", F.silu: "silu", F.tanh: "tanh", torch.tanh: "tanh"}
_MODULES = {torch.nn.ReLU: "relu", torch.nn.SiLU: "silu", torch.nn.Tanh: "tanh"}
_FUSED = (MultiheadAttention, Linear, LayerNorm, torch.nn.Dropout)


class TransformerEncoderLayer(torch.nn.TransformerEncoderLayer):
    """`torch.nn.TransformerEncoderLayer` by lmkernels' ops: its arguments, masks, parameter names and results.

    Residuals are added in the kernels that come before or after them; of the hidden layer only what the activation is
    applied to is kept for the backward. relu, gelu, silu and tanh (functions of torch, or its modules) are applied
    inside the kernel, any other activation as it is. Where a submodule has hooks or has been exchanged, the submodules
    are called one by one, as torch does.

    Works in `torch.nn.TransformerEncoder`, whose nested tensors in eval run without work on padding, and takes nested
    tensors of the jagged layout in training too. Differs from torch where `MultiheadAttention` does.
    """

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.self_attn.__class__ = MultiheadAttention
        self.linear1.__class__ = self.linear2.__class__ = Linear
        self.norm1.__class__ = self.norm2.__class__ = LayerNorm

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """src: (s, b, d_model), (b, s, d_model) if batch_first, or (s, d_model); masks as in `MultiheadAttention`."""
        if not self._is_fusable() or (not src.is_nested and is_for_torch(src, self.linear1.weight)):
            return self._one_by_one(src, src_mask, src_key_padding_mask, is_causal)
        if src.is_nested:
            if src_mask is not None or src_key_padding_mask is not None:
                raise ValueError("src_mask and src_key_padding_mask must be None where src is nested")
            packed = pack("src", src, tuple(self.parameters()))
            return packed.nest(self._fused(packed.tokens, lambda x: self.self_attn.packed_heads(x, packed)))
        return self._fused(src, lambda x: self._heads(x, src_mask, src_key_padding_mask, is_causal))

    def _fused(self, x: Tensor, heads: Callable[[Tensor], Tensor]) -> Tensor:
        """heads: what self-attention gives for (..., d_model), before its last projection."""
        if self.norm_first:
            out = partial(self.self_attn.project_out, heads(self.norm1(x)))
            h, x = _add_and_norm(out, x, self.dropout1, self.norm2)
            return _add_and_norm(partial(self._feed_forward, h), x, self.dropout2, None)[1]
        h, _ = _add_and_norm(partial(self.self_attn.project_out, heads(x)), x, self.dropout1, self.norm1)
        return _add_and_norm(partial(self._feed_forward, h), h, self.dropout2, self.norm2)[0]

    def _heads(self, x: Tensor, src_mask: Tensor | None, key_padding_mask: Tensor | None, is_causal: bool) -> Tensor:
        attn = self.self_attn
        q, k, v = attn.project_in(x, x, x)
        masks = attn.masks(q, k, src_mask, key_padding_mask, is_causal)
        out = attention(q, k, v, **masks, dropout_p=attn.dropout if attn.training else 0.0)
        return attn.tokens_like(x, out)

    def _feed_forward(self, x: Tensor, residual: Tensor | None) -> Tensor:
        w_in, b_in, w_out, b_out = self.linear1.weight, self.linear1.bias, self.linear2.weight, self.linear2.bias
        name = _activation_name(self.activation)
        if name is not None and not _drops(self.dropout):
            return mlp(x, w_in, b_in, w_out, b_out, activation=name, residual=residual)
        hidden = linear(x, w_in, b_in, activation=name)
        if name is None:
            hidden = self.activation(hidden)
        return linear(self.dropout(hidden), w_out, b_out, residual=residual)

    def _one_by_one(self, x, src_mask, key_padding_mask, is_causal) -> Tensor:
        if self.norm_first:
            x = x + self._sa_block(self.norm1(x), src_mask, key_padding_mask, is_causal)
            return x + self._ff_block(self.norm2(x))
        x = self.norm1(x + self._sa_block(x, src_mask, key_padding_mask, is_causal))
        return self.norm2(x + self._ff_block(x))

    def _is_fusable(self) -> bool:
        """Whether nobody would notice that the submodules are not called."""
        if torch_module._has_any_global_hook() or self.self_attn._more_keys:
            return False
        return all(
            (type(child) in _FUSED or name == "activation") and not is_watched(child)
            for name, child in self._modules.items()
        )


def is_watched(module: torch.nn.Module) -> bool:
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def _activation_name(activation) -> str | None:
    """Its name among the activations of `linear`, or None."""
    if isinstance(activation, torch.nn.Module):
        if is_watched(activation):
            return None
        if type(activation) is torch.nn.GELU:
            return {"none": "gelu", "tanh": "gelu_tanh"}.get(activation.approximate)
        return _MODULES.get(type(activation))
    return _FUNCTIONS.get(activation)


def _drops(dropout: torch.nn.Dropout) -> bool:
    return dropout.training and dropout.p > 0


def _add_and_norm(
    branch: Callable[[Tensor | None], Tensor], residual: Tensor, dropout: torch.nn.Dropout, norm: LayerNorm | None
) -> tuple[Tensor, Tensor]:
    """norm(s) and s of s = residual + dropout(branch); branch(residual) is their sum."""
    if not _drops(dropout):
        s = branch(residual)
    elif norm is None:
        s = residual + dropout(branch(None))
    else:
        return layer_norm(dropout(branch(None)), norm.weight, norm.bias, norm.eps, residual=residual)
    return s if norm is None else norm(s), s
