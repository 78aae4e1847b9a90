"""Weights in 8 or 4 bits: rounding, packing, and the linear layer on the dequantised weight, in plain torch."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from ..linear import reference as linear

BITS = {"int8": 8, "int4": 4}
GROUP = 32  # weights along d_in that share a scale in int4; d_in is padded to a multiple of it
PANEL = 16  # rows of the weight that are stored together
LARGEST = 127  # of the integers that a row of x becomes
# What the scale of a group is tried at, as parts of the one that reaches its largest weight. Of a Gaussian weight, 17
# tries leave 5.3 % less error than one (0.0814 against 0.0860 of the root mean square), 33 another 0.2 %.
TRIES = [0.7 + 0.4 * i / 16 for i in range(17)]
# Weights at a time: what is computed of them stays in the L2 cache, and torch leaves it to the thread that asks. Where
# two threads met after every operation, beside other programs, it took 6 times the CPU time of one.
_CHUNK = 2**15


def empty(shape: tuple[int, int], bits: int, device) -> tuple[Tensor, Tensor]:
    """Memory for the packed data and scales of a weight (d_out, d_in)."""
    panels, groups = -(-shape[0] // PANEL), -(-shape[1] // GROUP)
    data = torch.empty(panels, groups, GROUP * PANEL * bits // 8, dtype=torch.uint8, device=device)
    parts, dtype = (groups, torch.bfloat16) if bits == 4 else (1, torch.float32)
    return data, torch.empty(panels, parts, PANEL, dtype=dtype, device=device)


def quantize(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Packed data and scales of a weight (d_out, d_in), as csrc/cpu/quantize_weight.h describes them."""
    d_out, d_in = weight.shape
    padded, panels = -(-d_in // GROUP) * GROUP, -(-d_out // PANEL)
    data, scales = empty(weight.shape, bits, weight.device)
    if weight.numel() == 0:
        return data.zero_(), scales.zero_()
    step = max(1, _CHUNK // max(1, padded * PANEL))
    weight, is_inference = weight.detach(), torch.is_inference_mode_enabled()

    def fill(first: int) -> None:
        with torch.inference_mode(is_inference):  # which a thread does not inherit
            part = weight[first * PANEL : (first + step) * PANEL].float()
            here = min(step, panels - first)
            block = part.new_zeros(here * PANEL, padded)
            block[: part.shape[0], :d_in] = part
            levels, scale = (_four_bits if bits == 4 else _eight_bits)(block)
            data[first : first + here] = _pack(levels, bits)
            scales[first : first + here] = scale.view(here, PANEL, -1).transpose(1, 2)

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        list(pool.map(fill, range(0, panels, step)))
    return data, scales


def _eight_bits(block: Tensor) -> tuple[Tensor, Tensor]:
    """Levels 1 .. 255 around 128, and the scale of each row."""
    scale = torch.maximum(block.amax(1, keepdim=True), -block.amin(1, keepdim=True)) / 127
    levels = (block * _inverse(scale)).round_().clamp_(-127, 127)
    return (levels + 128).to(torch.uint8), scale


def _four_bits(block: Tensor) -> tuple[Tensor, Tensor]:
    """Levels 0 .. 15 around 8, and the scale of each group of a row: of those tried, the one with the least error."""
    groups = block.view(-1, GROUP).t().contiguous()  # (32, groups): sums over the first axis run in vectors
    low, high = groups.amin(0), groups.amax(0)
    # the largest weight is put at -8, the level without a counterpart
    farthest = torch.where(-low > high, low, high) / -8
    best_error, best_scale = torch.full_like(farthest, torch.inf), torch.zeros_like(farthest)
    levels = torch.empty_like(groups)
    for part in TRIES:
        scale = (farthest * part).bfloat16().float()
        torch.mul(groups, _inverse(scale), out=levels).round_().clamp_(-8, 7)
        error = levels.mul_(scale).sub_(groups).square_().sum(0)
        better = error < best_error
        best_error, best_scale = error.where(better, best_error), scale.where(better, best_scale)
    torch.mul(groups, _inverse(best_scale), out=levels).round_().clamp_(-8, 7)
    return (levels + 8).to(torch.uint8).t().reshape(block.shape), best_scale.view(block.shape[0], -1)


def _inverse(scale: Tensor) -> Tensor:
    """1 / scale, and 1 where the scale is 0: so are all weights of such a group."""
    return 1 / scale.where(scale != 0, 1.0)


def _pack(levels: Tensor, bits: int) -> Tensor:
    """(panels * 16, d_in) levels to (panels, d_in / 32, bytes)."""
    panels, groups = levels.shape[0] // PANEL, levels.shape[1] // GROUP
    if bits == 4:
        halves = levels.view(-1, groups, 2, GROUP // 2)
        levels = halves[:, :, 0] | halves[:, :, 1] << 4
    words = levels.contiguous().view(torch.int32)  # 4 neighbours along d_in
    words = words.view(panels, PANEL, groups, GROUP // 4 * bits // 8).permute(0, 2, 3, 1)
    return words.contiguous().view(torch.uint8).view(panels, groups, GROUP * PANEL * bits // 8)


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


def rows(data: Tensor, scales: Tensor, d_in: int, bits: int, index: Tensor) -> Tensor:
    """The rows `index` (n,) of the weight, (n, d_in) in float32."""
    panel, column = index // PANEL, index % PANEL
    words = data.view(*data.shape[:2], -1, PANEL, 4)[panel, :, :, column]  # (n, groups, words, 4)
    levels = torch.cat([words & 15, words >> 4], 2).float() - 8 if bits == 4 else words.float() - 128
    scale = scales[panel, :, column].float()  # (n, groups) or (n, 1)
    return (levels.flatten(2) * scale[..., None]).flatten(1)[:, :d_in]


def rounded(x: Tensor) -> Tensor:
    """x (..., d_in) as it meets a quantised weight: each row in 8 bits, integers times a scale of its own."""
    if x.shape[-1] == 0:
        return x
    # divided once, as the kernels do: a number over a tensor is its inverse times the number, and ties would differ
    factor = x.new_full((), LARGEST) / x.abs().amax(-1, keepdim=True).clamp_min(1e-33)
    return (x * factor).round() / factor


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
    """activation(x weight^T + bias) + residual for x (rows, d_in), rounded, with the weight in float32."""
    acc = torch.promote_types(x.dtype, torch.float32)
    weight = dequantize(data, scales, d_out, x.shape[1], bits).to(acc)
    out = linear.forward(rounded(x.to(acc)), weight, bias, None if residual is None else residual.to(acc), activation)
    return out.to(x.dtype if residual is None else residual.dtype)
