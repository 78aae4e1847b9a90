"""Linear, LayerNorm and RMSNorm agree with torch's modules."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from lmkernels import nn

from .conftest import assert_same, results

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# (ours, constructor's arguments, shape of the input)
CASES = {
    "linear": (nn.Linear, (33, 47), (3, 5, 33)),
    "linear, one row": (nn.Linear, (33, 47), (33,)),
    "linear, empty": (nn.Linear, (33, 47), (0, 33)),
    "layer norm": (nn.LayerNorm, (33,), (3, 5, 33)),
    "layer norm, three axes": (nn.LayerNorm, ((2, 3, 7), 1e-3), (5, 2, 3, 7)),
    "rms norm": (nn.RMSNorm, (33,), (3, 5, 33)),
    "rms norm, two axes": (nn.RMSNorm, ((3, 7), 1e-3), (5, 2, 3, 7)),
}


def pair(case, dtype, **options):
    kind, arguments, shape = CASES[case]
    torchs = kind.__base__(*arguments, dtype=dtype, **options)
    with torch.no_grad():
        for parameter in torchs.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    ours = kind(*arguments, dtype=dtype, **options)
    ours.load_state_dict(torchs.state_dict())
    return ours, torchs, torch.randn(shape).to(dtype)


def same(ours, torchs, x, dtype):
    assert_same(results(ours, [x]), results(torchs, [x]), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_forward_and_gradients(case, dtype):
    same(*pair(case, dtype), dtype)


@pytest.mark.parametrize("case", CASES)
def test_without_parameters_that_are_optional(case):
    options = {"bias": False} if "linear" in case else {"elementwise_affine": False}
    same(*pair(case, torch.float32, **options), torch.float32)
    if "layer" in case:
        same(*pair(case, torch.float32, bias=False), torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_default_eps_of_rms_norm_is_torchs(dtype):
    x = torch.full((1, 8), 2e-4).to(dtype)
    assert_same({"": nn.RMSNorm(8, dtype=dtype)(x)}, {"": torch.nn.RMSNorm(8, dtype=dtype)(x)}, dtype)


def test_a_shape_that_is_not_the_normalized_one_is_refused_even_without_a_weight():
    for kind in (nn.LayerNorm, nn.RMSNorm):
        with pytest.raises(RuntimeError, match="normalized_shape"):
            kind((3, 7), elementwise_affine=False)(torch.randn(7, 3))


def test_the_kernels_run():
    """And not torch's own forward, which would agree all the same."""
    for case in CASES:
        ours, _, x = pair(case, torch.float32)
        with torch.profiler.profile() as profile:
            ours(x)
        assert any(event.name.startswith("lmkernels::") for event in profile.events()), case


@pytest.mark.parametrize("case", ["linear", "layer norm", "rms norm"])
def test_torch_func_and_forward_mode_derivatives(case):
    """The ops know neither; the module does what torch's does."""
    ours, torchs, x = pair(case, torch.float32)

    def per_sample(module):
        def loss(parameters, row):
            return torch.func.functional_call(module, parameters, (row,)).square().sum()

        return torch.func.vmap(torch.func.grad(loss), (None, 0))(dict(module.named_parameters()), x[0])

    assert_same(per_sample(ours), per_sample(torchs))
    _, tangent = torch.func.jvp(ours, (x,), (x,))
    _, expected = torch.func.jvp(torchs, (x,), (x,))
    assert_same({"tangent": tangent}, {"tangent": expected})
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, x)
        assert torch.autograd.forward_ad.unpack_dual(ours(dual)).tangent is not None


def test_what_the_ops_do_not_take_goes_to_torch():
    linear = nn.Linear(3, 4, dtype=torch.complex64)
    x = torch.randn(2, 3, dtype=torch.complex64)
    torch.testing.assert_close(linear(x), torch.nn.functional.linear(x, linear.weight, linear.bias))
    nested = torch.nested.nested_tensor([torch.randn(2, 3), torch.randn(5, 3)], layout=torch.jagged)
    assert nn.Linear(3, 4)(nested).is_nested
    assert nn.LayerNorm(3)(nested).is_nested
    assert nn.Linear(3, 4, device="meta")(torch.empty(2, 3, device="meta")).shape == (2, 4)


@pytest.mark.parametrize("case", CASES)
def test_state_dicts_copies_and_pickles(case):
    ours, torchs, x = pair(case, torch.float32)
    torchs.load_state_dict(ours.state_dict())
    assert isinstance(ours, type(torchs))
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert type(twin) is type(ours) and torch.equal(twin(x), ours(x))


@pytest.mark.parametrize("case", ["linear", "layer norm, three axes", "rms norm"])
def test_compiles_whole(case):
    ours, _, x = pair(case, torch.float32)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    expected = results(ours, [x])
    actual = {name.replace("_orig_mod.", ""): y for name, y in results(compiled, [x]).items()}
    assert_same(actual, expected)


@pytest.mark.parametrize("case", ["linear", "layer norm", "rms norm"])
def test_autocast(case):
    ours, torchs, x = pair(case, torch.float32)
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        assert_same(results(ours, [x]), results(torchs, [x]), torch.bfloat16)
