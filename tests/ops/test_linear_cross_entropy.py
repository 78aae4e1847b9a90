"""linear_cross_entropy: values and gradients, its contract, and its place inside torch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lmkernels import linear_cross_entropy
from lmkernels.ops.linear_cross_entropy import api
from lmkernels.testing import cases, numerics

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
INTERPRETED = (
    r"^(?!.*(compile|several (chunks|blocks)|few|once|slices of the v|contiguous|leading|chunks.*float32|-float16|"
    r"-float64)).*triton"
)
ON_EVERY_ISA = r"(?=.*native).*(plain_torch|float64)"
CASE = {case.name: case for case in cases.LINEAR_CROSS_ENTROPY}


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class _RoundedProduct(torch.autograd.Function):
    """hidden weight^T with sums in float32, of operands in hidden's dtype; so are the products of the gradient."""

    @staticmethod
    def forward(ctx, hidden, weight):
        ctx.save_for_backward(hidden, weight)
        acc = torch.promote_types(hidden.dtype, torch.float32)
        return hidden.to(acc) @ weight.to(hidden.dtype).to(acc).t()

    @staticmethod
    def backward(ctx, dlogits):
        hidden, weight = ctx.saved_tensors
        acc = dlogits.dtype
        dlogits = dlogits.to(hidden.dtype).to(acc)
        dhidden = dlogits @ weight.to(hidden.dtype).to(acc)
        return dhidden.to(hidden.dtype), (dlogits.t() @ hidden.to(acc)).to(weight.dtype)


def plain(hidden, weight, labels, *, bias=None, ignore_index=-100, reduction, softcap, z_loss, label_smoothing):
    """What a careful user writes: float32 logits, and torch's cross entropy."""
    logits = _RoundedProduct.apply(hidden, weight)
    if bias is not None:
        logits = logits + bias.to(logits.dtype)
    if softcap > 0:
        logits = softcap * torch.tanh(logits / softcap)
    loss = F.cross_entropy(logits, labels, ignore_index=ignore_index, reduction="none", label_smoothing=label_smoothing)
    counted = labels != ignore_index
    if z_loss > 0:
        loss = loss + torch.where(counted, z_loss * torch.logsumexp(logits, 1) ** 2, 0.0)
    return {"none": lambda: loss, "sum": loss.sum, "mean": lambda: loss.sum() / counted.sum()}[reduction]()


