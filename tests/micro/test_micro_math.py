"""The functions of vecmath.h and activation_body.h are as exact as their comments say, and vec.h does what it says."""

from __future__ import annotations

import math
import os
from functools import cache

import numpy as np
import pytest

# Every so manieth of the 2^32 floats is tried. Odd, so that all exponents and all kinds of mantissas are among them; 1
# tries all, which takes some minutes.
STRIDE = int(os.environ.get("LMKERNELS_SWEEP_STRIDE", 2003))
CHUNK = 1 << 22
LEAST_NORMAL = 2.0**-126
DOUBLES = min(1 << 19, 2**32 // STRIDE)

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def floats(low=-math.inf, high=math.inf):
    """Floats of the whole range that lie in [low, high], in chunks; none is NaN."""
    for first in range(0, 2**32, CHUNK * STRIDE):
        bits = np.arange(first, min(first + CHUNK * STRIDE, 2**32), STRIDE, dtype=np.int64)
        x = bits.astype(np.uint32).view(np.float32)
        yield x[(x >= np.float32(low)) & (x <= np.float32(high))]


def ulps(actual, exact):
    """Errors in units of the last place of `exact` in actual's dtype."""
    spacing = np.spacing(np.abs(exact).astype(actual.dtype)).astype(np.float64)
    return np.abs(actual.astype(np.float64) - exact) / spacing


def worst_ulps(function, exact, low=-math.inf, high=math.inf):
    return max(float(ulps(function(x), exact(x.astype(np.float64))).max()) for x in floats(low, high) if x.size)


def test_exp_is_as_exact_as_it_says(isa):
    fused = isa.float_lanes > 4
    assert worst_ulps(isa.exp, np.exp, math.log(LEAST_NORMAL), 88.0) <= (1.2 if fused else 1.5)


def test_exp_of_doubles_is_as_exact_as_it_says(isa):
    for low, high in [(-708.3964185322641, 708.0), (-2.0, 2.0), (-1e-8, 1e-8)]:
        x = np.linspace(low, high, DOUBLES)
        assert ulps(isa.exp(x), np.exp(x)).max() <= 2.0  # of which numpy has up to 1


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_exp_of_little_is_0_or_denormal_and_of_0_exactly_1(isa, dtype):
    least_normal = float(np.finfo(dtype).tiny)
    edge = math.log(least_normal)
    x = np.concatenate([np.linspace(edge - 100, edge, 9999)[:-1], [-1e4, -1e30, -np.finfo(dtype).max, -np.inf]])
    x = x.astype(dtype)[x.astype(dtype) < edge]
    y, exact = isa.exp(x), np.exp(x.astype(np.float64))
    assert ((y == 0) | (np.abs(y - exact) <= 2 * float(np.finfo(dtype).smallest_subnormal))).all()
    assert (y[x < edge - 50] == 0).all() and y[-1] == 0
    assert (isa.exp(np.array([0.0, -0.0], dtype)) == 1).all()
    assert (isa.exp(np.nextafter(np.array([edge], dtype), dtype(0))) >= least_normal * 0.999).all()


def test_exp_for_bfloat16_weights_is_as_exact_as_it_says(isa):
    if not isa.has_bf16_products:
        pytest.skip("this instruction set multiplies no bfloat16")
    for x in floats(-87.0, 88.0):
        exact = np.exp(x.astype(np.float64))
        assert not x.size or np.abs(isa.exp_bf16(x) / exact - 1).max() <= 8e-6
    small = isa.exp_bf16(np.array([0.0, -88.0, -140.0, -1e30, -np.inf, np.nan], np.float32))
    assert small[0] == 1 and 0 <= small[1] < LEAST_NORMAL and (small[2:5] == 0).all() and np.isnan(small[5])


def test_exp2_for_weights_of_two_bfloat16_is_as_exact_as_it_says(isa):
    if not isa.has_bf16_products:
        pytest.skip("this instruction set multiplies no bfloat16")
    for x in floats(-126.0, 127.0):
        assert not x.size or np.abs(isa.exp2(x) / np.exp2(x.astype(np.float64)) - 1).max() <= 2e-7
    small = isa.exp2(np.array([0.0, -127.0, -200.0, -1e30, -np.inf, np.nan], np.float32))
    assert small[0] == 1 and 0 <= small[1] < LEAST_NORMAL and (small[2:5] == 0).all() and np.isnan(small[5])


def test_tanh_is_as_exact_as_it_says(isa):
    assert worst_ulps(isa.tanh, np.tanh) <= 1.4
    x = np.linspace(-20.0, 20.0, DOUBLES)
    assert ulps(isa.tanh(x), np.tanh(x)).max() <= 3.0  # two of the standard library's functions


def test_log_is_as_exact_as_it_says(isa):
    for x in floats(LEAST_NORMAL, float(np.finfo(np.float32).max)):
        exact = np.log(x.astype(np.float64))
        limit = np.minimum(2.6e-8, np.spacing(np.abs(exact).astype(np.float32)).astype(np.float64))
        assert (np.abs(isa.log_row(x) - exact) <= limit).all()
    x = np.exp(np.linspace(-700.0, 700.0, DOUBLES))
    assert ulps(isa.log_row(x), np.log(x)).max() <= 2.0
    assert isa.log_row(np.ones(3, np.float32)).tolist() == [0.0] * 3


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", ["exp", "tanh", "log_row"])
def test_nan_stays_nan(isa, name, dtype):
    """In every lane and beside numbers, which it must not touch."""
    function = getattr(isa, name)
    for lane in range(17):
        x = np.linspace(0.5, 2.0, 17, dtype=dtype)
        clean = function(x)
        x[lane] = np.nan
        y = function(x)
        assert np.isnan(y[lane])
        assert (np.delete(y, lane) == np.delete(clean, lane)).all()


# --- activations; enum class Activation counts them in this order


def _cdf(x):
    return 0.5 * _erfc(x * -math.sqrt(0.5))


_erfc = np.vectorize(math.erfc, otypes=[np.float64])


def _sigmoid(x):
    return 1 / (1 + np.exp(-x))


def _cubic(x):
    return math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)


