"""The layers of an encoder, for inference: the function that models call."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _dispatch
from .._autograd import needs_gradient
from .._checks import check_finite, check_indices, check_parameter
from ..linear.checks import check_activation, check_bias, check_weight, check_x
from ..quantize_weight import QuantizedWeight
from . import native, reference
from .reference import PER_LAYER, pairs

BACKENDS = {"native": native, "reference": reference}
_NAMES = ("query", "key", "value", "output", "norm1", "up", "down", "norm2")


def encoder_layers(
    x: Tensor,
    parameters: Sequence[Tensor | QuantizedWeight],
    heads: int,
    *,
    activation: str | None = "gelu",
    eps: float = 1e-12,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int = 0,
    backend: str | None = None,
) -> Tensor:
    """Hidden states after layers of a BERT: attention without a mask and an MLP, each added and then normalised.

        x = norm1(x + output(attention(query(x), key(x), value(x))))
        x = norm2(x + down(activation(up(x))))

    x: (b, s, d_model), or (t, d_model) of sequences that lie end to end; float32, bfloat16, float16 or float64
    parameters: of each layer weight and bias of query, key, value, output (d_model, d_model), norm1 (d_model,), up
        (d_ff, d_model), down (d_model, d_ff) and norm2, 16 in all, one layer after the other; as `linear` and
        `layer_norm` take them, so the weights of products may come from `quantize_weight`.
    heads: of the attention; d_model is a multiple of it.
    activation, eps: as in `linear` and `layer_norm`.
    cu_seqlens, max_seqlen: as in `attention_varlen`, for a packed x.
    backend: "native" or "reference"; None takes the first that can run this.

    The bits are those of the ops called one by one, but for 33 to 64 tokens on AVX2 and AVX-512, where weights are read
    as they lie. It is for inference and has no gradient: in a small batch Python takes longer to call the ops than they
    compute.

    Returns x's shape and dtype. Raises ValueError or TypeError for bad arguments, NotImplementedError when `backend`
    cannot run them.

    Devlin et al. 2019, arXiv:1810.04805.
    """
    check_x(x)
    if x.dim() != (3 if cu_seqlens is None else 2):
        wanted = "(b, s, d_model)" if cu_seqlens is None else "(t, d_model) with cu_seqlens"
        raise ValueError(f"x must be {wanted}, got {tuple(x.shape)}")
    d_model = x.shape[-1]
    if not isinstance(heads, int) or heads < 1 or d_model % heads or d_model == 0:
        raise ValueError(f"heads must divide d_model = {d_model}, got {heads!r}")
    check_activation(activation)
    if check_finite("eps", eps) < 0:
        raise ValueError(f"eps must be at least 0, got {eps}")
    if cu_seqlens is not None:
        check_indices("cu_seqlens", cu_seqlens, ((cu_seqlens.numel(),),), "x", x)
        cu_seqlens = cu_seqlens.to(torch.int32).contiguous()
    if len(parameters) % PER_LAYER:
        raise ValueError(f"parameters must be {PER_LAYER} for each layer, got {len(parameters)}")
    if torch.is_grad_enabled() and needs_gradient(x, *(p for p in parameters if isinstance(p, Tensor))):
        raise ValueError("encoder_layers has no gradient: call it under torch.no_grad() or torch.inference_mode()")
    module = _dispatch.choose("encoder_layers", BACKENDS, backend, x, parameters, heads)
    if module is reference:
        _check_parameters(parameters, x)
    if not parameters:
        return x
    try:
        return module.forward(x, parameters, cu_seqlens, max_seqlen, heads, activation, eps)
    except (RuntimeError, TypeError):
        _check_parameters(parameters, x)  # names the one that does not fit; to look at all each time takes too long
        raise


def _check_parameters(parameters: Sequence, x: Tensor) -> None:
    for i, (weight, bias) in enumerate(pairs(parameters)):
        _check_pair(f"{_NAMES[i % len(_NAMES)]} of layer {i // len(_NAMES)}", weight, bias, x)


def _check_pair(name: str, weight, bias, x: Tensor) -> None:
    d_model = x.shape[-1]
    if name.startswith("norm"):
        check_parameter(f"weight of {name}", weight, (d_model,), "x", x)
        check_parameter(f"bias of {name}", bias, (d_model,), "x", x)
        return
    d_in, d_out = (None if name.startswith(part) else d_model for part in ("down", "up"))
    shape = tuple(weight.shape) if isinstance(weight, QuantizedWeight) else None
    if shape is None:
        check_weight(f"weight of {name}", weight, x, weight.shape[-1] if d_in is None else d_in, d_out)
        shape = tuple(weight.shape)
    elif shape != (d_out or shape[0], d_in or shape[1]):
        raise ValueError(f"weight of {name} must be ({d_out or 'd_ff'}, {d_in or 'd_ff'}), got {shape}")
    if check_bias(f"bias of {name}", bias, x, shape[0]) is None:
        raise TypeError(f"bias of {name} must be a torch.Tensor, got None")