def gradients_of(function, inputs, **options):
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items() if x.is_floating_point()}
    loss = function(**inputs | leaves, **options)
    douts = torch.linspace(0.5, 1.5, loss.numel(), dtype=loss.dtype).view(loss.shape)
    return loss, dict(zip(leaves, torch.autograd.grad(loss, leaves.values(), douts), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=short)
@pytest.mark.parametrize("case", cases.LINEAR_CROSS_ENTROPY, ids=str)
def test_loss_and_gradients_are_as_accurate_as_plain_torch(case, dtype, backend):
    inputs = case.make(dtype)
    numerics.assert_op_as_accurate(
        lambda **arguments: linear_cross_entropy(**arguments, backend=backend),
        lambda **arguments: linear_cross_entropy(**arguments, backend="reference"),
        plain,
        inputs,
        [name for name in inputs if name != "labels"],
        dtype=dtype,
        samples=case.t,
        products=2,  # the derivatives of logits are factors themselves
        **case.options,
    )


# of logits in the hundreds a relative error is a large absolute one, and so is the loss's
@pytest.mark.parametrize("precision", ["high", "medium"])
@pytest.mark.parametrize("case", [case for case in cases.LINEAR_CROSS_ENTROPY if case.spread < 100], ids=str)
def test_factors_are_rounded_only_as_far_as_torchs_precision_says(case, precision, matmul_precision, native):
    matmul_precision(precision)
    test_loss_and_gradients_are_as_accurate_as_plain_torch(case, torch.float32, native)


@pytest.mark.parametrize(("precision", "bound"), [("highest", 5e-7), ("high", 1e-5), ("medium", 6e-3)])
@pytest.mark.parametrize("case", [CASE["everything odd"], CASE["everything at once"]], ids=str)
def test_what_a_precision_costs(case, precision, bound, matmul_precision, native):
    """Relative to the norm."""
    matmul_precision(precision)
    inputs = case.make(torch.float32)
    loss, gradients = gradients_of(linear_cross_entropy, inputs, backend=native, **case.options)
    double = numerics.in_dtype(inputs, torch.float64)
    exact_loss, exact = gradients_of(linear_cross_entropy, double, backend="reference", **case.options)
    assert (loss.double() - exact_loss).norm() < bound * exact_loss.norm()
    for name, expected in exact.items():
        assert (gradients[name].double() - expected).norm() < bound * expected.norm(), name


def test_lower_precision_is_taken_up_where_the_cpu_is_faster_with_it(matmul_precision, native):
    inputs, found = CASE["several blocks"].make(torch.float32), {}
    for precision in ("highest", "high", "medium"):
        matmul_precision(precision)
        found[precision] = gradients_of(linear_cross_entropy, inputs, reduction="none", backend=native)
        with torch.no_grad():  # which goes another way
            alone = linear_cross_entropy(**inputs, reduction="none", backend=native)
        torch.testing.assert_close(found[precision][0], alone, rtol=1e-6, atol=1e-6)
    isa = torch.ops.lmkernels.cpu_isa()
    for precision, isas in (("high", ("amx",)), ("medium", ("amx", "avx512bf16"))):
        (loss, gradients), (exact_loss, exact) = found[precision], found["highest"]
        assert torch.equal(loss, exact_loss) == (isa not in isas)
        for name in gradients:
            assert torch.equal(gradients[name], exact[name]) == (isa not in isas)


# 70 tokens are panels of 32, 32 and 6; the first and the last go by multiply-adds where tiles would lose an infinity
@pytest.mark.parametrize(
    ("dtype", "precision"),
    [(torch.float32, "highest"), (torch.float32, "high"), (torch.float16, "highest")],
    ids=["float32", "float32, high", "float16"],
)
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan, 3.4e38], ids=str)
@pytest.mark.parametrize("where", ["hidden", "weight"])
def test_what_is_no_number_stays_where_it_belongs(where, value, dtype, precision, matmul_precision, native):
    matmul_precision(precision)
    inputs = cases.LossCase("", 70, 150, 40, counted=1.0, bias=True).make(dtype)
    for row in (3, 68):
        inputs[where][row, row % 7] = value
    options = {"reduction": "none", "softcap": 0.0, "z_loss": 0.0, "label_smoothing": 0.0}
    loss, gradients = gradients_of(linear_cross_entropy, inputs, reduction="none", backend=native)
    torchs_loss, torchs = gradients_of(plain, inputs, **options)
    torch.testing.assert_close(loss, torchs_loss, rtol=2e-5, atol=1e-5, equal_nan=True)
    assert not loss.isfinite().all()
    tolerance = 1e-4 if dtype == torch.float32 else 4e-3
    for name, expected in torchs.items():
        torch.testing.assert_close(gradients[name], expected, rtol=tolerance, atol=tolerance, equal_nan=True)


@pytest.mark.parametrize("precision", ["highest", "high"])
@pytest.mark.parametrize("scales", [(2.0**-60, 2.0**60), (2.0**115, 2.0**-115), (2.0**-120, 2.0**120)], ids=str)
def test_float32_keeps_its_digits_over_its_whole_range(scales, precision, matmul_precision, native):
    """The loss stays as it is, and gradients are scaled with the other factor."""
    matmul_precision(precision)
    inputs = CASE["one loss per token"].make(torch.float32)
    scaled = inputs | {"hidden": inputs["hidden"] * scales[0], "weight": inputs["weight"] * scales[1]}
    loss, expected = gradients_of(linear_cross_entropy, inputs, reduction="none", backend=native)
    scaled_loss, gradients = gradients_of(linear_cross_entropy, scaled, reduction="none", backend=native)
    tolerance = 1e-6 if precision == "highest" else 3e-5
    torch.testing.assert_close(scaled_loss, loss, rtol=tolerance, atol=tolerance)
    for name, scale in (("hidden", scales[0]), ("weight", scales[1])):
        atol = tolerance * expected[name].abs().max().item()
        torch.testing.assert_close(gradients[name] * scale, expected[name], rtol=0, atol=atol)


