"""Weights in 8 or 4 bits: rounding, packing, and the linear layer on the dequantised weight, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from ..linear import reference as linear

BITS = {"int8": 8, "int4": 4}
GROUP = 32  # weights along d_in that share a scale in int4; d_in is padded to a multiple of it
PANEL = 16  # rows of the weight that are stored together
# What the scale of a group is tried at, as parts of the one that reaches its largest weight. Of a Gaussian weight, 17
# tries leave 5.3 % less error than one (0.0814 against 0.0860 of the root mean square), 33 another 0.2 %.
TRIES = [0.7 + 0.4 * i / 16 for i in range(17)]
_CHUNK = 2**18  # weights at a time: what is computed of them stays in the L2 cache


def quantize(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Packed data and scales of a weight (d_out, d_in), as csrc/cpu/quantize_weight.h describes them."""
    d_out, d_in = weight.shape
    padded, panels = -(-d_in // GROUP) * GROUP, -(-d_out // PANEL)
    groups = padded // GROUP if bits == 4 else 1
    data = torch.empty(panels, padded // GROUP, 32 * PANEL * bits // 8, dtype=torch.uint8, device=weight.device)
    scales = torch.empty(
        panels, groups, PANEL, dtype=torch.bfloat16 if bits == 4 else torch.float32, device=weight.device
    )
    step = max(1, _CHUNK // max(1, padded * PANEL))
    for first in range(0, panels, step):
        part = weight[first * PANEL : (first + step) * PANEL].float()
        here = min(step, panels - first)
        block = part.new_zeros(here * PANEL, padded)
        block[: part.shape[0], :d_in] = part
        levels, scale = (_four_bits if bits == 4 else _eight_bits)(block)
        data[first : first + here] = _pack(levels, bits)
        scales[first : first + here] = scale.view(here, PANEL, groups).transpose(1, 2)
    return data, scales


def _eight_bits(block: Tensor) -> tuple[Tensor, Tensor]:
    """Levels 1 .. 255 around 128, and the scale of each row."""
    scale = block.abs().amax(1, keepdim=True) / 127 if block.shape[1] else block.new_zeros(block.shape[0], 1)
    levels = (block / scale.where(scale > 0, 1.0)).round_().clamp_(-127, 127)
    return (levels + 128).to(torch.uint8), scale


def _four_bits(block: Tensor) -> tuple[Tensor, Tensor]:
    """Levels 0 .. 15 around 8, and the scale of each group of a row: of those tried, the one with the least error."""
    groups = block.view(block.shape[0], -1, GROUP)
    # the largest weight is put at -8, the level without a counterpart
    farthest = groups.gather(2, groups.abs().argmax(2, keepdim=True)) / -8 if groups.numel() else groups[..., :1]
    best_error, best_scale = torch.full_like(farthest, torch.inf), torch.zeros_like(farthest)
    for part in TRIES:
        scale = (farthest * part).bfloat16().float()
        levels = (groups / scale.where(scale != 0, 1.0)).round_().clamp_(-8, 7)
        error = levels.mul_(scale).sub_(groups).square_().sum(2, keepdim=True)
        better = error < best_error
        best_error, best_scale = error.where(better, best_error), scale.where(better, best_scale)
    levels = (groups / best_scale.where(best_scale != 0, 1.0)).round_().clamp_(-8, 7)
    return (levels + 8).to(torch.uint8).view_as(block), best_scale[..., 0]


def _pack(levels: Tensor, bits: int) -> Tensor:
    """(panels * 16, d_in) levels to (panels, d_in / 32, bytes)."""
    # rows r and depths 32 g + 16 h + 4 i + j
    parts = levels.view(-1, PANEL, levels.shape[1] // GROUP, 2, 4, 4).permute(0, 2, 3, 4, 1, 5)  # p g h i r j
    if bits == 4:
        parts = parts[:, :, 0] | parts[:, :, 1] << 4
    return parts.reshape(*parts.shape[:2], -1)


def dequantize(data: Tensor, scales: Tensor, d_out: int, d_in: int, bits: int) -> Tensor:
    """The weight (d_out, d_in) in float32."""
    panels, groups = data.shape[:2]
    if bits == 4:
        parts = data.view(panels, groups, 1, 4, PANEL, 4)
        levels = torch.cat([parts & 15, parts >> 4], 2).float() - 8
    else:
        levels = data.view(panels, groups, 2, 4, PANEL, 4).float() - 128
    levels = levels.permute(0, 4, 1, 2, 3, 5).reshape(panels, PANEL, groups, GROUP)
    weight = levels * scales.float().transpose(1, 2)[..., None]
    return weight.reshape(panels * PANEL, groups * GROUP)[:d_out, :d_in]


def unsupported(x: Tensor) -> str | None:
    return None


def forward(
    x: Tensor,
    data: Tensor,
    scales: Tensor,
    d_out: int,
    bits: int,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str | None,
) -> Tensor:
    """activation(x weight^T + bias) + residual for x (rows, d_in), with the weight in float32."""
    acc = torch.promote_types(x.dtype, torch.float32)
    weight = dequantize(data, scales, d_out, x.shape[1], bits).to(acc)
    out = linear.forward(x.to(acc), weight, bias, None if residual is None else residual.to(acc), activation)
    return out.to(x.dtype if residual is None else residual.dtype)
