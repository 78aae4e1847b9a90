"""layer_norm and rms_norm: as accurate as plain torch, exact where it counts, and at home in torch."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from lmkernels import layer_norm, rms_norm
from lmkernels.ops.norms import api
from lmkernels.testing import cases, numerics

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
NORMS = [layer_norm, rms_norm]
EPS = 1e-5
INTERPRETED = r"triton(?!.*(of 31|64|2049|50257|many|no |parameters|gaps|\(37.*bf|rms.*\(37|-float16))|long_rows.*260"
ON_EVERY_ISA = r"(?=.*native).*(accurate.*(layer_norm|100)|mean|subnormal)"


def name_of(x) -> str:
    return getattr(x, "__name__", None) or str(x).removeprefix("torch.")


@pytest.fixture(params=NORMS, ids=name_of)
def norm(request):
    """layer_norm or rms_norm, taking what a case makes: rms_norm ignores the bias."""

    def call(x, residual=None, weight=None, bias=None, eps=EPS, **options):
        arguments = (weight, bias) if request.param is layer_norm else (weight,)
        return request.param(x, *arguments, eps, residual=residual, **options)

    call.function = request.param
    call.centered = request.param is layer_norm
    return call


def plain(norm):
    """What one writes in eager torch."""

    def call(x, residual=None, weight=None, bias=None, eps=EPS):
        s = x if residual is None else x + residual
        if weight is not None:
            weight = weight.to(torch.promote_types(s.dtype, weight.dtype))
        if norm.centered:
            y = F.layer_norm(s, s.shape[-1:], weight, bias, eps)
        else:
            y = F.rms_norm(s, s.shape[-1:], weight, eps)
        return y if residual is None else (y, s)

    return call


def differentiable(norm, inputs: dict) -> list[str]:
    return [name for name in inputs if norm.centered or name != "bias"]


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("case", cases.NORM, ids=str)
def test_results_and_gradients_are_as_accurate_as_plain_torch(norm, case, dtype, backend):
    inputs = case.make(dtype)
    numerics.assert_op_as_accurate(
        partial(norm, backend=backend),
        partial(norm, backend="reference"),
        plain(norm),
        inputs,
        differentiable(norm, inputs),
        dtype=dtype,
        samples=inputs["x"].numel() // case.shape[-1],
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("shape", [(37, 100), (3, 260)], ids=str)
def test_triton_takes_long_rows_in_blocks(norm, shape, dtype, triton, monkeypatch):
    """As those that do not fit in registers."""
    backend = api.BACKENDS[triton]
    for name, value in {"LONGEST_FWD": 64, "LONGEST_BWD": 64, "LONG": {"COLS": 64, "num_warps": 1}}.items():
        monkeypatch.setattr(backend, name, value)
    inputs = cases.NormCase("", shape, residual="same", mean=30.0).make(dtype)
    numerics.assert_op_as_accurate(
        partial(norm, backend=triton),
        partial(norm, backend="reference"),
        plain(norm),
        inputs,
        differentiable(norm, inputs),
        dtype=dtype,
        samples=shape[0],
    )


@pytest.mark.parametrize("mean", [1e3, -1e5, 3e6])
def test_a_large_mean_costs_no_digit(mean, backend):
    """The values are what they are after rounding to float32; their norm is known to almost every digit."""
    x = torch.randn(50, 768) + mean
    golden = layer_norm(x.double(), None, None, EPS, backend="reference")
    assert (layer_norm(x, None, None, EPS, backend=backend) - golden).abs().max() < 3e-6


def test_rows_that_vary_in_nothing_give_the_bias(backend):
    x = torch.full((5, 100), 1e4 / 3, requires_grad=True)
    weight, bias = torch.randn(100), torch.randn(100)
    y = layer_norm(x, weight, bias, EPS, backend=backend)
    torch.testing.assert_close(y, bias.expand(5, 100), rtol=0, atol=1e-6)


def test_nan_and_infinity_stay_in_their_row(norm, backend):
    x = torch.randn(6, 40)
    x[1, 3], x[4, 0] = float("nan"), float("inf")
    y = norm(x, backend=backend)
    assert y[[1, 4]].isnan().any(-1).all() and y[[0, 2, 3, 5]].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_the_sum_is_torchs_sum(dtype, norm, backend):
    x, residual = (torch.randn(9, 77).to(dtype) for _ in range(2))
    y, s = norm(x, residual, backend=backend)
    assert torch.equal(s, x + residual)
    assert torch.equal(y, norm(s, backend=backend))


def test_subnormal_bfloat16_is_rounded_like_the_rest(native):
    """vcvtneps2bf16 alone would make them zeros."""
    tiny = torch.linspace(-3e-39, 3e-39, 200).to(torch.bfloat16)
    _, s = rms_norm(tiny[None], None, EPS, residual=tiny[None], backend=native)
    assert (s != 0).sum() > 190 and torch.equal(s[0], tiny + tiny)


@pytest.mark.parametrize("used", ["y", "s", "both"])
def test_gradients_arrive_from_either_result(norm, used, backend):
    x, residual = (torch.randn(10, 50, requires_grad=True) for _ in range(2))
    weight = torch.randn(50, requires_grad=True)
    gradients = []
    for function in (partial(norm, backend=backend), plain(norm)):
        y, s = function(x, residual, weight)
        loss = (y.sin().sum() if used != "s" else 0) + (s.cos().sum() if used != "y" else 0)
        gradients.append(torch.autograd.grad(loss, (x, residual, weight), allow_unused=True, materialize_grads=True))
    for actual, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("wanted", ["x", "residual", "weight", "bias"])
def test_one_gradient_alone_is_the_one_of_all(wanted, backend):
    inputs = cases.NormCase("", (20, 70), residual="same").make(torch.float32)

    def gradients(names):
        leaves = {name: inputs[name].detach().requires_grad_() for name in names}
        y, s = layer_norm(**inputs | leaves, eps=EPS, backend=backend)
        assert s.requires_grad == ("x" in names or "residual" in names)
        return dict(zip(names, torch.autograd.grad(y.sin().sum(), leaves.values()), strict=True))

    torch.testing.assert_close(gradients([wanted])[wanted], gradients(list(inputs))[wanted])


@pytest.mark.parametrize("residual", [None, "same"])
def test_gradients_of_both_orders_are_those_of_finite_differences(norm, residual, backend):
    inputs = cases.NormCase("", (4, 7), residual=residual).make(torch.float64)
    names = differentiable(norm, inputs)
    leaves = [inputs[name].requires_grad_() for name in names]

    def function(*leaves):
        return norm(**dict(zip(names, leaves, strict=True)), backend=backend)

    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


def test_results_are_the_same_for_any_number_of_threads(norm, native):
    inputs = cases.NormCase("", (700, 768), residual="same").make(torch.float32)
    threads, found = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            found.append(numerics.results(partial(norm, backend=native), inputs, differentiable(norm, inputs)))
    finally:
        torch.set_num_threads(threads)
    for name, first in found[0].items():
        assert all(torch.equal(first, other[name]) for other in found[1:]), name


def test_a_row_does_not_depend_on_the_others(norm, native):
    inputs = cases.NormCase("", (70, 300), residual="same").make(torch.bfloat16)
    y, s = norm(**inputs, backend=native)
    few = inputs | {name: inputs[name][11:14] for name in ("x", "residual")}
    assert all(torch.equal(a, b[11:14]) for a, b in zip(norm(**few, backend=native), (y, s), strict=True))


@pytest.mark.parametrize("shape", [(0, 5), (3, 0, 8), (4, 0), (0,)], ids=str)
def test_empty_tensors(shape, norm, backend):
    inputs = cases.NormCase("", shape, residual="same").make(torch.float32)
    found = numerics.results(partial(norm, backend=backend), inputs, differentiable(norm, inputs))
    assert found["out"].shape == found["out1"].shape == found["dx"].shape == shape
    assert torch.equal(found["dweight"], torch.zeros(shape[-1]))


# --- inside torch


@pytest.fixture
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("residual", [None, "same", "float32"])
@pytest.mark.parametrize("center", [True, False])
def test_the_ops_pass_opcheck(residual, center, native):
    inputs = cases.NormCase("", (3, 5, 40), residual=residual, bias=center, float32_parameters=True).make(
        torch.bfloat16
    )
    x, added, weight, bias = (inputs.get(name) for name in ("x", "residual", "weight", "bias"))
    for for_backward in (False, True):
        torch.library.opcheck(torch.ops.lmkernels.norm_fwd.default, (x, added, weight, bias, EPS, center, for_backward))
    results = torch.ops.lmkernels.norm_fwd(x, added, weight, bias, EPS, center, True)
    y, s = results[0], x if added is None else results[1]
    rstd, mean = (results[-2], results[-1]) if center else (results[-1], None)
    for needs in ((True, center), (False, False)):
        for ds in (None, torch.ones_like(s)):
            torch.library.opcheck(
                torch.ops.lmkernels.norm_bwd.default, (torch.ones_like(y), ds, s, rstd, mean, weight, bias, *needs)
            )


def test_a_compiled_call_has_no_graph_break_and_the_same_results(native, fresh_compiler):
    """Inductor, forward and backward, through both norms."""
    inputs = cases.NormCase("", (3, 20, 64), residual="same").make(torch.float32)
    names = list(inputs)

    def block(x, residual, weight, bias):
        y, s = layer_norm(x * 2, weight, bias, EPS, residual=residual, backend=native)
        return rms_norm(y.relu(), weight, EPS, backend=native), s

    actual = numerics.results(torch.compile(block, fullgraph=True), inputs, names)
    expected = numerics.results(block, inputs, names)
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name])


def test_dynamic_shapes_compile_once(norm, native, fresh_compiler):
    function = partial(norm, backend=native)
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")

    def run(b, s, d):
        inputs = cases.NormCase("", (b, s, d)).make(torch.float32)
        actual, expected = (numerics.results(f, inputs, differentiable(norm, inputs)) for f in (compiled, function))
        for name in expected:
            torch.testing.assert_close(actual[name], expected[name])

    run(2, 10, 40)
    with torch.compiler.set_stance("fail_on_recompile"):
        run(3, 7, 65)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
def test_autocast_changes_nothing(dtype, norm, backend):
    inputs = cases.NormCase("", (10, 50), residual="same", float32_parameters=True).make(dtype)
    expected = norm(**inputs, backend=backend)
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        actual = norm(**inputs, backend=backend)
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


def test_a_float32_stream_stays_float32_beside_bfloat16(norm, backend):
    """What autocast makes of a transformer's block: the sum is torch's, in float32, for any order of the two."""
    inputs = cases.NormCase("", (10, 50), residual="float32", float32_parameters=True).make(torch.bfloat16)
    y, s = norm(**inputs, backend=backend)
    assert y.dtype == s.dtype == torch.float32 and torch.equal(s, inputs["x"] + inputs["residual"])
    swapped = inputs | {"x": inputs["residual"], "residual": inputs["x"]}
    assert all(torch.equal(a, e) for a, e in zip(norm(**swapped, backend=backend), (y, s), strict=True))


def mapping_flags(address: int) -> list[str]:
    """The kernel's flags of the mapping that holds an address of this process."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if match := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(match[1], 16) <= address < int(match[2], 16)
        elif inside and line.startswith("VmFlags:"):
            return line.split()[1:]
    raise AssertionError(f"{address:#x} is not mapped")


@pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="this system has no transparent huge pages"
)
def test_large_results_ask_for_huge_pages(norm, native):
    if Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text().split()[0] == "[always]":
        pytest.skip("this system gives huge pages without being asked")
    y = norm(torch.randn(4096, 768), weight=torch.ones(768), bias=torch.zeros(768), backend=native)
    assert "hg" in mapping_flags(y.data_ptr() + y.nbytes // 2)


# --- bad arguments


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": [1.0]}, TypeError, "x must be a torch.Tensor, got list"),
        ({"x": torch.ones(3, 8, dtype=torch.int64)}, TypeError, "x must be float32.* got torch.int64"),
        ({"x": torch.tensor(1.0)}, ValueError, r"x must be \(..., d\)"),
        ({"weight": torch.ones(7)}, ValueError, r"weight must be \(8,\), got \(7,\)"),
        (
            {"weight": torch.ones(8, dtype=torch.bfloat16)},
            TypeError,
            "weight must be torch.float32, got torch.bfloat16",
        ),
        ({"bias": torch.ones(1, 8)}, ValueError, r"bias must be \(8,\), got \(1, 8\)"),
        ({"residual": torch.ones(8)}, ValueError, r"residual must have x's shape \(3, 8\), got \(8,\)"),
        ({"residual": torch.ones(3, 8).double()}, TypeError, "residual must have x's dtype .* got torch.float64"),
        (
            {"residual": torch.ones(3, 8, device="meta")},
            ValueError,
            f"residual must be on x's device {torch.empty(0).device}, got meta",
        ),
        ({"eps": -1.0}, ValueError, "eps must be at least 0, got -1"),
        ({"eps": float("nan")}, ValueError, "eps must be a finite number, got nan"),
        ({"eps": "1"}, TypeError, "eps must be a number, got str"),
        ({"backend": "cuda"}, ValueError, "backend must be one of native, triton, reference or None, got 'cuda'"),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else "",
)
def test_bad_arguments_say_what_is_wrong(change, error, message):
    arguments = {"x": torch.ones(3, 8), "weight": torch.ones(8), "bias": torch.ones(8), "eps": EPS}
    with pytest.raises(error, match=message):
        layer_norm(**arguments | change)


def test_a_named_backend_that_cannot_run_says_so(norm, native):
    with pytest.raises(NotImplementedError, match="no kernel for device 'meta'"):
        norm(torch.ones(3, 8, device="meta"), backend=native)
