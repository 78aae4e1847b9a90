"""What every case makes its tensors with."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace

import torch
from torch import Tensor


def drawn_on_the_cpu(make: Callable) -> Callable:
    """What it makes lies on torch's default device; drawn on the CPU, the values are the same for every device."""

    @functools.wraps(make)
    def made(*arguments, **options):
        device = torch.get_default_device()
        with torch.device("cpu"):
            return moved(make(*arguments, **options), device)

    return made


def moved(x, device: torch.device):
    """x, or the tensors in its tuples, lists, dicts and dataclasses, on `device`; their strides stay, gaps and all."""
    if isinstance(x, Tensor):
        if x.device == device:
            return x
        memory = x.as_strided((x.untyped_storage().nbytes() // x.itemsize,), (1,), 0)
        return memory.to(device).as_strided(x.shape, x.stride(), x.storage_offset())
    if isinstance(x, dict):
        return {name: moved(value, device) for name, value in x.items()}
    if isinstance(x, (tuple, list)):
        return type(x)(moved(value, device) for value in x)
    if is_dataclass(x):
        return replace(x, **{field.name: moved(getattr(x, field.name), device) for field in fields(x)})
    return x
