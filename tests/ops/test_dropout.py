"""Dropout of hidden states: its decisions against Philox's reference, and what surrounds them."""

import pytest
import torch
from torch import nn

from lmkernels.ops.dropout import STEPS, drop
from lmkernels.ops.philox import philox

pytestmark = pytest.mark.usefixtures("native")

ON_EVERY_ISA = r"philoxs"
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
CODES = {dtype: code for code, dtype in enumerate(FLOATS)}
SIZES = (0, 1, 7, 127, 128, 130, 20_000)


def kept(n: int, dropped: int, seed: int) -> torch.Tensor:
    """(n,) bool, from the reference of Philox."""
    counters = torch.arange((n + 7) // 8)
    words = torch.stack(philox((counters, *torch.zeros(3, dtype=torch.int64)), torch.tensor(seed)), dim=-1)
    halves = torch.stack([words & 0xFFFF, words >> 16], dim=-1)  # (counters, 4, 2)
    return halves.flatten()[:n] >= dropped


def rounded_close(got, want):
    """Equal up to the rounding of one product and one sum."""
    eps = torch.finfo(got.dtype).eps
    return torch.allclose(got.double(), want, rtol=2 * eps, atol=2 * eps)


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize(
    ("x_dtype", "dtype"),
    [*((dtype, dtype) for dtype in FLOATS)]
    + [(x, y) for x in FLOATS[:3] for y in FLOATS[:3] if {x.itemsize, y.itemsize} == {2, 4}],
    ids=lambda dtype: str(dtype).removeprefix("torch."),
)
def test_kept_elements_are_philoxs(n, x_dtype, dtype):
    torch.manual_seed(n)
    x, residual = torch.randn(n).to(x_dtype), torch.randn(n).to(dtype)
    dropped, seed = 19_661, 2**61 + 12_345
    want = x.double() * kept(n, dropped, seed) * (STEPS / (STEPS - dropped))
    got = torch.ops.lmkernels.dropout(x, None, dropped, seed, CODES[dtype])
    assert got.dtype == dtype
    assert rounded_close(got, want)
    got = torch.ops.lmkernels.dropout(x, residual, dropped, seed, CODES[dtype])
    assert rounded_close(got, want + residual.double())


def test_the_number_of_threads_changes_nothing():
    x = torch.randn(300, 411)
    results = []
    threads = torch.get_num_threads()
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(torch.ops.lmkernels.dropout(x, None, 6_554, 7, 0))
    torch.set_num_threads(threads)
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_drops_its_share_and_keeps_the_mean(p):
    x = torch.ones(501, 403)
    y = drop(nn.Dropout(p), x)
    spread = (p * (1 - p) / x.numel()) ** 0.5
    assert abs((y == 0).double().mean() - p) < 5 * spread + 2**-16
    assert torch.allclose(y[y > 0], torch.tensor(1 / (1 - p)), rtol=2**-15 / (1 - p))
    # neighbours share a word, and those eight apart a place in their counters
    for step in (1, 8):
        together = ((y[:, step:] == 0) & (y[:, :-step] == 0)).double().mean()
        assert abs(together - p * p) < 5 * p * (1 / x.numel()) ** 0.5 + 2**-15


def test_gradients_to_the_second_order():
    x = torch.randn(5, 13, dtype=torch.float64, requires_grad=True)
    residual = torch.randn(13, 5, dtype=torch.float64).t().requires_grad_()
    module = nn.Dropout(0.4)

    def seeded(x, residual):
        torch.manual_seed(3)
        return drop(module, x, residual)

    assert torch.autograd.gradcheck(seeded, (x, residual))
    assert torch.autograd.gradgradcheck(seeded, (x, residual))


def test_mixed_dtypes_have_gradients_in_their_own():
    x, residual = torch.randn(9, 31).bfloat16().requires_grad_(), torch.randn(9, 31, requires_grad=True)
    y = drop(nn.Dropout(0.5), x, residual)
    dy = torch.randn_like(y)
    dx, dresidual = torch.autograd.grad(y, (x, residual), dy)
    assert (y.dtype, dx.dtype, dresidual.dtype) == (torch.float32, torch.bfloat16, torch.float32)
    assert torch.equal(dresidual, dy)
    assert torch.equal(dx == 0, y == residual)
    assert torch.allclose(dx[dx != 0].float(), 2 * dy[dx != 0], rtol=2**-8)


def test_seeds_come_from_torchs_generator():
    x = torch.randn(4, 33)
    torch.manual_seed(1)
    first, second = drop(nn.Dropout(0.5), x), drop(nn.Dropout(0.5), x)
    torch.manual_seed(1)
    assert torch.equal(drop(nn.Dropout(0.5), x), first)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("p", [0.0, 1.0])
def test_none_and_all_are_torchs(p):
    x, residual = torch.randn(3, 5), torch.randn(3, 5)
    assert torch.equal(drop(nn.Dropout(p), x, residual), residual + (1 - p) * x)
    assert torch.equal(drop(nn.Dropout(p).eval(), x, residual), residual + x)


def test_a_broadcast_residual_or_a_foreign_dtype_is_torchs():
    x = torch.randn(3, 5)
    assert drop(nn.Dropout(0.5), x, torch.zeros(5)).shape == (3, 5)
    assert drop(nn.Dropout(0.5), x, torch.zeros(3, 5, dtype=torch.float64)).dtype == torch.float64


def test_opcheck():
    x, residual = torch.randn(3, 7), torch.randn(3, 7).bfloat16()
    for args in ((x, None, 99, 5, 0), (x, residual, 99, 5, 1), (residual, x, 99, 5, 0)):
        torch.library.opcheck(torch.ops.lmkernels.dropout.default, args)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dropped": STEPS}, "dropped"),
        ({"dtype": 3}, "one dtype, or 16 bits and float32"),
        ({"residual": torch.zeros(2, 7)}, "residual must have x's shape"),
        ({"residual": torch.zeros(3, 7).bfloat16()}, "residual must have x's shape and the dtype of the result"),
    ],
)
def test_bad_calls_of_the_op_say_what_is_wrong(change, message):
    arguments = {"residual": None, "dropped": 99, "seed": 5, "dtype": 0} | change
    with pytest.raises(RuntimeError, match=message):
        torch.ops.lmkernels.dropout(torch.zeros(3, 7), *arguments.values())