# derivatives of 2^-70 still go by tiles, those of 2^-105 no more; the others are of the usual size
@pytest.mark.parametrize("scale", [2.0**-70, 2.0**-105])
def test_tiny_gradients_keep_their_digits(scale, native):
    inputs = cases.LossCase("", 96, 150, 40, counted=1.0).make(torch.float32)
    scales = torch.ones(96)
    scales[64:] = scale
    hidden = inputs["hidden"].requires_grad_()
    (expected,) = torch.autograd.grad(linear_cross_entropy(**inputs, reduction="none").sum(), hidden)
    (actual,) = torch.autograd.grad(linear_cross_entropy(**inputs, reduction="none"), hidden, scales)
    torch.testing.assert_close(actual / scales[:, None], expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
def test_triton_adds_up_chunks_of_tokens(dtype, triton, monkeypatch):
    monkeypatch.setattr(api.BACKENDS[triton], "CHUNK", 1)
    options = {"reduction": "none", "softcap": 5.0, "z_loss": 0.1, "label_smoothing": 0.3}
    case = cases.LossCase("", 150, 70, 20, bias=True, float32_weight=True, transposed=True, **options)
    test_loss_and_gradients_are_as_accurate_as_plain_torch(case, dtype, triton)


@pytest.mark.parametrize("case", cases.LINEAR_CROSS_ENTROPY, ids=str)
def test_float64_is_accurate_too(case, native):
    """A float64 reference sums in torch's matmul, with several times the kernel's error: it cannot measure more."""
    inputs = case.make(torch.float64)
    loss, gradients = gradients_of(linear_cross_entropy, inputs, backend=native, **case.options)
    exact_loss, exact = gradients_of(linear_cross_entropy, inputs, backend="reference", **case.options)
    torch.testing.assert_close(loss, exact_loss, rtol=1e-13, atol=1e-13)
    for name, expected in exact.items():
        atol = 1e-13 * expected.abs().max().item()
        torch.testing.assert_close(gradients[name], expected, rtol=0, atol=atol)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.2, 1.0])
def test_it_is_torchs_cross_entropy(reduction, label_smoothing, backend):
    inputs = CASE["everything odd"].make(torch.float64)
    options = {"reduction": reduction, "label_smoothing": label_smoothing, "ignore_index": 3}
    inputs["labels"] = inputs["labels"].clamp(min=3)

    def torchs(hidden, weight, labels, bias, **options):
        return F.cross_entropy(F.linear(hidden, weight, bias), labels, **options)

    actual = gradients_of(linear_cross_entropy, inputs, backend=backend, **options)
    expected = gradients_of(torchs, inputs, **options)
    torch.testing.assert_close(actual, expected)


def test_z_loss_and_softcap_are_what_they_say(backend):
    hidden = torch.tensor([[2.0], [-1.0]], dtype=torch.float64)
    weight = torch.tensor([[1.0], [3.0], [-2.0]], dtype=torch.float64)
    labels = torch.tensor([1, 2])
    logits = 4 * torch.tanh(torch.tensor([[2.0, 6.0, -4.0], [-1.0, -3.0, 2.0]], dtype=torch.float64) / 4)
    lse = logits.exp().sum(1).log()
    expected = lse - torch.stack([logits[0, 1], logits[1, 2]]) + 0.5 * lse**2
    actual = linear_cross_entropy(hidden, weight, labels, softcap=4.0, z_loss=0.5, reduction="none", backend=backend)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("t", [0, 5])
def test_without_a_token_that_counts(t, reduction, backend):
    inputs = {"hidden": torch.randn(t, 8), "weight": torch.randn(11, 8), "labels": torch.full((t,), -100)}
    loss, gradients = gradients_of(linear_cross_entropy, inputs, reduction=reduction, backend=backend)
    expected = F.cross_entropy(torch.randn(t, 11), inputs["labels"], reduction=reduction)
    torch.testing.assert_close(loss, expected, equal_nan=True)
    if backend == "native":
        assert all((gradient == 0).all() for gradient in gradients.values())


