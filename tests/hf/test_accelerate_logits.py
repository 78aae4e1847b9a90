"""Logits that are known by their factors: whoever does what with them gets what the numbers would give."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

from lmkernels.hf.accelerate_logits import LMHead, Logits
from lmkernels.nn._stand_in import stand_in

B, S, D, VOCAB = 2, 5, 8, 33


@pytest.fixture
def heads():
    torch.manual_seed(0)
    plain = torch.nn.Linear(D, VOCAB).train()
    ours = copy.deepcopy(plain)
    ours.__class__ = stand_in(LMHead, torch.nn.Linear)
    return ours, plain


LABELS = torch.arange(B * S).view(B, S) * 3 % VOCAB
IGNORING = LABELS.masked_fill(LABELS % 2 == 0, -100)
ONES = torch.ones(1, VOCAB)

# what is done with logits, and whether it needs their numbers
USES = {
    "cross entropy": (lambda y: F.cross_entropy(y.view(-1, VOCAB), LABELS.view(-1)), False),
    "in float": (lambda y: F.cross_entropy(y.float().view(B * S, -1), IGNORING.view(-1)), False),
    "summed": (lambda y: F.cross_entropy(y.reshape((-1, VOCAB)), LABELS.view(-1), reduction="sum"), False),
    "of tokens": (lambda y: F.cross_entropy(y.flatten(0, 1), LABELS.flatten(), reduction="none").square().sum(), True),
    "of tokens viewed": (lambda y: F.cross_entropy(y.view(-1, VOCAB), LABELS.view(-1), reduction="none")[3], False),
    "module": (
        lambda y: torch.nn.CrossEntropyLoss(ignore_index=6, label_smoothing=0.1)(
            y.view(-1, y.size(-1)), LABELS.view(-1)
        ),
        False,
    ),
    "shifted": (
        lambda y: F.cross_entropy(y[..., :-1, :].contiguous().view(-1, VOCAB), LABELS[:, 1:].reshape(-1)),
        False,
    ),
    "shifted otherwise": (lambda y: F.cross_entropy(y[:, :-1].reshape(-1, VOCAB), LABELS[:, 1:].reshape(-1)), False),
    "one row": (lambda y: F.cross_entropy(y[1], LABELS[1]), False),
    "constant bias": (lambda y: F.cross_entropy((y + ONES).view(-1, VOCAB), LABELS.view(-1)), True),
    "float64": (lambda y: F.cross_entropy(y.to(torch.float64).view(-1, VOCAB), LABELS.view(-1)), True),
    "classes second": (lambda y: F.cross_entropy(y.transpose(1, 2), LABELS), True),
    "weights": (lambda y: F.cross_entropy(y.view(-1, VOCAB), LABELS.view(-1), weight=torch.arange(33.0)), True),
    "soft labels": (lambda y: F.cross_entropy(y.view(-1, VOCAB), torch.full((B * S, VOCAB), 1 / VOCAB)), True),
    "soft cap": (lambda y: F.cross_entropy(((y / 5).tanh() * 5).view(-1, VOCAB), LABELS.view(-1)), True),
    "some classes": (lambda y: y[..., :3].sum(), True),
    "chosen tokens": (lambda y: y[LABELS > 6].logsumexp(-1).sum(), True),
    "second operand": (lambda y: (torch.ones(VOCAB) * y).square().mean(), True),
    "in a list": (lambda y: torch.stack([y, 2 * y]).square().mean(), True),
    "read before": (lambda y: y.square().mean() + F.cross_entropy(y.view(-1, VOCAB), LABELS.view(-1)), True),
    "read afterwards": (lambda y: F.cross_entropy(y.view(-1, VOCAB), LABELS.view(-1)) + y.square().mean(), True),
    "read without a gradient first": (lambda y: (y.detach().sum(), y.square().mean())[1], True),
    "changed in place": (lambda y: (y.mul_(2), F.cross_entropy(y.view(-1, VOCAB), LABELS.view(-1)))[1], True),
    "a view of it changed": (
        lambda y: (y.view(-1, VOCAB).mul_(2), F.cross_entropy(y.view(-1, VOCAB), LABELS.view(-1)))[1],
        True,
    ),
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("bias", [True, False])
def test_uses(heads, use, bias):
    function, reads = USES[use]
    results = []
    x = torch.randn(B, S, D)
    for head in heads:
        if not bias:
            head.bias = None
        leaf = x.clone().requires_grad_()
        y = head(leaf)
        loss = function(y)
        loss.backward()
        gradients = [leaf.grad, *(p.grad for p in head.parameters())]
        results.append([loss.detach(), *gradients])
        if isinstance(y, Logits) and use != "constant bias":
            assert (y.values is not None) == reads
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_a_constant_bias_joins_the_factors(heads):
    head, _ = heads
    head.bias = None
    y = head(torch.randn(B, S, D))
    biased = y + ONES
    assert type(biased) is Logits and y.values is None
    assert type(y + torch.nn.Parameter(ONES)) is torch.Tensor  # it wants a gradient


def test_metadata_costs_nothing(heads):
    y = heads[0](torch.randn(B, S, D))
    assert isinstance(y, torch.Tensor) and torch.is_tensor(y)
    assert (y.shape, y.size(-1), y.dim(), y.ndim, len(y)) == ((B, S, VOCAB), VOCAB, 3, 3, B)
    assert (y.dtype, y.device.type, y.requires_grad, y.numel()) == (
        torch.float32,
        torch.get_default_device().type,
        True,
        B * S * VOCAB,
    )
    assert y.values is None
    assert y.grad_fn is not None and y.values is not None


def test_read_twice_computed_once(heads):
    y = heads[0](torch.randn(B, S, D))
    assert y.detach().data_ptr() == y.data.data_ptr()
    assert repr(y).startswith("tensor(") and y.tolist() == y.detach().cpu().numpy().tolist()


def test_wrong_views_and_labels_are_refused(heads):
    y = heads[0](torch.randn(B, S, D))
    with pytest.raises(RuntimeError, match="invalid for input of size"):
        y.view(3, VOCAB)
    with pytest.raises(RuntimeError):
        y.view(-1, -1, VOCAB)
    y = heads[0](torch.randn(B, S, D))
    with pytest.raises(ValueError, match="labels must be in"):
        F.cross_entropy(y.view(-1, VOCAB), torch.full((B * S,), VOCAB))
    with pytest.raises(TypeError):
        F.cross_entropy(y.view(-1, VOCAB), LABELS.view(-1), no_such_option=1)


@pytest.mark.parametrize("when", ["evaluation", "no gradient", "nothing to learn"])
def test_plain_tensors_where_nobody_learns(heads, when):
    ours, plain = heads
    x = torch.randn(B, S, D)
    if when == "evaluation":
        ours.eval()
    elif when == "nothing to learn":
        ours.requires_grad_(False)
    with torch.set_grad_enabled(when != "no gradient"):
        y = ours(x)
    assert type(y) is torch.Tensor
    torch.testing.assert_close(y, plain(x), rtol=1e-5, atol=1e-6)


def test_autocast(heads):
    results = []
    for head in heads:
        x = torch.linspace(-1, 1, B * S * D).view(B, S, D).requires_grad_()
        with torch.autocast(torch.get_default_device().type, torch.bfloat16):
            y = head(x)
        assert y.dtype == torch.bfloat16
        loss = F.cross_entropy(y.float().view(-1, VOCAB), LABELS.view(-1))
        loss.backward()
        results.append([loss.detach(), x.grad, head.weight.grad, y.detach()])
    for mine, theirs in zip(*results, strict=True):
        assert mine.dtype == theirs.dtype
        torch.testing.assert_close(mine, theirs, rtol=3e-2, atol=1e-2)


def test_in_autocast_logits_of_float32_stay_float32(heads):
    losses = []
    for head in heads:
        y = head(torch.linspace(-1, 1, B * S * D).view(B, S, D))
        with torch.autocast(torch.get_default_device().type, torch.bfloat16):
            losses.append(F.cross_entropy(y.view(-1, VOCAB), LABELS.view(-1)))
    torch.testing.assert_close(*losses, rtol=1e-6, atol=1e-6)
