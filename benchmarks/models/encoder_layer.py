"""lmkernels.nn against torch.nn: an encoder layer of BERT-base's shape, and multi-head attention alone.

torch's layer runs as a user gets it: in inference through its fast path. Inference is in the dtype named; training has
float32 parameters, and bfloat16 is autocast.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext

import torch

from benchmarks import harness
from lmkernels import nn

B, S, D, H, D_FF = 8, 128, 768, 12, 3072
DTYPES = ("float32", "bfloat16")
PADDED = torch.arange(S) >= torch.linspace(1, S, B).long()[:, None]  # (b, s), half of the batch, True is padding


def layer(dropout: float = 0.0) -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.TransformerEncoderLayer(D, H, D_FF, dropout=dropout, activation="gelu", batch_first=True)


def encoder() -> torch.nn.Module:
    return torch.nn.TransformerEncoder(layer(), 2)


def attention() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.MultiheadAttention(D, H, batch_first=True)


def self_attention(need_weights: bool) -> Callable:
    return lambda module, x: module(x, x, x, need_weights=need_weights)[0]


# name: (module, how it is called, direction)
CASES = {
    "layer": (layer, lambda module, x: module(x), "inference"),
    "layer, padding": (layer, lambda module, x: module(x, src_key_padding_mask=PADDED), "inference"),
    "encoder of 2 layers, padding": (encoder, lambda module, x: module(x, src_key_padding_mask=PADDED), "inference"),
    "layer ": (layer, lambda module, x: module(x), "training"),
    "layer, dropout 0.1": (lambda: layer(0.1), lambda module, x: module(x), "training"),
    "attention": (attention, self_attention(False), "inference"),
    "attention with weights": (attention, self_attention(True), "inference"),
    "attention ": (attention, self_attention(False), "training"),
    "attention with weights ": (attention, self_attention(True), "training"),
}


def lines() -> list[harness.Line]:
    return [line(name, dtype) for name in CASES for dtype in DTYPES]


def modules(name: str, dtype: str) -> tuple[torch.nn.Module, torch.nn.Module, torch.Tensor]:
    """Ours and torch's with the same weights, and an input."""
    make, _, direction = CASES[name]
    torchs = make().train(direction == "training")
    x = torch.randn(B, S, D)
    if direction == "inference":
        torchs, x = torchs.to(harness.DTYPES[dtype]), x.to(harness.DTYPES[dtype])
    ours = copy.deepcopy(torchs)
    nn.replace(ours, verbose=False)
    return ours, torchs, x


def runner(name: str, dtype: str, module: torch.nn.Module, x: torch.Tensor) -> Callable[[], list[torch.Tensor]]:
    """A call of the module: its result or, in training, that of the forward and the gradients."""
    _, call, direction = CASES[name]
    if direction == "inference":

        def infer():
            with torch.no_grad():
                return [call(module, x)]

        return infer
    leaves = [x.requires_grad_(), *module.parameters()]
    dout = torch.randn(x.shape)

    def train():
        with torch.autocast("cpu", torch.bfloat16) if dtype == "bfloat16" else nullcontext():
            out = call(module, x)
        return [out, *torch.autograd.grad(out, leaves, dout.to(out.dtype))]

    return train


def competitors(name: str, dtype: str) -> dict[str, Callable[[], object]]:
    ours, torchs, x = modules(name, dtype)
    return {"ours": runner(name, dtype, ours, x), "torch": runner(name, dtype, torchs, x)}


def wrong(name: str, dtype: str) -> str | None:
    """Why ours is wrong, or None; without dropout, whose numbers differ."""
    torch.manual_seed(1)
    ours, torchs, x = modules(name, dtype)
    for module in (*ours.modules(), *torchs.modules()):
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        elif isinstance(module, torch.nn.MultiheadAttention):
            module.dropout = 0.0
    results = []
    for module in (ours, torchs):
        torch.manual_seed(2)
        results.append(runner(name, dtype, module, x)())
    limit = 1e-4 if dtype == "float32" else 3e-2
    for i, (actual, expected) in enumerate(zip(*results, strict=True)):
        error = ((actual.double() - expected.double()).norm() / expected.double().norm()).item()
        if not error < limit:
            return f"result {i} differs from torch's by {error:.1e}, more than {limit}"
    return None


def line(name: str, dtype: str) -> harness.Line:
    direction = CASES[name][2]
    tokens = int((~PADDED).sum()) if name.startswith("encoder") else B * S
    products = 4 * D * D + (0 if name.startswith("attention") else 2 * D * D_FF)
    flops = 2 * tokens * (products + 2 * S * D) * (2 if name.startswith("encoder") else 1)
    return harness.Line(
        group="attention" if name.startswith("attention") else "encoder",
        case=f"{name.strip()}, b {B} s {S} d {D}",
        dtype=dtype,
        direction=direction,
        competitors=lambda: competitors(name, dtype),
        wrong=lambda: wrong(name, dtype),
        flops=flops * (3 if direction == "training" else 1),
    )
