"""TransformerEncoderLayer agrees with torch's, alone and in TransformerEncoder, in train and eval."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F

from lmkernels import nn

from .conftest import assert_same, results

B, S, D, H = 3, 7, 24, 4
HIDDEN = torch.arange(S) >= torch.tensor([S, S - 2, S - 3])[:, None]  # (b, s), True is padding
FUTURE = torch.ones(S, S, dtype=torch.bool).triu(1)


def layers(dtype=torch.float32, dropout=0.0, **options):
    """torch's layer with every parameter random, and ours with its state dict."""
    options = {"dropout": dropout, "batch_first": True} | options
    torchs = torch.nn.TransformerEncoderLayer(D, H, 40, dtype=dtype, **options)
    with torch.no_grad():
        for parameter in torchs.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    ours = nn.TransformerEncoderLayer(D, H, 40, dtype=dtype, **options)
    ours.load_state_dict(torchs.state_dict())
    return torchs, ours


def same(torchs, ours, x, dtype=torch.float32, **options):
    assert_same(results(ours, [x], **options), results(torchs, [x], **options), dtype)


ACTIVATIONS = {
    "relu": "relu",
    "gelu": "gelu",
    "F.relu": F.relu,
    "F.gelu": F.gelu,
    "nn.ReLU": torch.nn.ReLU(),
    "nn.GELU": torch.nn.GELU(),
    "nn.GELU tanh": torch.nn.GELU(approximate="tanh"),
    "F.silu": F.silu,
    "another": lambda x: F.elu(x) * 0.5,
    "another module": torch.nn.Hardswish(),
}


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation, norm_first):
    torchs, ours = layers(activation=ACTIVATIONS[activation], norm_first=norm_first)
    same(torchs, ours, torch.randn(B, S, D))
    same(torchs.eval(), ours.eval(), torch.randn(B, S, D))


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_layouts_and_masks(batch_first, norm_first, bias):
    torchs, ours = layers(batch_first=batch_first, norm_first=norm_first, bias=bias, layer_norm_eps=1e-3)
    x = torch.randn(B, S, D) if batch_first else torch.randn(S, B, D)
    same(torchs, ours, x)
    same(torchs, ours, x, src_key_padding_mask=HIDDEN, src_mask=FUTURE)
    same(torchs, ours, x, src_key_padding_mask=HIDDEN, src_mask=FUTURE, is_causal=True)
    same(torchs, ours, x, src_mask=torch.randn(B * H, S, S))
    same(torchs, ours, torch.randn(S, D), src_mask=FUTURE, src_key_padding_mask=HIDDEN[1])


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_dtypes(dtype, norm_first):
    # gelu: a rounding that moves a value over relu's kink changes the gradient by more than all roundings together
    torchs, ours = layers(dtype, norm_first=norm_first, activation="gelu")
    x = torch.randn(B, S, D).to(dtype)
    if dtype == torch.float64:
        return same(torchs, ours, x, dtype, src_key_padding_mask=HIDDEN)
    # the fused layer rounds less often: both are measured against float32
    exact = results(copy.deepcopy(torchs).float(), [x.float()], src_key_padding_mask=HIDDEN)
    for name, y in results(ours, [x], src_key_padding_mask=HIDDEN).items():
        plain = results(torchs, [x], src_key_padding_mask=HIDDEN)[name]
        error, torchs_error = ((z.float() - exact[name]).norm() / exact[name].norm() for z in (y, plain))
        assert y.dtype == plain.dtype and error <= 1.5 * torchs_error + 1e-4, name


@pytest.mark.parametrize("norm_first", [False, True])
def test_dropout_of_everything_leaves_the_residuals(norm_first):
    """With p = 1 nothing of the branches is left, in torch and here."""
    same(*layers(dropout=1.0, norm_first=norm_first), torch.randn(B, S, D))


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("active", ["dropout", "dropout1", "dropout2"])
def test_each_dropout_drops_what_torchs_does(active, norm_first):
    """One at a time, with the numbers that torch draws: the same seed gives the same result."""
    torchs, ours = layers(dropout=0.0, norm_first=norm_first, batch_first=False)
    for layer in (torchs, ours):
        getattr(layer, active).p = 0.5
    x = torch.randn(B, S, D)
    torch.manual_seed(3)
    expected = results(torchs, [x])
    torch.manual_seed(3)
    assert_same(results(ours, [x]), expected)


def test_training_drops_attention_weights_and_eval_drops_nothing():
    torchs, ours = layers(dropout=0.5)
    x = torch.randn(B, S, D)
    for dropout in (ours.dropout, ours.dropout1, ours.dropout2):
        dropout.p = 0.0
    assert not torch.equal(ours(x), ours(x))
    same(torchs.eval(), ours.eval(), x)


def test_the_kernels_run_fused():
    _, ours = layers(norm_first=True)
    with torch.profiler.profile() as profile:
        ours(torch.randn(B, S, D))
    names = [event.name for event in profile.events()]
    assert names.count("lmkernels::linear_fwd") >= 1 and names.count("lmkernels::norm_fwd") == 2
    assert "aten::add" not in names and "aten::linear" not in names


