"""replace: this package's modules in the place of torch's, in a model that exists."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from ..ops._checks import FLOATS
from .attention import MultiheadAttention
from .encoder import TransformerEncoderLayer
from .linear import Conv1D, Linear, conv1d_class
from .norm import LayerNorm, RMSNorm

_CLASSES = {ours.__base__: ours for ours in (Linear, LayerNorm, RMSNorm, MultiheadAttention, TransformerEncoderLayer)}
# MultiheadAttention reads the weights of its out_proj and never calls it
_PART_OF_ANOTHER = torch.nn.modules.linear.NonDynamicallyQuantizableLinear


@dataclass(frozen=True)
class Change:
    """One module that was exchanged, or left as it was."""

    name: str  # as in named_modules()
    before: str
    after: str | None  # None: left as it was
    reason: str = ""  # why it was left


@dataclass(frozen=True)
class Report:
    """What was exchanged and what was left; prints as a table."""

    swapped: tuple[Change, ...]
    left: tuple[Change, ...]

    def __str__(self) -> str:
        """A line for each kind of change: layers of the same name but for their numbers share it."""
        groups: dict[tuple, list[str]] = {}
        for change in (*self.swapped, *self.left):
            pattern = re.sub(r"(?<![^.])\d+(?![^.])", "*", change.name)
            what = (pattern, change.before, change.after or f"left: {change.reason}")
            groups.setdefault(what, []).append(change.name)
        rows = [("module", "from", "to", "")]
        for (pattern, before, after), names in groups.items():
            name = names[0] if len(names) == 1 else pattern
            rows.append((name or "(the model)", before, after, f"x {len(names)}" if len(names) > 1 else ""))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join([*lines, f"{len(self.swapped)} swapped, {len(self.left)} left as they were"])


def replace(model: torch.nn.Module, *, verbose: bool = True) -> Report:
    """Puts this package's modules in the place of torch's, everywhere in the model, and says what it did.

    torch.nn.Linear, LayerNorm, RMSNorm, MultiheadAttention and TransformerEncoderLayer become those of `lmkernels.nn`;
    transformers' Conv1D becomes one that computes by `lmkernels.linear`. A module stays the object that it is, with its
    parameters, buffers, hooks and mode: only its class changes, to a subclass of what it was. So optimizers, tied
    weights and checkpoints notice nothing, and `restore` undoes it.

    Subclasses of those types, of which nobody knows what their forward does, are left as they are; so are modules with
    a forward of their own, parametrized ones, and parameters of a dtype that the ops do not take.

    verbose: print the report
    """
    swapped, left = [], []
    for name, module in model.named_modules():
        ours, reason = _counterpart(module)
        if ours is not None:
            swapped.append(Change(name, _title(type(module)), f"lmkernels.nn.{ours.__name__}"))
            module.__class__ = ours
        elif reason:
            left.append(Change(name, _title(type(module)), None, reason))
    report = Report(tuple(swapped), tuple(left))
    if verbose:
        print(report)
    return report


def restore(model: torch.nn.Module, *, verbose: bool = False) -> Report:
    """Turns this package's modules in the model into the torch modules that they stand for; undoes `replace`."""
    swapped = []
    for name, module in model.named_modules():
        base = _base(type(module))
        if base is not None:
            swapped.append(Change(name, f"lmkernels.nn.{type(module).__name__}", _title(base)))
            module.__class__ = base
    report = Report(tuple(swapped), ())
    if verbose:
        print(report)
    return report


def _base(kind: type) -> type | None:
    """The class that one of ours stands for."""
    if issubclass(kind, Conv1D):
        return kind.__mro__[2]
    return kind.__base__ if kind in _CLASSES.values() else None


def _counterpart(module: torch.nn.Module) -> tuple[type | None, str]:
    """Our class for a module; or None and why it is left, "" where that goes without saying."""
    kind = type(module)
    base = next((base for base in kind.__mro__ if base in _CLASSES or _is_conv1d(base)), None)
    if base is None or kind is _PART_OF_ANOTHER or _base(kind) is not None:
        return None, ""
    if kind is not base:
        return None, _why_not(module, base)
    if "forward" in module.__dict__:
        return None, "it has a forward of its own"
    for name, parameter in module.named_parameters(recurse=False):
        if parameter.dtype not in FLOATS:
            return None, f"{name} is {parameter.dtype}"
    return conv1d_class(base) if _is_conv1d(base) else _CLASSES[base], ""


def _why_not(module: torch.nn.Module, base: type) -> str:
    if isinstance(module, torch.nn.modules.lazy.LazyModuleMixin):
        return "its parameters do not exist before the first call"
    if torch.nn.utils.parametrize.is_parametrized(module):
        return "it is parametrized"
    return f"a subclass of {_title(base)}"


def _is_conv1d(kind: type) -> bool:
    return kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"


def _title(kind: type) -> str:
    return (
        f"torch.nn.{kind.__name__}" if kind.__module__.startswith("torch.nn.") else f"{kind.__module__}.{kind.__name__}"
    )
