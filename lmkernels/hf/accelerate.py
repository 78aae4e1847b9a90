"""accelerate: lmkernels' ops in the place of the hot modules of a model of transformers."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator

import torch

from ..nn._stand_in import StandIn, stand_in
from ..nn.replace import Change, Report, counterpart, exchange, objection, original
from ..nn.replace import restore as restore_modules
from ._transformers import require_transformers
from .accelerate_logits import LMHead
from .accelerate_modules import FORWARDS


def accelerate(model: torch.nn.Module, *, attention: bool = True, verbose: bool = True) -> Report:
    """Makes a model of transformers compute by lmkernels' ops, in place, and says what it changed and what it left.

        model = AutoModelForCausalLM.from_pretrained(path)
        lmkernels.hf.accelerate(model)                  # then train, generate, save as ever
        lmkernels.hf.restore(model)                     # as it was

    Changed are torch's Linear, LayerNorm, RMSNorm, Embedding and Dropout, transformers' Conv1D and RMS norms, MLPs and
    SwiGLUs as one op each, BERT's embeddings, the norms after its sums, and the attention (`register`). In training the
    head of a language model gives logits that are computed only if somebody reads them: cross entropy does without.

    A module stays the object that it is, with its parameters, names, hooks and mode; only its class changes, to a
    subclass of what it was, of the same name. So state_dict, save_pretrained, Trainer, peft, pipeline, optimizers,
    checkpointing, copy and pickle find what they know. Blocks are recognised by their parts, and taken only if both
    forwards give the same for random numbers; where peft or a hook later gets between a block and its parts, the
    block's own forward runs.

    model: a PreTrainedModel, or a module that holds some, as peft's models do
    attention: also attn_implementation="lmkernels"
    verbose: print the report

    Returns the report; a second call changes nothing more. An exception leaves the model as it was. Raises TypeError
    for a module without a model of transformers, ImportError without transformers.
    """
    models = _pretrained(model)
    if not models:
        raise TypeError(f"model must be or hold a transformers.PreTrainedModel, got {type(model).__name__}")
    heads = [m.get_output_embeddings() for m in models.values()]
    heads = {id(head) for head in heads if head is not None}
    with _attention(models, attention) as (switched, kept):
        modules = exchange(model, lambda module: _counterpart(module, heads), verbose=False)
    report = Report((*modules.swapped, *switched), (*modules.left, *kept))
    if verbose:
        print(report)
    return report


def restore(model: torch.nn.Module, *, verbose: bool = False) -> Report:
    """Undoes `accelerate`, and `lmkernels.nn.replace`: every module has its class again, the attention its name."""
    switched = []
    for name, pretrained in _pretrained(model).items():
        before = pretrained.__dict__.pop(_BEFORE, None)
        if before is not None:
            switched.append(Change(name, "attention: lmkernels", f"attention: {before}"))
            pretrained.config._attn_implementation_internal = before
    report = Report((*restore_modules(model).swapped, *switched), ())
    if verbose:
        print(report)
    return report


# the attribute of a model that remembers its attention
_BEFORE = "_lmkernels_attention_before"


def _pretrained(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """The models of transformers in a module, the module itself among them, by name."""
    kind = require_transformers().PreTrainedModel
    return {name: module for name, module in model.named_modules() if isinstance(module, kind)}


@contextlib.contextmanager
def _attention(models: dict[str, torch.nn.Module], wanted: bool) -> Iterator[tuple[list[Change], list[Change]]]:
    """Switches the attention of every model that can be switched; an exception, here or later, switches it back."""
    switched, kept = [], []
    before = {name: model.config._attn_implementation for name, model in models.items()}
    if not wanted:
        yield switched, kept
        return
    from . import register

    register()
    try:
        seen = set()
        for name, model in models.items():
            if before[name] == "lmkernels" or id(model.config) in seen:
                continue
            if model._can_set_attn_implementation():
                # of this model alone: those inside have their turn
                model.config._attn_implementation_internal = "lmkernels"
                setattr(model, _BEFORE, before[name])
                switched.append(Change(name, f"attention: {before[name]}", "attention: lmkernels"))
            else:
                reason = "it does not choose its attention by name"
                kept.append(Change(name, f"attention: {before[name]}", None, reason))
            seen.add(id(model.config))
        yield switched, kept
    except BaseException:
        for change in switched:
            models[change.name].config._attn_implementation_internal = models[change.name].__dict__.pop(_BEFORE)
        raise


def _counterpart(module: torch.nn.Module, heads: set[int]) -> tuple[type | None, str]:
    """Our class for a module; or None and why it is left, "" where that goes without saying."""
    if isinstance(module, StandIn):
        return None, ""
    kind = original(type(module))
    if id(module) in heads and kind is torch.nn.Linear:
        reason = objection(module)
        return (None, reason) if reason else (stand_in(LMHead, kind), "")
    for forward in FORWARDS:
        facts = forward.read(module)
        if facts is not None:
            reason = objection(module) or (facts if isinstance(facts, str) else "")
            ours = None if reason else stand_in(forward, kind, facts)
            reason = reason or _difference(module, ours)
            return (None, reason) if reason else (ours, "")
    return counterpart(module)


def _difference(module: torch.nn.Module, ours: type) -> str:
    """Why `ours` does not compute what the module does, or "": both are tried on a few random numbers."""
    if not hasattr(ours, "example"):
        return ""
    if any(parameter.is_meta for parameter in module.parameters()):
        return "without numbers, on the meta device, nobody can tell what it computes"
    with _evaluating(module), torch.enable_grad():
        twin = copy.copy(module)
        twin.__class__ = ours
        inputs = ours.example(twin, torch.Generator().manual_seed(0))
        method = getattr(ours, "method", "forward")
        try:
            theirs, found = (getattr(either, method)(*inputs) for either in (module, twin))
        except (TypeError, ValueError, RuntimeError, AttributeError, NotImplementedError) as error:
            return f"its {method} cannot be tried: {error}"
    if isinstance(theirs, tuple) and isinstance(found, tuple):
        theirs, found = theirs[0], found[0]  # the second are the attention's weights
    if not isinstance(theirs, torch.Tensor) or (theirs.shape, theirs.dtype) != (found.shape, found.dtype):
        return f"its {method} gives something else"
    theirs, found = theirs.detach(), found.detach()
    limit = 1e-5 if theirs.dtype in (torch.float32, torch.float64) else 2e-2
    error = (found.double() - theirs.double()).norm()
    if not error <= limit * theirs.double().norm():
        return f"its {method} computes something else"
    return ""


@contextlib.contextmanager
def _evaluating(module: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode without autocast, and every mode as it was afterwards."""
    modes = [(part, part.training) for part in module.modules()]
    with contextlib.ExitStack() as stack:
        for device in ("cpu", "cuda"):
            stack.enter_context(torch.autocast(device, enabled=False))
        for part, _ in modes:
            part.training = False
        try:
            yield
        finally:
            for part, mode in modes:
                part.training = mode