def _gelu_tanh_grad(x):
    s, rest = _sigmoid(2 * _cubic(x)), _sigmoid(-2 * _cubic(x))
    return s + x * s * rest * 2 * math.sqrt(2 / math.pi) * (1 + 0.134145 * x**2)


ACTIVATIONS = {
    "none": (lambda x: x, np.ones_like),
    "gelu": (lambda x: x * _cdf(x), lambda x: _cdf(x) + x * np.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)),
    "gelu_tanh": (lambda x: x * _sigmoid(2 * _cubic(x)), _gelu_tanh_grad),
    "silu": (lambda x: x * _sigmoid(x), lambda x: _sigmoid(x) * (1 + x * _sigmoid(-x))),
    "relu": (lambda x: np.maximum(x, 0), lambda x: (x > 0).astype(x.dtype)),
    "tanh": (np.tanh, lambda x: 1 / np.cosh(x) ** 2),
}
# For |x| <= 4, in ulp of the result; without fused multiply-add gelu has 7.
ULPS = {"none": 0, "gelu": 4, "gelu_tanh": 20, "silu": 4, "relu": 0, "tanh": 4}


@cache
def activation_samples(name: str, grad: bool, low: float, high: float, dtype) -> tuple[np.ndarray, np.ndarray]:
    """Arguments, and the exact results in float64."""
    x = np.linspace(low, high, min(1 << 17, DOUBLES)).astype(dtype)
    return x, ACTIVATIONS[name][grad](x.astype(np.float64))


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_an_activation_is_as_exact_as_it_says(isa, name):
    activation = list(ACTIVATIONS).index(name)
    limit = 7 if name == "gelu" and isa.float_lanes == 4 else ULPS[name]
    x, exact = activation_samples(name, False, -4.0, 4.0, np.float32)
    assert ulps(isa.activate(activation, x), exact).max() <= limit
    x, exact = activation_samples(name, False, -30.0, 30.0, np.float32)
    error = np.abs(isa.activate(activation, x) - exact)
    assert (error <= np.maximum(1e-8, limit * np.spacing(np.abs(exact).astype(np.float32)))).all()
    x, exact = activation_samples(name, False, -4.0, 4.0, np.float64)
    # what it is measured against errs as much
    assert (np.abs(isa.activate(activation, x) - exact) <= 20 * np.spacing(np.maximum(np.abs(exact), 0.01))).all()


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_derivative_is_as_exact_as_it_says(isa, name, dtype):
    activation = list(ACTIVATIONS).index(name)
    x, exact = activation_samples(name, True, -4.0, 4.0, dtype)
    error = np.abs(isa.activate_grad(activation, x) - exact) / np.spacing(np.maximum(np.abs(exact), 1).astype(dtype))
    assert error.max() <= (2 if dtype == np.float32 else 8)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_an_activation_for_bfloat16_is_as_exact_as_it_says(isa, name):
    if not isa.has_bf16_products:
        pytest.skip("this instruction set has no products of bfloat16")
    activation = list(ACTIVATIONS).index(name)
    x, exact = activation_samples(name, False, -8.0, 8.0, np.float32)
    there = np.abs(exact) > 1e-30
    assert np.abs(isa.activate_bf16(activation, x)[there] / exact[there] - 1).max() <= 3e-4
    x, exact = activation_samples(name, True, -8.0, 8.0, np.float32)
    assert (np.abs(isa.activate_grad_bf16(activation, x) - exact) / np.maximum(np.abs(exact), 1)).max() <= 3e-4
    far = np.array([-1e30, -30.0, 30.0, 1e30, np.nan], np.float32)
    y, slope = isa.activate_bf16(activation, far), isa.activate_grad_bf16(activation, far)
    np.testing.assert_allclose(y, isa.activate(activation, far), rtol=3e-4, atol=1e-8)
    np.testing.assert_allclose(slope, isa.activate_grad(activation, far), rtol=3e-4, atol=1e-8)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_far_out(isa, name, dtype):
    activation = list(ACTIVATIONS).index(name)
    x = np.array([-np.inf, -1e30, 1e30, np.nan], dtype)[1:]
    y, slope = isa.activate(activation, x), isa.activate_grad(activation, x)
    big = dtype(1e30)
    assert y[0] == {"none": -big, "tanh": -1}.get(name, 0) and y[1] == pytest.approx(1 if name == "tanh" else big)
    assert slope[:2].tolist() == {"none": [1, 1], "tanh": [0, 0]}.get(name, [0, 1])
    assert np.isnan(y[2]) and (np.isnan(slope[2]) or name in ("none", "relu"))