def test_ignored_tokens_do_not_matter(native):
    """Not even NaN in their hidden states; the others' bits are those of a call without them."""
    inputs = CASE["few labels"].make(torch.float32)
    counted = inputs["labels"] != -100
    inputs["hidden"][~counted] = torch.nan
    loss, gradients = gradients_of(linear_cross_entropy, inputs)
    alone = inputs | {"hidden": inputs["hidden"][counted], "labels": inputs["labels"][counted]}
    loss_alone, gradients_alone = gradients_of(linear_cross_entropy, alone)
    assert loss == loss_alone and torch.equal(gradients["weight"], gradients_alone["weight"])
    assert torch.equal(gradients["hidden"][counted], gradients_alone["hidden"])
    assert (gradients["hidden"][~counted] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_huge_logits_neither_overflow_nor_vanish(dtype, backend):
    """Logits of +-1000, all classes of a token far apart: a loss in the hundreds, a gradient of 0 or 1 per class."""
    inputs = cases.LossCase("", 60, 150, 48, spread=300.0).make(dtype)
    loss, gradients = gradients_of(linear_cross_entropy, inputs, backend=backend)
    exact = gradients_of(linear_cross_entropy, numerics.in_dtype(inputs, torch.float64), backend="reference")
    torch.testing.assert_close(loss.double(), exact[0], rtol=1e-5, atol=0)
    for name, expected in exact[1].items():
        atol = 4 * max(torch.finfo(dtype).eps, 1e-4) * expected.abs().max().item()
        torch.testing.assert_close(gradients[name].double(), expected, rtol=0, atol=atol)


def test_a_class_of_minus_infinity_gets_no_probability(backend):
    inputs = CASE["everything odd"].make(torch.float64)
    inputs["labels"] = inputs["labels"].clamp(max=49)
    inputs["bias"][50:] = -torch.inf
    loss, gradients = gradients_of(linear_cross_entropy, inputs, backend=backend)
    kept = inputs | {"weight": inputs["weight"][:50], "bias": inputs["bias"][:50]}
    loss_kept, gradients_kept = gradients_of(linear_cross_entropy, kept, backend=backend)
    torch.testing.assert_close(loss, loss_kept)
    torch.testing.assert_close(gradients["hidden"], gradients_kept["hidden"])
    assert (gradients["weight"][50:] == 0).all() and (gradients["bias"][50:] == 0).all()


def test_any_leading_axes(backend):
    inputs = CASE["several blocks"].make(torch.float32)
    loss, gradients = gradients_of(linear_cross_entropy, inputs, reduction="none", backend=backend)
    shaped = inputs | {"hidden": inputs["hidden"].view(4, 25, 64), "labels": inputs["labels"].view(4, 25)}
    loss_shaped, gradients_shaped = gradients_of(linear_cross_entropy, shaped, reduction="none", backend=backend)
    assert torch.equal(loss_shaped, loss.view(4, 25))
    assert torch.equal(gradients_shaped["hidden"], gradients["hidden"].view(4, 25, 64))
    single = linear_cross_entropy(inputs["hidden"][7], inputs["weight"], inputs["labels"][7], backend=backend)
    torch.testing.assert_close(single, loss[7])


def test_inputs_need_not_be_contiguous(backend):
    inputs = CASE["several blocks"].make(torch.float32)
    expected = gradients_of(linear_cross_entropy, inputs, backend=backend)
    for name, view in {
        "hidden": inputs["hidden"].t().contiguous().t(),
        "labels": inputs["labels"].repeat_interleave(2)[::2],
        "weight": torch.stack([inputs["weight"], inputs["weight"]], 2)[..., 0],
    }.items():
        assert not view.is_contiguous()
        actual = gradients_of(linear_cross_entropy, inputs | {name: view}, backend=backend)
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("name", ["several chunks", "several slices of the vocabulary"])
def test_results_do_not_depend_on_the_number_of_threads(name, dtype, native):
    inputs = CASE[name].make(dtype)
    threads, results = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            loss, gradients = gradients_of(linear_cross_entropy, inputs)
            results.append((loss, *gradients.values()))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_the_loss_is_the_same_with_and_without_gradients(dtype, native):
    case = CASE["several chunks"]
    inputs = case.make(dtype)
    with torch.no_grad():
        alone = linear_cross_entropy(**inputs)
    loss, _ = gradients_of(linear_cross_entropy, inputs)
    torch.testing.assert_close(loss, alone)


@pytest.mark.parametrize("needed", ["hidden", "weight", "bias"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_each_gradient_alone(needed, reduction, native):
    inputs = CASE["everything odd"].make(torch.float32)
    _, expected = gradients_of(linear_cross_entropy, inputs, reduction=reduction)
    leaf = inputs[needed].requires_grad_()
    loss = linear_cross_entropy(**inputs, reduction=reduction)
    douts = torch.linspace(0.5, 1.5, loss.numel()).view(loss.shape)
    (gradient,) = torch.autograd.grad(loss, leaf, douts)
    assert torch.equal(gradient, expected[needed])


def test_backward_twice_through_one_graph(native):
    """The saved gradients are not changed by their use, whatever arrives."""
    inputs = CASE["several blocks"].make(torch.float32)
    weight = inputs["weight"].requires_grad_()
    loss = linear_cross_entropy(**inputs)
    loss.backward(retain_graph=True)
    first = weight.grad.clone()
    weight.grad.mul_(100)
    (tripled,) = torch.autograd.grad(3 * loss, weight, retain_graph=True)
    (again,) = torch.autograd.grad(loss, weight)
    assert torch.equal(again, first)
    torch.testing.assert_close(tripled, 3 * first)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=short)
def test_a_factor_costs_a_16_bit_weight_one_rounding_and_a_power_of_two_none(dtype, native):
    inputs = CASE["several chunks"].make(dtype)
    weight = inputs["weight"].requires_grad_()

    def gradient(factor):
        return torch.autograd.grad(factor * linear_cross_entropy(**inputs, reduction="sum"), weight)[0]

    once = gradient(1.0)
    assert torch.equal(gradient(0.25), once * 0.25)
    assert torch.equal(gradient(3.0), once * 3.0)


def test_tied_weights_get_both_gradients(native):
    table, labels = torch.randn(50, 16, requires_grad=True), torch.randint(0, 50, (20,))

    def model(loss):
        return torch.autograd.grad(loss(torch.tanh(F.embedding(labels, table)), table, labels.roll(-1)), table)[0]

    expected = model(lambda hidden, weight, labels: F.cross_entropy(F.linear(hidden, weight), labels))
    torch.testing.assert_close(model(linear_cross_entropy), expected)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("extras", [{}, {"softcap": 3.0, "z_loss": 0.1, "label_smoothing": 0.2}], ids=["plain", "all"])
def test_gradients_of_every_order(extras, reduction, backend):
    generator = torch.Generator().manual_seed(0)
    tensors = [
        torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)
        for shape in ((5, 3), (7, 3), (7,))
    ]
    labels = torch.tensor([0, 6, -100, 2, 3])

    def function(hidden, weight, bias):
        return linear_cross_entropy(hidden, weight, labels, bias=bias, reduction=reduction, backend=backend, **extras)

    assert torch.autograd.gradcheck(function, tensors)
    assert torch.autograd.gradgradcheck(function, tensors)


@pytest.mark.parametrize("name", ["everything odd", "several chunks, float32 weight", "transposed weight"])
def test_the_ops_pass_opcheck(name, native):
    inputs = CASE[name].make(torch.bfloat16)
    hidden, weight, bias, labels = (inputs.get(key) for key in ("hidden", "weight", "bias", "labels"))
    arguments = (hidden, weight, bias, labels, -100, 5.0, 0.1, 0.1)
    torch.library.opcheck(torch.ops.lmkernels.linear_cross_entropy_fwd.default, arguments)
    for needs in ((True, True, bias is not None), (False, True, False), (True, False, False)):
        torch.library.opcheck(
            torch.ops.lmkernels.linear_cross_entropy_bwd.default, (torch.ones(len(labels)), *arguments, *needs)
        )


@pytest.fixture
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_compiled_call_has_no_graph_break_and_the_same_results(reduction, native, fresh_compiler):
    inputs = CASE["everything odd"].make(torch.float32)
    compiled = torch.compile(linear_cross_entropy, fullgraph=True)
    options = {"reduction": reduction, "z_loss": 0.1, "backend": native}
    torch.testing.assert_close(
        gradients_of(compiled, inputs, **options), gradients_of(linear_cross_entropy, inputs, **options)
    )


def test_dynamic_shapes_compile_once(native, fresh_compiler):
    compiled = torch.compile(linear_cross_entropy, fullgraph=True, dynamic=True)

    def run(t, vocab):
        inputs = cases.LossCase("", t, vocab, 24).make(torch.float32)
        results = [gradients_of(function, inputs, backend=native) for function in (compiled, linear_cross_entropy)]
        torch.testing.assert_close(*results)

    run(48, 80)
    with torch.compiler.set_stance("fail_on_recompile"):
        run(65, 113)


def test_a_wrong_label_in_compiled_code_is_an_error_too(native, fresh_compiler):
    compiled = torch.compile(linear_cross_entropy, fullgraph=True, backend="aot_eager")
    with pytest.raises(RuntimeError, match=r"labels must be in \[0, 11\).*got 11"):
        compiled(torch.randn(3, 4), torch.randn(11, 4), torch.tensor([0, 11, 2]), backend=native)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=short)
