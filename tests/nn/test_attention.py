"""MultiheadAttention agrees with torch's: every constructor argument, mask and layout, forward and gradients."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from lmkernels import nn

from .conftest import assert_same, results, twins

B, L, S, E, H = 3, 7, 7, 24, 3


def attentions(dtype=torch.float32, **options):
    return twins(lambda: torch.nn.MultiheadAttention(E, H, dtype=dtype, **options), nn.MultiheadAttention)


def both(modules, inputs, dtype=torch.float32, **options):
    """A module called with one tensor as query, key and value, with (query, key), or with three."""
    torchs, ours = modules

    def call(module):
        def forward(*leaves, **masks):
            query, key, value = {1: leaves * 3, 2: (*leaves, leaves[-1]), 3: leaves}[len(leaves)]
            return module(query, key, value, **masks)

        forward.named_parameters, forward.zero_grad = module.named_parameters, module.zero_grad
        return forward

    assert_same(results(call(ours), inputs, **options), results(call(torchs), inputs, **options), dtype)


def padding(kind, b=B, s=S):
    """The last keys of each sequence are hidden, never all of them."""
    hidden = torch.arange(s) >= torch.tensor([s, s - 2, s - 3])[:b, None]
    return {"none": None, "bool": hidden, "float": torch.zeros(b, s).masked_fill(hidden, float("-inf")) + 0.5}[kind]


def hiding(kind, b=B, l=L, s=S):
    """Causal, so that every query sees at least the first key."""
    future = torch.ones(l, s, dtype=torch.bool).triu(1)
    heads = future & (torch.rand(b * H, l, s) < 0.7)
    return {
        "none": None,
        "bool": future,
        "float": torch.randn(l, s).masked_fill(future, float("-inf")),
        "bool by head": heads,
        "float by head": torch.randn(b * H, l, s).masked_fill(heads, float("-inf")),
    }[kind]


@pytest.mark.filterwarnings("ignore:Support for mismatched")
@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.parametrize("pad", ["none", "bool", "float"])
@pytest.mark.parametrize("hide", ["none", "bool", "float", "bool by head", "float by head"])
def test_masks(hide, pad, weights):
    modules = attentions(batch_first=True)
    options = {"attn_mask": hiding(hide), "key_padding_mask": padding(pad), "need_weights": weights}
    both(modules, [torch.randn(B, L, E)], **options, average_attn_weights=hide != "bool by head")


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("inputs", [1, 2, 3], ids=["self", "cross", "three inputs"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("more", ["", "bias_kv", "zero_attn", "both"])
def test_layouts_inputs_and_added_keys(batch_first, inputs, bias, more):
    modules = attentions(
        batch_first=batch_first,
        bias=bias,
        add_bias_kv=more in ("bias_kv", "both"),
        add_zero_attn=more in ("zero_attn", "both"),
    )
    x = [torch.randn(B, s, E) for s in (L, S + 2, S + 2)[:inputs]]
    if not batch_first:
        x = [t.transpose(0, 1).contiguous() for t in x]
    s = L if inputs == 1 else S + 2
    options = {"attn_mask": hiding("bool", s=s), "key_padding_mask": padding("bool", s=s)}
    both(modules, x, **options, need_weights=more == "both")


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kdim, vdim", [(10, 13), (E, 13), (10, None)])
def test_key_and_value_of_other_widths(kdim, vdim, bias):
    modules = attentions(kdim=kdim, vdim=vdim, bias=bias)
    both(modules, [torch.randn(L, B, E), torch.randn(S, B, kdim), torch.randn(S, B, vdim or E)])


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("inputs", [1, 2, 3])
def test_unbatched(batch_first, average, inputs):
    modules = attentions(batch_first=batch_first)
    x = [torch.randn(n, E) for n in (L, S, S)[:inputs]]
    options = {"attn_mask": hiding("bool by head", b=1), "key_padding_mask": padding("bool", b=1)[0]}
    both(modules, x, **options, average_attn_weights=average)
    both(modules, x, attn_mask=hiding("float"), need_weights=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_dtypes(dtype):
    modules = attentions(dtype=dtype, batch_first=True)
    x = [torch.randn(B, L, E).to(dtype)]
    both(modules, x, dtype, key_padding_mask=padding("bool"), attn_mask=hiding("bool"))
    both(modules, x, dtype, attn_mask=hiding("float").to(dtype), need_weights=False)


@pytest.mark.parametrize("pad", ["none", "bool", "float"])
@pytest.mark.parametrize("s", [L, L + 2])
@pytest.mark.parametrize("more", [False, True])
def test_the_causal_hint(pad, s, more):
    """What torch does with it: nothing, where lengths differ or keys are added."""
    modules = attentions(batch_first=True, add_zero_attn=more)
    options = {"attn_mask": hiding("bool", s=s), "key_padding_mask": padding(pad, s=s), "is_causal": True}
    if pad == "float":
        options["attn_mask"] = torch.zeros(L, s).masked_fill(options["attn_mask"], float("-inf"))
    inputs = [torch.randn(B, L, E)] if s == L else [torch.randn(B, L, E), torch.randn(B, s, E)]
    hint = options | {"is_causal": False} if more and pad == "none" else options  # there torch fails on it
    torchs, ours = modules
    for weights in (False, True):
        arguments = inputs + inputs[-1:] * (3 - len(inputs))
        actual = ours(*arguments, **options, need_weights=weights)
        expected = torchs(*arguments, **hint, need_weights=weights)
        assert_same({"out": actual[0]}, {"out": expected[0]})
        assert weights == (actual[1] is not None)


def test_the_gradient_of_a_float_mask():
    torchs, ours = attentions(batch_first=True)
    x, bias = torch.randn(B, L, E), torch.randn(B * H, L, S)
    gradients = []
    for module in (ours, torchs):
        mask = bias.clone().requires_grad_()
        module(x, x, x, attn_mask=mask, key_padding_mask=padding("float"))[0].square().sum().backward()
        gradients.append({"mask": mask.grad})
    assert_same(*gradients)


def test_a_query_that_sees_nothing_gets_zeros():
    _, ours = attentions(batch_first=True)
    x = torch.randn(B, L, E, requires_grad=True)
    pad = padding("bool").clone()
    pad[1] = True
    out, weights = ours(x, x, x, key_padding_mask=pad)
    out.sum().backward()
    assert torch.equal(out[1], ours.out_proj.bias.expand(L, E)) and not weights[1].any()
    assert all(p.grad.isfinite().all() for p in (x, *ours.parameters()))


def test_dropout_in_training_returns_the_weights_that_it_used():
    _, ours = attentions(batch_first=True, dropout=0.4)
    x = torch.randn(B, L, E)
    out, weights = ours(x, x, x, average_attn_weights=False)
    v = torch.nn.functional.linear(x, *(p.chunk(3)[2] for p in (ours.in_proj_weight, ours.in_proj_bias)))
    heads = weights @ v.unflatten(-1, (H, -1)).transpose(1, 2)
    expected = torch.nn.functional.linear(heads.transpose(1, 2).flatten(2), ours.out_proj.weight, ours.out_proj.bias)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    assert 0.25 < (weights == 0).float().mean() < 0.55
    torch.manual_seed(7)
    first = ours(x, x, x)[0]
    torch.manual_seed(7)
    assert torch.equal(first, ours(x, x, x)[0]) and not torch.equal(first, ours(x, x, x)[0])
    ours.dropout = 1.0
    ours.train()
    assert torch.equal(ours(x, x, x)[0], ours.out_proj.bias.expand(B, L, E))


def test_eval_does_not_drop():
    torchs, ours = attentions(batch_first=True, dropout=0.4)
    both((torchs.eval(), ours.eval()), [torch.randn(B, L, E)])


def test_eval_agrees_with_torchs_fast_path():
    torch.backends.mha.set_fastpath_enabled(True)
    torchs, ours = (
        module.eval()
        for module in twins(lambda: torch.nn.MultiheadAttention(E, 4, batch_first=True), nn.MultiheadAttention)
    )
    x = torch.randn(B, L, E)
    with torch.no_grad():
        for options in ({}, {"key_padding_mask": padding("bool")}, {"attn_mask": hiding("bool")}):
            actual, expected = ours(x, x, x, **options), torchs(x, x, x, **options)
            assert_same(*({"out": out, "weights": weights} for out, weights in (actual, expected)))


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged], ids=str)
def test_nested_tensors(layout):
    torchs, ours = attentions(batch_first=True)
    sequences = [torch.randn(n, E) for n in (5, 1, 7)]
    with torch.no_grad():
        x = torch.nested.nested_tensor(sequences, layout=layout)
        out, weights = ours(x, x, x, need_weights=False)
        assert out.is_nested and out.layout == layout and weights is None
        for sequence, result in zip(sequences, out.unbind(), strict=True):
            assert_same({"": result}, {"": torchs(sequence, sequence, sequence)[0]})
        with pytest.raises(ValueError, match="need_weights"):
            ours(x, x, x)
    if layout == torch.strided:
        with pytest.raises(ValueError, match=r"query .*torch\.jagged"):
            ours(x, x, x, need_weights=False)


def test_the_kernels_run():
    _, ours = attentions(batch_first=True)
    x = torch.randn(B, L, E)
    with torch.profiler.profile() as profile:
        ours(x, x, x, key_padding_mask=padding("bool"))
    names = {event.name for event in profile.events()}
    assert {"lmkernels::attention_fwd", "lmkernels::qkv_projection_fwd", "lmkernels::linear_fwd"} <= names


def test_masks_are_not_made_larger():
    """The masks of 4 heads x 512 x 512 would take megabytes."""
    _, ours = attentions(batch_first=True)
    s = 512
    q = torch.randn(2, s, H, E // H)
    found = ours.masks(q, q, torch.zeros(s, s, dtype=torch.bool), torch.zeros(2, s, dtype=torch.bool), False)
    assert found["mask"].shape == (1, 1, s, s) and found["bias"].shape == (2, 1, 1, s)
    found = ours.masks(q, q, torch.zeros(s, s), torch.zeros(2, s, dtype=torch.bool), False)
    assert found["bias"].shape == (1, 1, s, s) and found["mask"].shape == (2, 1, 1, s)


def test_torch_func():
    torchs, ours = attentions(batch_first=True)
    x = torch.randn(B, L, E)

    def loss(module):
        return lambda p: torch.func.functional_call(module, p, (x, x, x))[0].square().sum()

    assert_same(*(torch.func.grad(loss(m))(dict(m.named_parameters())) for m in (ours, torchs)))


def test_state_dicts_copies_and_pickles():
    torchs, ours = attentions(add_bias_kv=True, kdim=10)
    assert list(ours.state_dict()) == list(torchs.state_dict())
    fresh = nn.MultiheadAttention(E, H, add_bias_kv=True, kdim=10)
    fresh.load_state_dict(torchs.state_dict())
    torchs.load_state_dict(fresh.state_dict())
    x = torch.randn(L, B, E), torch.randn(S, B, 10), torch.randn(S, B, E)
    for twin in (fresh, copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert type(twin) is nn.MultiheadAttention and isinstance(twin, torch.nn.MultiheadAttention)
        assert torch.equal(twin(*x)[0], ours(*x)[0])


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_whole(dynamic):
    torchs, ours = attentions(batch_first=True)
    compiled = torch.compile(ours, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for s in (L, L + 3):
        x = torch.randn(B, s, E)
        options = {"attn_mask": hiding("bool", l=s, s=s), "key_padding_mask": padding("bool", s=s)}
        actual, expected = compiled(x, x, x, **options), torchs(x, x, x, **options)
        assert_same({"out": actual[0], "weights": actual[1]}, {"out": expected[0], "weights": expected[1]})
        actual[0].sum().backward()


def test_autocast():
    torchs, ours = attentions(batch_first=True)
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        both((torchs, ours), [torch.randn(B, L, E)], torch.bfloat16, need_weights=False, attn_mask=hiding("bool"))


@pytest.mark.parametrize(
    "name, arguments, options",
    [
        ("query", (torch.randn(E),) * 3, {}),
        ("query", (torch.randn(B, L, E + 1),) * 3, {}),
        ("key", (torch.randn(B, L, E), torch.randn(L, E), torch.randn(L, E)), {}),
        ("key", (torch.randn(B, L, E), torch.randn(B + 1, L, E), torch.randn(B + 1, L, E)), {}),
        ("value", (torch.randn(B, L, E), torch.randn(B, L, E), torch.randn(B, L + 1, E)), {}),
        ("attn_mask", (torch.randn(B, L, E),) * 3, {"attn_mask": torch.zeros(L, L + 1)}),
        ("attn_mask", (torch.randn(B, L, E),) * 3, {"attn_mask": torch.zeros(B, L, L)}),
        ("attn_mask", (torch.randn(B, L, E),) * 3, {"attn_mask": torch.zeros(L, L, dtype=torch.int64)}),
        ("attn_mask", (torch.randn(B, L, E),) * 3, {"is_causal": True}),
        ("key_padding_mask", (torch.randn(B, L, E),) * 3, {"key_padding_mask": torch.zeros(L, B)}),
    ],
)
def test_bad_arguments_are_named(name, arguments, options):
    with pytest.raises((ValueError, TypeError), match=f"^{name} must"):
        nn.MultiheadAttention(E, H, batch_first=True)(*arguments, **options)
