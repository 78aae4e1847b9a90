"""MultiheadAttention."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.attention import attention
from ..ops.attention_varlen import attention_varlen
from ..ops.linear import linear
from ..ops.output_projection import output_projection
from ..ops.qkv_projection import qkv_projection
from ._nested import Packed, pack
from ._scope import is_for_torch


class MultiheadAttention(torch.nn.MultiheadAttention):
    """`torch.nn.MultiheadAttention` by `lmkernels.attention`: its arguments, masks, parameter names and results.

    Masks have torch's polarity (True hides) and go to the kernel as they are: nothing of size (b h, l, s) is made of
    smaller ones. Where this differs from torch:

    - a query that sees no key gets zeros, not NaN, and so do its weights;
    - dropout draws other numbers (from Philox, with a seed from torch's generator) where no weights are needed;
    - the hint `is_causal` is trusted wherever it can save work, with padding masks and weights too;
    - nested tensors of either layout are taken for self-attention, the jagged one with gradients.

    need_weights=True, torch's default, costs the memory and the time of the map.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Shapes as in torch: batch_first or not, or unbatched; b batch, l queries, s keys, h heads.

        query: (b, l, embed_dim), key: (b, s, kdim), value: (b, s, vdim)
        key_padding_mask: (b, s), unbatched (s,): bool, True hides the key; or float, added to its scores
        attn_mask: (l, s) or (b h, l, s): bool, True hides; or float, added to the scores, differentiable
        is_causal: says that attn_mask, which must be given, is the causal one
        Returns the output (b, l, embed_dim) and, where needed, the weights (b, l, s), or (b, h, l, s) not averaged,
        as dropout leaves them.
        """
        if query.is_nested:
            return self._nested(query, key, value, key_padding_mask, need_weights, attn_mask), None
        if is_for_torch(query, key, value, self.in_proj_weight, self.q_proj_weight, self.out_proj.weight):
            return super().forward(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        batched = query.dim() == 3
        q, k, v = self.project_in(query, key, value)
        masks = self.masks(q, k, attn_mask, key_padding_mask, is_causal)
        k, v, masks = self._with_more_keys(k, v, masks)
        dropout_p = self.dropout if self.training else 0.0
        if need_weights:
            out, weights = _with_weights(q, k, v, masks, dropout_p)
            if average_attn_weights:
                weights = weights.mean(1)
            weights = weights if batched else weights[0]
        else:
            out, weights = attention(q, k, v, **masks, dropout_p=dropout_p), None  # (b, l, h, d)
        return self.project_out(self.tokens_like(query, out)), weights

    def project_in(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (b, l, h, d), keys and values (b, s, h, d)."""
        self._check(query, key, value)
        h, d, e = self.num_heads, self.head_dim, self.embed_dim
        bias = self.in_proj_bias
        if self._qkv_same_embed_dim and query is key and key is value:
            x = query if query.dim() == 3 else query[None]
            q, k, v = qkv_projection(x, self.in_proj_weight, bias, num_heads=h)
        elif self._qkv_same_embed_dim and key is value:
            q_weight, kv_weight = self.in_proj_weight.split([e, 2 * e])
            q_bias, kv_bias = (None, None) if bias is None else bias.split([e, 2 * e])
            q = linear(query, q_weight, q_bias).unflatten(-1, (h, d))
            k, v = linear(key, kv_weight, kv_bias).unflatten(-1, (2, h, d)).unbind(-3)
        else:
            if self._qkv_same_embed_dim:
                weights = self.in_proj_weight.chunk(3)
            else:
                weights = self.q_proj_weight, self.k_proj_weight, self.v_proj_weight
            biases = (None,) * 3 if bias is None else bias.chunk(3)
            q, k, v = (
                linear(x, weight, b).unflatten(-1, (h, d))
                for x, weight, b in zip((query, key, value), weights, biases, strict=True)
            )
        if query.dim() == 2:
            return tuple(x if x.dim() == 4 else x[None] for x in (q, k, v))
        return (q, k, v) if self.batch_first else tuple(x.transpose(0, 1) for x in (q, k, v))

    def tokens_like(self, query: Tensor, out: Tensor) -> Tensor:
        """(b, l, h, d) with the tokens in query's layout."""
        if query.dim() == 2:
            return out[0]
        return out if self.batch_first else out.transpose(0, 1)

    def project_out(self, out: Tensor, residual: Tensor | None = None) -> Tensor:
        """(..., h, d) to (..., embed_dim), plus the residual."""
        return output_projection(out, self.out_proj.weight, self.out_proj.bias, residual=residual)

    def masks(
        self, q: Tensor, k: Tensor, attn_mask: Tensor | None, key_padding_mask: Tensor | None, is_causal: bool
    ) -> dict[str, Any]:
        """torch's masks as `attention` takes them: causal, mask (True = may attend) and bias."""
        b, l, h, _ = q.shape
        s = k.shape[1]
        if is_causal and attn_mask is None:
            raise ValueError("attn_mask must be given with is_causal=True, which is a hint that it is the causal mask")
        if attn_mask is not None:
            _check_mask("attn_mask", attn_mask, q, ((l, s), (b * h, l, s)))
            attn_mask = attn_mask.view(b, h, l, s) if attn_mask.dim() == 3 else attn_mask[None, None]
        if key_padding_mask is not None:
            _check_mask("key_padding_mask", key_padding_mask, q, ((b, s), (s,)) if b == 1 else ((b, s),))
            key_padding_mask = key_padding_mask.view(b, 1, 1, s)
        causal = is_causal and l == s and not self._more_keys
        if causal:
            attn_mask = None
        mask = bias = None
        for x in (attn_mask, key_padding_mask):
            if x is None:
                continue
            if x.dtype == torch.bool and mask is None:
                mask = ~x
            elif x.dtype == torch.bool:
                # a second boolean mask, that of the padding, is cheaper as a bias (b, 1, 1, s) than both in one
                hidden = torch.zeros(x.shape, dtype=q.dtype, device=x.device).masked_fill_(x, float("-inf"))
                bias = hidden if bias is None else bias + hidden
            else:
                x = x.to(torch.promote_types(q.dtype, x.dtype)) if x.dtype.itemsize < q.dtype.itemsize else x
                bias = x if bias is None else bias + x
        return {"causal": causal, "mask": mask, "bias": bias}

    @property
    def _more_keys(self) -> int:
        """How many keys are put after those of the sequence."""
        return (self.bias_k is not None) + bool(self.add_zero_attn)

    def _with_more_keys(self, k: Tensor, v: Tensor, masks: dict) -> tuple[Tensor, Tensor, dict]:
        """Keys and values with the learned one and the one of zeros after them, and masks that show both."""
        if not self._more_keys:
            return k, v, masks
        b, _, h, d = k.shape
        if self.bias_k is not None:
            k = torch.cat([k, self.bias_k.to(k.dtype).view(1, 1, h, d).expand(b, 1, h, d)], 1)
            v = torch.cat([v, self.bias_v.to(v.dtype).view(1, 1, h, d).expand(b, 1, h, d)], 1)
        if self.add_zero_attn:
            k, v = (torch.cat([x, x.new_zeros(b, 1, h, d)], 1) for x in (k, v))
        pad, mask, bias = (0, self._more_keys), masks["mask"], masks["bias"]
        if mask is not None:
            mask = F.pad(mask, pad, value=True)
        if bias is not None:
            bias = F.pad(bias, pad)
        return k, v, masks | {"mask": mask, "bias": bias}

    def _nested(self, query, key, value, key_padding_mask, need_weights, attn_mask) -> Tensor:
        if query is not key or key is not value:
            raise ValueError("key and value must be query itself where it is a nested tensor: self-attention only")
        for name, unwanted in (
            ("key_padding_mask", key_padding_mask is not None),
            ("attn_mask", attn_mask is not None),
            ("need_weights", need_weights),
        ):
            if unwanted:
                raise ValueError(f"{name} must be {False if name == 'need_weights' else None} where query is nested")
        packed = pack("query", query, tuple(self.parameters()))
        return packed.nest(self.project_out(self.packed_heads(packed.tokens, packed)))

    def packed_heads(self, tokens: Tensor, packed: Packed) -> Tensor:
        """Self-attention of packed tokens (t, embed_dim) before the last projection: (t, h, d)."""
        if not self.batch_first or not self._qkv_same_embed_dim or self._more_keys:
            raise ValueError(
                "query may be nested only with batch_first=True and without kdim, vdim, add_bias_kv and add_zero_attn"
            )
        q, k, v = qkv_projection(tokens[None], self.in_proj_weight, self.in_proj_bias, num_heads=self.num_heads)
        bounds, longest = packed.cu_seqlens, packed.max_seqlen
        dropout_p = self.dropout if self.training else 0.0
        return attention_varlen(q[0], k[0], v[0], bounds, bounds, longest, longest, dropout_p=dropout_p)

    def _check(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        axes = query.dim()
        if axes not in (2, 3):
            raise ValueError(f"query must have 3 axes, or 2 for one sequence, got {tuple(query.shape)}")
        for name, x, width in (
            ("query", query, self.embed_dim),
            ("key", key, self.kdim),
            ("value", value, self.vdim),
        ):
            if x.dim() != axes or x.shape[-1] != width:
                raise ValueError(f"{name} must have {axes} axes, the last of size {width}, got {tuple(x.shape)}")
        if key.shape[:-1] != value.shape[:-1]:
            raise ValueError(f"value must have key's leading axes {tuple(key.shape[:-1])}, got {tuple(value.shape)}")
        batch = 0 if self.batch_first else 1
        if axes == 3 and query.shape[batch] != key.shape[batch]:
            raise ValueError(f"key must have query's batch size {query.shape[batch]}, got {tuple(key.shape)}")


def _with_weights(q: Tensor, k: Tensor, v: Tensor, masks: dict[str, Any], dropout_p: float) -> tuple[Tensor, Tensor]:
    """Attention (b, l, h, d) and its weights (b, h, l, s).

    The kernel gives the softmax's denominators as well, which leaves one product and one exponential to the weights.
    Where some are dropped, it is these that meet the values: to draw the kernel's numbers again would take longer.
    """
    if dropout_p > 0:
        scores = _scores(q, k, **masks)
        seen = scores.amax(-1, keepdim=True) > float("-inf")
        weights = torch.softmax(scores.masked_fill(~seen, 0.0), -1).masked_fill(~seen, 0.0)
        weights = F.dropout(weights, dropout_p).to(q.dtype)
        return (weights @ v.transpose(1, 2)).transpose(1, 2), weights
    out, lse = attention(q, k, v, **masks, return_lse=True)
    lse = lse.masked_fill(lse == float("-inf"), float("inf"))  # a query that sees no key has weights of 0
    return out, _scores(q, k, **masks).sub_(lse[..., None]).exp_().to(q.dtype)


def _scores(q: Tensor, k: Tensor, *, causal: bool, mask: Tensor | None, bias: Tensor | None) -> Tensor:
    """(b, h, l, s) in float32 (float64 for float64), -inf where a key is hidden."""
    scores = (q * q.shape[-1] ** -0.5).transpose(1, 2) @ k.permute(0, 2, 3, 1)
    scores = scores.to(torch.promote_types(q.dtype, torch.float32))
    if bias is not None:
        scores = scores.add_(bias)
    if mask is not None:
        scores = scores.masked_fill_(~mask, float("-inf"))
    if causal:
        future = torch.ones(scores.shape[2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill_(future, float("-inf"))
    return scores


def _check_mask(name: str, mask: Tensor, q: Tensor, shapes: tuple[tuple[int, ...], ...]) -> None:
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise TypeError(f"{name} must be bool (True hides) or floating (added to the scores), got {mask.dtype}")
    if tuple(mask.shape) not in shapes:
        raise ValueError(f"{name} must be {' or '.join(map(str, shapes))}, got {tuple(mask.shape)}")
    if mask.device != q.device:
        raise ValueError(f"{name} must be on query's device {q.device}, got {mask.device}")
