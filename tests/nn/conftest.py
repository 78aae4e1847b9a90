from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch


def twins(make: Callable[[], torch.nn.Module], kind: type) -> tuple[torch.nn.Module, torch.nn.Module]:
    """A module of torch's with every parameter random, the zeros of biases too, and ours with the same state dict."""
    torchs = make()
    with torch.no_grad():
        for parameter in torchs.parameters():
            parameter.uniform_(-0.3, 0.3)
    ours = copy.deepcopy(torchs)
    for module in ours.modules():
        if type(module) is kind.__base__:
            module.__class__ = kind
    return torchs, ours


def results(module, inputs, *arguments, **options) -> dict[str, torch.Tensor]:
    """The module's tensors and, where it is differentiable, the gradients of inputs and parameters."""
    leaves = [x.detach().clone().requires_grad_() if x.is_floating_point() else x for x in inputs]
    found = module(*leaves, *arguments, **options)
    outs = [x for x in (found if isinstance(found, tuple) else (found,)) if x is not None]
    module.zero_grad()
    generator = torch.Generator().manual_seed(1)
    loss = sum((x.float() * torch.randn(x.shape, generator=generator)).sum() for x in outs)
    loss.backward()
    named = {f"out{i}": x.detach() for i, x in enumerate(outs)}
    named |= {f"d{i}": x.grad for i, x in enumerate(leaves) if x.grad is not None}
    return named | {f"d{name}": p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def assert_same(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], dtype=torch.float32) -> None:
    """All by name, to the rounding of `dtype`: relative to the largest element of each."""
    assert actual.keys() == expected.keys()
    limit = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 5e-3}[dtype]
    for name, x in expected.items():
        assert actual[name].dtype == x.dtype and actual[name].shape == x.shape, name
        scale = max(x.abs().max().item(), 1e-3) if x.numel() else 1.0
        torch.testing.assert_close(
            actual[name], x, rtol=0, atol=limit * scale, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.fixture(autouse=True)
def torchs_own_path():
    """torch's fast path in eval replaces NaN and, of GELU, the approximation: what is compared is its definition."""
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(True)
