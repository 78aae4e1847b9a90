"""The definition of a step of decoding in plain torch: any float dtype, sums in float32, in float64 for float64."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .._checks import check_range
from ..linear.reference import ACTIVATIONS
from ..quantize_weight import QuantizedWeight
from ..quantize_weight.reference import rounded
from ..rotary import reference as rotary


def unsupported(model, caches: list[Tensor]) -> str | None:
    return None


def forward(
    token_ids: Tensor,
    position_ids: Tensor,
    starts: Tensor,
    lengths: Tensor,
    caches: list[Tensor],
    model,
    block_table: Tensor | None = None,
    sequences: Tensor | None = None,
    logits_of: Tensor | None = None,
) -> Tensor:
    """The logits (rows or logits_of, vocab); arguments as `decode_step` after its checks."""
    check_range("token_ids", token_ids, model.tokens.shape[0])
    limits = [table.shape[0] for table in (model.positions, model.cos) if table is not None]
    if limits:
        check_range("position_ids", position_ids, min(limits))
    page_size = caches[0].shape[3]
    capacity = page_size if block_table is None else page_size * block_table.shape[1]
    check_range("lengths", lengths, capacity)
    check_range("starts", starts, capacity)
    if position_ids.is_cpu and bool((starts > lengths).any()):
        raise ValueError(f"starts must not lie beyond lengths, got {starts.tolist()} and {lengths.tolist()}")
    if sequences is not None:
        check_range("sequences", sequences, caches[0].shape[1] if block_table is None else block_table.shape[0])
    if logits_of is not None:
        check_range("logits_of", logits_of, token_ids.shape[0])
    if block_table is not None:
        block_table = block_table if sequences is None else block_table[sequences]  # (rows, max_blocks)
        check_blocks(block_table, starts, lengths, caches[0])
    rows, d, h, h_kv = token_ids.shape[0], model.head_dim, model.heads, model.heads_kv
    acc = torch.promote_types(caches[0].dtype, torch.float32)
    each = torch.arange(rows, device=token_ids.device)
    own = each if sequences is None else sequences  # the row of a cache without pages

    def dense(weight) -> Tensor:
        return weight.to(acc) if isinstance(weight, Tensor) else weight.dequantize(acc)

    def linear(x: Tensor, weight, bias: Tensor | None) -> Tensor:
        if isinstance(weight, QuantizedWeight):
            x = rounded(x)
        return F.linear(x, dense(weight), None if bias is None else bias.to(acc))

    def norm(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if model.rms:
            return F.rms_norm(x, weight.shape, weight.to(acc), model.eps)
        return F.layer_norm(x, weight.shape, weight.to(acc), None if bias is None else bias.to(acc), model.eps)

    def rotated(x: Tensor) -> Tensor:
        if model.cos is None:
            return x
        return rotary.forward(x[:, None], model.cos, model.sin, position_ids[:, None], model.interleaved)[:, 0]

    def sequences(part: Tensor) -> Tensor:  # keys or values (rows, h_kv, capacity, d)
        if block_table is None:
            return part[own]
        blocks = block_table.long().clamp(0, part.shape[0] - 1)  # entries beyond a sequence's end may be anything
        return part[blocks].transpose(1, 2).flatten(2, 3)

    outer, slot = own, lengths
    if block_table is not None:
        outer, slot = block_table.long()[each, lengths // page_size], lengths % page_size
    slots = torch.arange(capacity, device=token_ids.device)
    seen = (slots >= starts[:, None]) & (slots <= lengths[:, None])  # (rows, capacity)
    x = dense(model.tokens)[token_ids]  # (rows, d_model)
    if model.positions is not None:
        x = x + model.positions.to(acc)[position_ids]
    for i, (layer, cache) in enumerate(zip(model.layers, caches, strict=True)):
        qkv = linear(norm(x, layer.norm1, layer.norm1_bias), layer.qkv, layer.qkv_bias)
        q, k, v = qkv.view(rows, h + 2 * h_kv, d).split((h, h_kv, h_kv), 1)
        cache[0, outer, :, slot] = rotated(k).to(cache.dtype)
        cache[1, outer, :, slot] = v.to(cache.dtype)
        # (rows, h, capacity, d)
        keys, values = (sequences(part).to(acc).repeat_interleave(h // h_kv, 1) for part in cache)
        # what nobody sees may never have been written, and 0 * NaN is NaN
        values = values.masked_fill(~seen[:, None, :, None], 0.0)
        scale = model.scale / (i + 1) if model.scale_by_layer else model.scale
        scores = torch.einsum("rhd,rhjd->rhj", rotated(q), keys) * scale
        weights = scores.masked_fill(~seen[:, None], -torch.inf).softmax(-1)
        attended = torch.einsum("rhj,rhjd->rhd", weights, values).flatten(1)  # (rows, h d)
        x = x + linear(attended, layer.project, layer.project_bias)
        y = norm(x, layer.norm2, layer.norm2_bias)
        up, activation = linear(y, layer.up, layer.up_bias), ACTIVATIONS[model.activation]
        if layer.gate is None:
            hidden = activation(up)
        else:
            hidden = activation(linear(y, layer.gate, layer.gate_bias)) * up
        x = x + linear(hidden, layer.down, layer.down_bias)
    if logits_of is not None:
        x = x[logits_of]
    return linear(norm(x, model.norm, model.norm_bias), model.head, None).to(torch.promote_types(acc, torch.float32))


def check_blocks(block_table: Tensor, starts: Tensor, lengths: Tensor, cache: Tensor) -> None:
    """Raises unless the pages that hold tokens, and the one that is written, are pages of the cache."""
    if not starts.is_cpu:
        return
    if bool(starts.any()):
        raise ValueError(f"starts must be 0 with a block_table, got {starts.tolist()}")
    used = torch.arange(block_table.shape[1]) <= (lengths // cache.shape[3])[:, None]
    check_range("block_table", block_table[used], cache.shape[1])
