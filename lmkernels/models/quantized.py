"""Models whose weights have 8 or 4 bits, for inference."""

import torch
from torch import nn

from ..ops.embed import embed
from ..ops.linear import linear
from ..ops.quantize_weight import QuantizedWeight, quantize_weight

KINDS = ("int8", "int4")
# of the packed tensors in a file: a file of another layout must be made anew
LAYOUT = 1
# of a weight in a state_dict, after its name
PARTS = (".data", ".scales")


class Quantized(nn.Module):
    """A module whose weight is a QuantizedWeight: `quantized_weight`, under torch's name `weight` too.

    A state_dict has it as `weight.data` and `weight.scales`. Conversions to another dtype leave it alone.
    """

    def __init__(self, weight: QuantizedWeight):
        super().__init__()
        self.quantized_weight = weight

    @property
    def weight(self) -> QuantizedWeight:
        return self.quantized_weight

    @weight.setter
    def weight(self, weight: QuantizedWeight) -> None:
        self.quantized_weight = weight

    def set_tensors(self, data: torch.Tensor, scales: torch.Tensor) -> None:
        """Takes the tensors as they are, without a copy, here and wherever the weight is shared."""
        checked = QuantizedWeight(data, scales, self.weight.shape, self.weight.dtype_name)
        self.weight.data, self.weight.scales = checked.data, checked.scales

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        data, scales = fn(self.weight.data), self.weight.scales
        if data.device != self.weight.device:
            self.set_tensors(
                data, torch.empty_like(scales, device=data.device) if scales.is_meta else scales.to(data.device)
            )
        return self

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for part, tensor in zip(PARTS, (self.weight.data, self.weight.scales)):
            destination[f"{prefix}weight{part}"] = tensor

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, unexpected, errors):
        names = [f"{prefix}weight{part}" for part in PARTS]
        rest = {name: tensor for name, tensor in state_dict.items() if name not in names}
        super()._load_from_state_dict(rest, prefix, metadata, strict, missing, unexpected, errors)
        if lost := [name for name in names if name not in state_dict]:
            missing += lost
        else:
            self.set_tensors(*(state_dict[name].to(self.weight.device).clone() for name in names))

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, {self.weight.dtype_name}"


class QuantizedLinear(Quantized):
    """x weight^T + bias for x (..., d_in), in the place of a linear layer; weight (d_out, d_in) quantised."""

    def __init__(self, weight: QuantizedWeight, bias: nn.Parameter | None):
        super().__init__(weight)
        self.register_parameter("bias", bias)

    def parameters_of_linear(self):
        return self.weight, self.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.weight, self.bias)


class QuantizedEmbedding(Quantized):
    """Rows of a quantised table (vocab, d), for a head that shares it."""

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        return embed(token_ids, self.weight)


def check_kind(quantize: str | None) -> None:
    if quantize is not None and quantize not in KINDS:
        raise ValueError(f"quantize must be one of {', '.join(map(repr, KINDS))} or None, got {quantize!r}")


def quantize(model, kind: str) -> None:
    """Puts quantised layers into the place of every linear layer of a PretrainedModel, and of an embedding that shares
    its weight with one. What is left is frozen.

    A model without memory, on the device "meta", gets layers without memory.
    """
    tied = {
        name.removesuffix(".weight"): source.removesuffix(".weight")
        for name, source in model.tied_weights.items()
        if name.endswith(".weight")
    }
    linears = [name for name, module in model.named_modules() if weight_and_bias(module) is not None]
    for name in {tied[name] for name in linears if name in tied}:
        model.set_submodule(name, QuantizedEmbedding(packed(model.get_submodule(name).weight, kind)))
    for name in linears:
        weight, bias = weight_and_bias(model.get_submodule(name))
        weight = model.get_submodule(tied[name]).weight if name in tied else packed(weight, kind)
        model.set_submodule(name, QuantizedLinear(weight, bias))
    model.tie_weights()
    model.quantization = kind
    model.requires_grad_(False)


def weight_and_bias(module: nn.Module) -> tuple[torch.Tensor, torch.Tensor | None] | None:
    """weight (d_out, d_in) and bias of a linear layer; None of any other module."""
    if isinstance(module, nn.Linear):
        return module.weight, module.bias
    return module.parameters_of_linear() if hasattr(module, "parameters_of_linear") else None


def weights(model: nn.Module) -> list[QuantizedWeight]:
    """The quantised weights of a model, shared ones once."""
    found = (module.weight for module in model.modules() if isinstance(module, Quantized))
    return list({id(weight.data): weight for weight in found}.values())


def map_weights(model, tensors, sources: dict[str, str]) -> None:
    """Gives the quantised modules of a model their tensors, which stay where they are mapped."""
    for name, module in model.named_modules():
        parts = [sources.get(f"{name}.weight{part}") for part in PARTS]
        if isinstance(module, Quantized) and None not in parts:
            try:
                module.set_tensors(*(tensors[part] for part in parts))
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None


def packed(weight: torch.Tensor, kind: str) -> QuantizedWeight:
    if not weight.is_meta:
        return quantize_weight(weight.detach(), kind)
    return QuantizedWeight.empty(weight.shape, kind, device="meta")


def entry(model) -> dict:
    """What config.json says about the quantised weights beside it."""
    return {} if model.quantization is None else {"quantization": {"dtype": model.quantization, "layout": LAYOUT}}


def kind_of(entries: dict, quantize: str | None) -> str | None:
    """The bits that a checkpoint's weights already have, by the entries of its config.json."""
    if (found := entries.get("quantization")) is None:
        return None
    if not isinstance(found, dict) or found.get("dtype") not in KINDS or found.get("layout") != LAYOUT:
        raise ValueError(
            f"the checkpoint's quantization must be one of {', '.join(map(repr, KINDS))} in layout {LAYOUT}, got "
            f"{found!r}: quantise the original again"
        )
    if quantize not in (None, found["dtype"]):
        raise ValueError(
            f"quantize must be None or {found['dtype']!r}, which the checkpoint's weights already are, got {quantize!r}"
        )
    return found["dtype"]