def test_autocast_multiplies_in_its_dtype_and_keeps_the_loss_in_float32(dtype, backend):
    inputs = CASE["everything odd"].make(torch.float32)

    def under_autocast(**arguments):
        with torch.autocast(torch.get_default_device().type, dtype):
            return linear_cross_entropy(**arguments)

    loss, gradients = gradients_of(under_autocast, inputs, backend=backend)
    assert loss.dtype == torch.float32 and all(x.dtype == torch.float32 for x in gradients.values())
    narrow = inputs | {"hidden": inputs["hidden"].to(dtype)}
    loss_narrow, gradients_narrow = gradients_of(linear_cross_entropy, narrow, backend=backend)
    torch.testing.assert_close(loss, loss_narrow)
    torch.testing.assert_close(gradients, gradients_narrow, check_dtype=False)


def test_a_scaled_float16_loss_keeps_small_gradients(native):
    """The gradients are computed before the scale is known: they must not be rounded to float16 before it."""
    inputs = CASE["several blocks"].make(torch.float16)
    inputs["weight"] = inputs["weight"].float() * 1e-4
    scale = 2.0**16
    hidden = inputs["hidden"].requires_grad_()
    (actual,) = torch.autograd.grad(linear_cross_entropy(**inputs) * scale, hidden)
    exact = hidden.detach().double().requires_grad_()
    expected_loss = linear_cross_entropy(**inputs | {"hidden": exact, "weight": inputs["weight"].half().double()})
    (expected,) = torch.autograd.grad(expected_loss * scale, exact)
    torch.testing.assert_close(actual.double(), expected, rtol=2e-3, atol=0.01 * expected.abs().max().item())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"hidden": torch.ones(3, 4, dtype=torch.int32)}, TypeError, "hidden must be float32.*int32"),
        ({"weight": torch.ones(11, 5)}, ValueError, r"weight must be \(out, in\) = \(out, 4\), got \(11, 5\)"),
        ({"weight": torch.ones(11, 4).half()}, TypeError, "weight must be torch.float32, got torch.float16"),
        ({"bias": torch.ones(3)}, ValueError, r"bias must be \(out,\) = \(11,\), got \(3,\)"),
        ({"labels": [0, 1, 2]}, TypeError, "labels must be a torch.Tensor, got list"),
        ({"labels": torch.ones(3)}, TypeError, "labels must be int64, got torch.float32"),
        ({"labels": torch.ones(4).long()}, ValueError, r"labels must be \(3,\).*got \(4,\)"),
        ({"labels": torch.tensor([0, 11, 2])}, ValueError, r"labels must be in \[0, 11\).*got 11"),
        ({"labels": torch.tensor([0, 1, -1])}, ValueError, r"labels must be in \[0, 11\).*got -1"),
        ({"ignore_index": 1.5}, TypeError, "ignore_index must be an integer, got float"),
        ({"reduction": "max"}, ValueError, "reduction must be 'mean', 'sum' or 'none', got 'max'"),
        ({"softcap": -1.0}, ValueError, "softcap must be a finite number >= 0"),
        ({"z_loss": float("nan")}, ValueError, "z_loss must be a finite number, got nan"),
        ({"label_smoothing": 1.5}, ValueError, r"label_smoothing must be in \[0, 1\], got 1.5"),
        ({"backend": "cuda"}, ValueError, "backend must be one of native, triton, reference or None, got 'cuda'"),
    ],
)
def test_bad_arguments_are_named(change, error, message):
    arguments = {"hidden": torch.ones(3, 4), "weight": torch.ones(11, 4), "labels": torch.tensor([0, 1, 2])}
    with pytest.raises(error, match=message):
        linear_cross_entropy(**arguments | change)