# --- vec.h


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_round_small_rounds_ties_to_even(isa, dtype):
    limit = 2.0**22 if dtype == np.float32 else 2.0**51
    some = np.random.default_rng(0)
    x = np.concatenate([np.arange(-4, 4.25, 0.25), limit - np.arange(1, 9) / 2, some.uniform(-limit, limit, 5000),
                        some.uniform(-200, 200, 5000)]).astype(dtype)  # fmt: skip
    x = x[np.abs(x) < limit]
    np.testing.assert_array_equal(isa.round_small(x), np.rint(x))
    np.testing.assert_array_equal(isa.round_small(-x), np.rint(-x))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_scale_by_power_is_exact(isa, dtype):
    low, high = (-126, 127) if dtype == np.float32 else (-1022, 1023)
    n = np.arange(low, high + 1)
    for x in (1.0, -1.5, 1 / 3, 1.9999999, 0.0, np.inf):
        x = np.full(n.size, x, dtype)
        np.testing.assert_array_equal(isa.scale_by_power(x, n.astype(dtype)), np.ldexp(x, n))
    assert np.isnan(isa.scale_by_power(np.full(3, np.nan, dtype), np.full(3, np.nan, dtype))).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_max_min_and_less_take_the_second_where_either_is_nan(isa, dtype):
    values = np.array([-np.inf, -2.0, 0.0, 1e-30, 3.0, np.inf, np.nan], dtype)
    a, b = (x.ravel() for x in np.meshgrid(values, values))
    np.testing.assert_array_equal(isa.max(a, b), np.where(a > b, a, b))
    np.testing.assert_array_equal(isa.min(a, b), np.where(a < b, a, b))
    np.testing.assert_array_equal(isa.less(a, b), a < b)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_reductions_take_every_lane_once(isa, dtype):
    lanes = isa.float_lanes if dtype == np.float32 else isa.double_lanes
    assert isa.reduce_add(2.0 ** np.arange(lanes, dtype=dtype)) == 2.0**lanes - 1
    for lane in range(lanes):
        x = np.full(lanes, -np.inf, dtype)
        x[lane] = -5
        assert isa.reduce_max(x) == -5
