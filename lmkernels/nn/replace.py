"""replace: this package's modules in the place of torch's, in a model that exists."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..ops._checks import FLOATS
from ._stand_in import StandIn, stand_in
from .attention import MultiheadAttention
from .embedding import Embedding
from .encoder import TransformerEncoderLayer
from .linear import Conv1D, Linear
from .norm import LayerNorm, RMSNorm

_CLASSES = {
    ours.__base__: ours for ours in (Linear, LayerNorm, RMSNorm, Embedding, MultiheadAttention, TransformerEncoderLayer)
}
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

    torch.nn.Linear, LayerNorm, RMSNorm, Embedding, MultiheadAttention and TransformerEncoderLayer become those of
    `lmkernels.nn`; transformers' Conv1D becomes one that computes by `lmkernels.linear`. A module stays the object that
    it is, with its parameters, buffers, hooks and mode: only its class changes, to a subclass of what it was. So
    optimizers, tied weights and checkpoints notice nothing, and `restore` undoes it.

    Subclasses of those types, of which nobody knows what their forward does, are left as they are; so are modules with
    a forward of their own, parametrized ones, and parameters of a dtype that the ops do not take.

    verbose: print the report
    """
    return exchange(model, counterpart, verbose)


def exchange(
    model: torch.nn.Module, counterpart: Callable[[torch.nn.Module], tuple[type | None, str]], verbose: bool
) -> Report:
    """Gives every module the class that `counterpart` finds for it, or lists the reason why there is none.

    All classes are found before the first is given, and if one cannot be given all are taken back: an exception leaves
    the model as it was.
    """
    plan, left = [], []
    for name, module in model.named_modules():
        ours, reason = counterpart(module)
        if ours is not None:
            plan.append((module, ours, Change(name, title(original(type(module))), title(ours))))
        elif reason:
            left.append(Change(name, title(type(module)), None, reason))
    given = []
    try:
        for module, ours, _ in plan:
            given.append((module, type(module)))
            module.__class__ = ours
    except BaseException:
        for module, before in given:
            module.__class__ = before
        raise
    report = Report(tuple(change for *_, change in plan), tuple(left))
    if verbose:
        print(report)
    return report


def restore(model: torch.nn.Module, *, verbose: bool = False) -> Report:
    """Turns this package's modules in the model into the torch modules that they stand for; undoes `replace`."""
    swapped = []
    for name, module in model.named_modules():
        before = type(module)
        if original(before) is not before:
            swapped.append(Change(name, title(before), title(original(before))))
            module.__class__ = original(before)
    report = Report(tuple(swapped), ())
    if verbose:
        print(report)
    return report


def original(kind: type) -> type:
    """The class that one of ours stands for; any other class itself."""
    if issubclass(kind, StandIn):
        return kind.__bases__[1]
    return kind.__base__ if kind in _CLASSES.values() else kind


def counterpart(module: torch.nn.Module) -> tuple[type | None, str]:
    """Our class for a module; or None and why it is left, "" where that goes without saying."""
    kind = type(module)
    base = next((base for base in kind.__mro__ if base in _CLASSES or is_conv1d(base)), None)
    if base is None or kind is _PART_OF_ANOTHER or original(kind) is not kind:
        return None, ""
    if kind is not base:
        return None, _why_not(module, base)
    if reason := objection(module):
        return None, reason
    return stand_in(Conv1D, base) if is_conv1d(base) else _CLASSES[base], ""


def objection(module: torch.nn.Module) -> str:
    """Why no class of ours can serve a module, whatever its class; or ""."""
    if "forward" in module.__dict__:
        return "it has a forward of its own"
    for name, parameter in module.named_parameters(recurse=False):
        if parameter.dtype not in FLOATS:
            return f"{name} is {parameter.dtype}"
    return ""


def _why_not(module: torch.nn.Module, base: type) -> str:
    if isinstance(module, torch.nn.modules.lazy.LazyModuleMixin):
        return "its parameters do not exist before the first call"
    if torch.nn.utils.parametrize.is_parametrized(module):
        return "it is parametrized"
    return f"a subclass of {title(base)}"


def is_conv1d(kind: type) -> bool:
    return kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"


def title(kind: type) -> str:
    """A class's name for the report: of ours and of torch's the package alone, of a stand-in that of its forward."""
    if issubclass(kind, StandIn):
        kind = kind.__bases__[0]
    for package in ("torch.nn", "lmkernels.nn", "lmkernels.hf"):
        if kind.__module__.startswith(f"{package}."):
            return f"{package}.{kind.__name__}"
    return f"{kind.__module__}.{kind.__name__}"
