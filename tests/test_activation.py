"""The activations of the kernels are as exact as their comments say, on every instruction set of this machine."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

BODY = r"""
#include "vec.h"
#include "vecmath.h"
#include "activation_body.h"
namespace lmk { namespace LMK_NS { namespace {
double exact(Activation activation, double x, bool grad) {
  const double cdf = 0.5 * std::erfc(-x * std::sqrt(0.5)), pi = std::acos(-1.0);
  const double u = std::sqrt(2 / pi) * (x + 0.044715 * x * x * x), du = std::sqrt(2 / pi) * (1 + 0.134145 * x * x);
  const double s = 1 / (1 + std::exp(-x)), r = 1 / (1 + std::exp(x));
  const double s_u = 1 / (1 + std::exp(-2 * u)), r_u = 1 / (1 + std::exp(2 * u));
  switch (activation) {
    case Activation::none: return grad ? 1 : x;
    case Activation::gelu: return grad ? cdf + x * std::exp(-0.5 * x * x) / std::sqrt(2 * pi) : x * cdf;
    case Activation::gelu_tanh: return grad ? s_u + x * s_u * r_u * 2 * du : x * s_u;
    case Activation::silu: return grad ? s + x * s * r : x * s;
    case Activation::relu: return grad ? x > 0 : x > 0 ? x : 0;
    case Activation::tanh: return grad ? 1 / std::pow(std::cosh(x), 2) : std::tanh(x);
  }
  return 0;
}

template <class T>
Vec<T> ours(Activation activation, Vec<T> x, bool grad) {
  return grad ? activate_grad<T>(activation, x) : activate<T>(activation, x);
}

template <class T>
T one(Activation activation, double x, bool grad) {
  T y[Vec<T>::kLanes];
  ours<T>(activation, Vec<T>::set1(T(x)), grad).store(y);
  return y[Vec<T>::kLanes - 1];
}

// Errors in ulp of the result, or of `least` where that is more.
template <class T>
double worst(Activation activation, bool grad, double low, double high, double least) {
  constexpr int kSteps = 1 << 18, kLanes = Vec<T>::kLanes;
  double most = 0;
  T x[kLanes], y[kLanes];
  for (int i = 0; i < kSteps; i += kLanes) {
    for (int l = 0; l < kLanes; ++l) x[l] = T(low + (high - low) * (i + l) / kSteps);
    ours<T>(activation, Vec<T>::load(x), grad).store(y);
    for (int l = 0; l < kLanes; ++l) {
      const double wanted = exact(activation, x[l], grad), at = std::max(std::fabs(wanted), least);
      const double ulp = double(std::nextafter(T(at), std::numeric_limits<T>::infinity())) - double(T(at));
      most = std::max(most, std::fabs(y[l] - wanted) / ulp);
    }
  }
  return most;
}

void report(const char* isa) {
  const char* names[] = {"none", "gelu", "gelu_tanh", "silu", "relu", "tanh"};
  for (int i = 0; i < 6; ++i)
    for (bool grad : {false, true}) {
      const Activation f = static_cast<Activation>(i);
      std::printf("%s %s%s near %g all %g double %g nan %d right %g left %g\n", isa, names[i], grad ? "_grad" : "",
                  worst<float>(f, grad, -4, 4, grad), worst<float>(f, grad, -30, 30, 0.01),
                  worst<double>(f, grad, -4, 4, 0.01),
                  std::isnan(one<float>(f, NAN, grad)) && std::isnan(one<double>(f, NAN, grad)),
                  one<float>(f, 1e30, grad), one<float>(f, -1e30, grad));
    }
}
}}}
"""

MAIN = r"""
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <limits>
#include "activation.h"
#define LMK_BODY "body.h"
#include "foreach_isa.h"
namespace lmk {
using Report = void (*)(const char*);
void report_all() {
  static constexpr Report kTable[] = LMK_ISA_TABLE(report);
  for (int i = 0; i <= static_cast<int>(isa()); ++i) kTable[i](isa_name(static_cast<Isa>(i)));
}
}
int main() { lmk::report_all(); }
"""


@pytest.fixture(scope="module")
def tables(tmp_path_factory) -> dict[tuple[str, str], dict[str, float]]:
    """{(instruction set, function): {what: value}}"""
    if (compiler := shutil.which("g++")) is None:
        pytest.skip("g++ is not installed")
    folder = tmp_path_factory.mktemp("activation")
    (folder / "body.h").write_text(BODY)
    (folder / "main.cpp").write_text(MAIN)
    csrc = ROOT / "csrc" / "cpu"
    flags = ["-std=c++20", "-O2", "-w", f"-I{csrc}", f"-I{folder}"]
    subprocess.run([compiler, *flags, "main.cpp", csrc / "isa.cpp", "-o", "main"], cwd=folder, check=True)
    lines = subprocess.run(["./main"], cwd=folder, check=True, capture_output=True, text=True).stdout.splitlines()
    return {
        (isa, function): dict(zip(words[::2], map(float, words[1::2]), strict=True))
        for isa, function, *words in map(str.split, lines)
    }


def of(tables, function, what):
    found = {isa: table[what] for (isa, name), table in tables.items() if name == function}
    assert found
    return found


@pytest.mark.parametrize(
    ("function", "ulps"), [("none", 0), ("gelu", 4), ("gelu_tanh", 20), ("silu", 4), ("relu", 0), ("tanh", 4)]
)
def test_an_activation_is_as_exact_as_it_says(tables, function, ulps):
    near, everywhere, double = (of(tables, function, what) for what in ("near", "all", "double"))
    unfused = near.pop("generic")
    assert unfused <= (7 if function == "gelu" else ulps)
    assert all(error <= ulps for error in near.values())
    assert all(error <= 10 for error in everywhere.values())  # 10 ulp of 0.01: 1e-8
    assert all(error <= 20 for error in double.values())  # what it is measured against errs as much


@pytest.mark.parametrize("function", ["none", "gelu", "gelu_tanh", "silu", "relu", "tanh"])
def test_a_derivative_is_as_exact_as_it_says(tables, function):
    assert all(error <= 2 for error in of(tables, f"{function}_grad", "near").values())


@pytest.mark.parametrize(
    ("function", "left", "right"),
    [("gelu", 0, 1e30), ("gelu_tanh", 0, 1e30), ("silu", 0, 1e30), ("relu", 0, 1e30), ("tanh", -1, 1)],
)
def test_far_out_there_is_no_nan(tables, function, left, right):
    assert all(value == left for value in of(tables, function, "left").values())
    assert all(value == pytest.approx(right) for value in of(tables, function, "right").values())
    slope = 0 if function == "tanh" else 1
    assert all(value == slope for value in of(tables, f"{function}_grad", "right").values())
    assert all(value == 0 for value in of(tables, f"{function}_grad", "left").values())


@pytest.mark.parametrize("function", ["none", "gelu", "gelu_tanh", "silu", "relu", "tanh"])
def test_nan_stays_nan(tables, function):
    assert all(of(tables, function, "nan").values())
