"""Tables of cosines and sines for rotary position embedding, for every way of stretching the context."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from .._checks import check_finite


def rotary_tables(
    seq_len: int, dim: int, *, base: float = 10000.0, scaling: Mapping | None = None, device=None
) -> tuple[Tensor, Tensor]:
    """cos and sin of position * frequency, each (seq_len, dim // 2) float32: what `rotary` takes.

    dim: even, the number of columns that are rotated
    base: frequency i is base ** (-2 i / dim)
    scaling: None, or a mapping like the `rope_parameters` (formerly `rope_scaling`) of a Hugging Face configuration.
        Its "rope_type" (formerly "type") says which other keys are read; `rope_theta` overrides base.
        "default": none
        "linear": factor; positions are divided by it (Chen et al. 2023, arXiv:2306.15595)
        "ntk": factor; base is multiplied by factor ** (dim / (dim - 2)), whatever the length
        "dynamic": factor, original_max_position_embeddings; as ntk, and more with the length, where seq_len is longer
            than the original
        "yarn": factor, original_max_position_embeddings; optional attention_factor, mscale and mscale_all_dim,
            beta_fast (32), beta_slow (1), truncate (True) (Peng et al. 2023, arXiv:2309.00071)
        "llama3": factor, low_freq_factor, high_freq_factor, original_max_position_embeddings
        "longrope": long_factor and short_factor (dim // 2 numbers each), original_max_position_embeddings, factor or
            attention_factor; the long factors are used where seq_len is longer than the original
            (Ding et al. 2024, arXiv:2402.13753)
        Where the original model length is optional there, max_position_embeddings is read: for dynamic and longrope in
        place of original_max_position_embeddings, and for yarn and longrope over the original in place of a factor.

    Of yarn and longrope cos and sin are multiplied by the attention factor. Frequencies and angles are rounded to
    float32 where transformers rounds them, so that a checkpoint sees the tables that it was trained with; at positions
    beyond 10,000 or so a more exact angle would be a different one.
    """
    if not isinstance(seq_len, (int, torch.SymInt)) or seq_len < 0:
        raise ValueError(f"seq_len must be an integer >= 0, got {seq_len!r}")
    if not isinstance(dim, (int, torch.SymInt)) or dim < 0 or dim % 2:
        raise ValueError(f"dim must be an even integer >= 0, got {dim!r}")
    scaling = {} if scaling is None else scaling
    if not isinstance(scaling, Mapping):
        raise TypeError(f"scaling must be a mapping or None, got {type(scaling).__name__}")
    rope_type = scaling.get("rope_type", scaling.get("type", "default"))
    if rope_type not in _FREQUENCIES:
        raise ValueError(f"scaling['rope_type'] must be one of {', '.join(_FREQUENCIES)}, got {rope_type!r}")
    base = check_finite("base", scaling.get("rope_theta") or base)
    if base <= 0:
        raise ValueError(f"base must be above 0, got {base}")
    frequencies, factor = _FREQUENCIES[rope_type](seq_len, dim, base, _Keys(rope_type, scaling), device)
    angles = torch.arange(seq_len, dtype=torch.float32, device=device)[:, None] * frequencies
    return angles.cos() * factor, angles.sin() * factor


class _Keys:
    """The entries of `scaling`, with errors that name them."""

    def __init__(self, rope_type: str, scaling: Mapping):
        self.rope_type, self.scaling = rope_type, scaling

    def optional(self, key: str, default: float | None = None) -> float | None:
        value = self.scaling.get(key)
        return default if value is None else check_finite(f"scaling[{key!r}]", value)

    def number(self, key: str, *stand_ins: str) -> float:
        """A positive number under `key`, or under the first of the stand-ins that is there."""
        for name in (key, *stand_ins):
            value = self.optional(name)
            if value is not None:
                if value <= 0:
                    raise ValueError(f"scaling[{name!r}] must be above 0, got {value}")
                return value
        raise ValueError(f"scaling of type {self.rope_type!r} must have {' or '.join(map(repr, (key, *stand_ins)))}")

    def factor(self, original: float) -> float:
        """How many times the original length the context is."""
        if self.optional("factor") is None and self.optional("max_position_embeddings") is not None:
            return self.number("max_position_embeddings") / original
        return self.number("factor")

    def list_of(self, key: str, n: int, device) -> Tensor:
        if key not in self.scaling:
            raise ValueError(f"scaling of type {self.rope_type!r} must have {key!r}")
        values = torch.as_tensor(self.scaling[key], dtype=torch.float32, device=device)
        if tuple(values.shape) != (n,):
            raise ValueError(f"scaling[{key!r}] must hold dim // 2 = {n} numbers, got {tuple(values.shape)}")
        return values


def _powers(dim: int, base: float, device) -> Tensor:
    """base ** (2 i / dim), (dim // 2,) float32."""
    return base ** (torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim)


def _default(seq_len, dim, base, keys, device):
    return 1.0 / _powers(dim, base, device), 1.0


def _linear(seq_len, dim, base, keys, device):
    return 1.0 / _powers(dim, base, device) / keys.number("factor"), 1.0


def _stretched_base(base: float, factor: float, dim: int) -> float:
    """The base for which the last frequency is `factor` times lower, and the first stays 1."""
    return base * factor ** (dim / (dim - 2)) if dim > 2 else base


def _ntk(seq_len, dim, base, keys, device):
    return 1.0 / _powers(dim, _stretched_base(base, keys.number("factor"), dim), device), 1.0


def _dynamic(seq_len, dim, base, keys, device):
    factor = keys.number("factor")
    original = keys.number("original_max_position_embeddings", "max_position_embeddings")
    stretch = factor * max(seq_len, original) / original - (factor - 1)
    return 1.0 / _powers(dim, _stretched_base(base, stretch, dim), device), 1.0


def _yarn(seq_len, dim, base, keys, device):
    original = keys.number("original_max_position_embeddings")
    factor = keys.factor(original)
    attention_factor = keys.optional("attention_factor")
    if attention_factor is None:
        mscale, mscale_all_dim = keys.optional("mscale"), keys.optional("mscale_all_dim")
        if mscale and mscale_all_dim:
            attention_factor = _yarn_mscale(factor, mscale) / _yarn_mscale(factor, mscale_all_dim)
        else:
            attention_factor = _yarn_mscale(factor, 1.0)

    def column(rotations: float) -> float:
        """The column whose angle makes so many turns over the original length."""
        return dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(base))

    low, high = column(keys.optional("beta_fast") or 32), column(keys.optional("beta_slow") or 1)
    if keys.scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001  # the ramp needs a slope
    ramp = ((torch.arange(dim // 2, dtype=torch.float32, device=device) - low) / (high - low)).clamp(0, 1)
    powers = _powers(dim, base, device)
    extrapolated = 1 - ramp
    return 1.0 / (factor * powers) * (1 - extrapolated) + 1.0 / powers * extrapolated, attention_factor


def _yarn_mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _llama3(seq_len, dim, base, keys, device):
    factor, original = keys.number("factor"), keys.number("original_max_position_embeddings")
    low, high = keys.number("low_freq_factor"), keys.number("high_freq_factor")
    if low == high:
        raise ValueError(f"scaling['low_freq_factor'] and scaling['high_freq_factor'] must differ, got {low} twice")
    frequencies = 1.0 / _powers(dim, base, device)
    wavelengths = 2 * math.pi / frequencies
    smooth = (original / wavelengths - low) / (high - low)
    between = (1 - smooth) * frequencies / factor + smooth * frequencies
    scaled = torch.where(wavelengths > original / low, frequencies / factor, between)
    return torch.where(wavelengths < original / high, frequencies, scaled), 1.0


def _longrope(seq_len, dim, base, keys, device):
    long, short = (keys.list_of(key, dim // 2, device) for key in ("long_factor", "short_factor"))
    original = keys.number("original_max_position_embeddings", "max_position_embeddings")
    attention_factor = keys.optional("attention_factor")
    if attention_factor is None:
        factor = keys.factor(original)
        attention_factor = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    return 1.0 / ((long if seq_len > original else short) * _powers(dim, base, device)), attention_factor


_FREQUENCIES: dict[str, Callable] = {
    "default": _default,
    "linear": _linear,
    "ntk": _ntk,
    "dynamic": _dynamic,
    "yarn": _yarn,
    "llama3": _llama3,
    "longrope": _longrope,
}