def test_hooks_and_exchanged_submodules_are_called():
    torchs, ours = layers()
    x, seen = torch.randn(B, S, D), []
    handles = [
        module.register_forward_hook(lambda module, inputs, out: seen.append(type(module).__name__))
        for module in (ours.self_attn, ours.linear1, ours.norm2)
    ]
    same(torchs, ours, x)
    assert seen == ["MultiheadAttention", "Linear", "LayerNorm"]
    for handle in handles:
        handle.remove()

    class Doubled(torch.nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    for layer in (torchs, ours):
        layer.linear1.__class__ = Doubled
    same(torchs, ours, x)
    ours.eval(), torchs.eval()
    with torch.no_grad():  # where torch's own fast path would ignore it
        assert_same({"": ours(x)}, {"": torchs(x)})


def stacks(n=2, **options):
    torchs, ours = layers(**options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # why torch cannot use nested tensors
        make = torch.nn.TransformerEncoder
        return tuple(make(layer, n, norm=torch.nn.LayerNorm(D)) for layer in (torchs, ours))


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
def test_in_torchs_encoder_in_training(batch_first, norm_first):
    torchs, ours = stacks(batch_first=batch_first, norm_first=norm_first)
    assert type(ours.layers[1]) is nn.TransformerEncoderLayer
    x = torch.randn(B, S, D) if batch_first else torch.randn(S, B, D)
    same(torchs, ours, x, src_key_padding_mask=HIDDEN)
    same(torchs, ours, x, mask=torch.nn.Transformer.generate_square_subsequent_mask(S))
    same(torchs, ours, x, mask=FUTURE, src_key_padding_mask=HIDDEN, is_causal=True)


@pytest.mark.parametrize("fastpath", [False, True])
def test_in_torchs_encoder_in_eval(fastpath):
    """With the fast path the encoder hands nested tensors to its layers, and the padding comes back as zeros."""
    torch.backends.mha.set_fastpath_enabled(fastpath)
    torchs, ours = (stack.eval() for stack in stacks(activation="gelu"))
    x = torch.randn(B, S, D)
    with torch.no_grad(), torch.profiler.profile() as profile:
        actual = ours(x, src_key_padding_mask=HIDDEN)
    with torch.no_grad():
        expected = torchs(x, src_key_padding_mask=HIDDEN)
    assert_same({"": actual}, {"": expected})
    assert (actual[HIDDEN] == torchs.norm.bias).all() == fastpath
    names = {event.name for event in profile.events()}
    assert ("lmkernels::attention_varlen_fwd" if fastpath else "lmkernels::attention_fwd") in names
    same(torchs, ours, x, src_key_padding_mask=HIDDEN)  # a gradient is wanted: no nested tensors


@pytest.mark.parametrize("norm_first", [False, True])
def test_jagged_tensors_in_training(norm_first):
    """Gradients are those of one sequence after the other."""
    torchs, ours = layers(norm_first=norm_first)
    sequences = [torch.randn(n, D) for n in (5, 1, 7)]
    x = torch.nested.nested_tensor(sequences, layout=torch.jagged)
    out = ours(x)
    out.values().square().sum().backward()
    expected = torch.cat([torchs(sequence) for sequence in sequences])
    expected.square().sum().backward()
    assert_same({"": out.values()}, {"": expected})
    assert_same(*({n: p.grad for n, p in layer.named_parameters()} for layer in (ours, torchs)))
    with pytest.raises(ValueError, match="src_key_padding_mask"):
        ours(x, src_key_padding_mask=HIDDEN)


def test_state_dicts_copies_pickles_and_initial_values():
    torch.manual_seed(1)
    torchs = torch.nn.TransformerEncoderLayer(D, H)
    torch.manual_seed(1)
    ours = nn.TransformerEncoderLayer(D, H)
    assert isinstance(ours, torch.nn.TransformerEncoderLayer)
    assert_same(dict(ours.state_dict()), dict(torchs.state_dict()))
    torchs.load_state_dict(ours.state_dict())
    x = torch.randn(S, B, D)
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert torch.equal(twin.eval()(x), ours.eval()(x))


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_whole(dynamic, dropout):
    torchs, ours = layers(dropout=dropout)
    compiled = torch.compile(ours, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for s in (S, S + 4):
        x = torch.randn(B, s, D)
        out = compiled(x, src_mask=torch.ones(s, s, dtype=torch.bool).triu(1))
        out.sum().backward()
        assert out.shape == x.shape
        if dropout == 0.0:
            assert_same({"": out}, {"": torchs(x, src_mask=torch.ones(s, s, dtype=torch.bool).triu(1))})


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 1.0])
def test_autocast(norm_first, dropout):
    torchs, ours = layers(norm_first=norm_first, dropout=dropout)
    x = torch.randn(B, S, D)
    exact = torchs(x)
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        actual, expected = ours(x), torchs(x)
    assert actual.dtype == expected.dtype == torch.float32
    assert (actual - exact).norm() <= 1.5 * (expected - exact).norm() + 1e-5


def test_torch_func():
    torchs, ours = layers()
    x = torch.randn(B, S, D)

    def loss(module):
        return lambda p: torch.func.functional_call(module, p, (x,)).square().sum()

    assert_same(*(torch.func.grad(loss(m))(dict(m.named_parameters())) for m in (ours, torchs)))


def test_double_backward():
    torchs, ours = layers(torch.float64, activation="gelu")
    found = []
    for layer in (ours, torchs):
        x = torch.randn(B, S, D, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).requires_grad_()
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):  # torch's other kernels have none
            out = layer(x)
        (dx,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
        found.append({"ddx": torch.autograd.grad(dx.square().sum(), x)[0]})
    assert_same(*found, dtype=torch.float64)
