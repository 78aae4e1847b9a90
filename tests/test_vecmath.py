"""The vector functions of the kernels are as exact as their comments say, on every instruction set of this machine."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

BODY = r"""
#include "vec.h"
#include "vecmath.h"
namespace lmk { namespace LMK_NS { namespace {
template <class T>
double ulps(double wanted, T got) {
  const double spacing = double(std::nextafter(T(std::fabs(wanted)), std::numeric_limits<T>::infinity())) -
                         double(T(std::fabs(wanted)));
  return std::fabs(double(got) - wanted) / spacing;
}

template <class T, class F, class G>
double worst(F vector, G exact, T low, T high, int steps) {
  double most = 0;
  T x[Vec<T>::kLanes], y[Vec<T>::kLanes];
  for (int i = 0; i < steps; i += Vec<T>::kLanes) {
    for (int l = 0; l < Vec<T>::kLanes; ++l) x[l] = low + (high - low) * T(double(i + l) / steps);
    vector(Vec<T>::load(x)).store(y);
    for (int l = 0; l < Vec<T>::kLanes; ++l) most = std::max(most, ulps<T>(exact(x[l]), y[l]));
  }
  return most;
}

template <class T>
T one(Vec<T> v) { T x[Vec<T>::kLanes]; v.store(x); return x[0]; }

void report(const char* isa) {
  const int n = 1 << 20;
  const float inf = std::numeric_limits<float>::infinity();
  float x[16];
  double y[16], log_worst = 0;
  for (int i = 0; i < n; i += 16) {
    for (int l = 0; l < 16; ++l) x[l] = std::exp2(-20.f + 60.f * float(i + l) / n);
    log_row(x, 16, y);
    for (int l = 0; l < 16; ++l)
      log_worst = std::max(log_worst, std::fabs(y[l] - std::log(double(x[l]))) / 4e-8);
  }
  std::printf("%s exp %g exp_far %g exp64 %g tanh %g log %g zero %d nan %d\n", isa,
      worst<float>([](Vec<float> v) { return exp(v); }, [](double v) { return std::exp(v); }, -20.f, 20.f, n),
      worst<float>([](Vec<float> v) { return exp(v); }, [](double v) { return std::exp(v); }, -87.f, 88.f, n),
      worst<double>([](Vec<double> v) { return exp(v); }, [](double v) { return std::exp(v); }, -20.0, 20.0, n),
      worst<float>([](Vec<float> v) { return tanh(v); }, [](double v) { return std::tanh(v); }, -30.f, 30.f, n),
      log_worst, one(exp(Vec<float>::set1(-inf))) == 0 && one(exp(Vec<double>::set1(-inf))) == 0 &&
      one(exp(Vec<float>::set1(-500.f))) == 0 && one(exp(Vec<float>::set1(0.f))) == 1,
      std::isnan(one(exp(Vec<float>::set1(NAN)))) && std::isnan(one(exp(Vec<double>::set1(NAN)))) &&
      std::isnan(one(tanh(Vec<float>::set1(NAN)))));
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
def errors(tmp_path_factory) -> dict[str, dict[str, float]]:
    """{instruction set: {function: largest error in units of the last place}}"""
    if (compiler := shutil.which("g++")) is None:
        pytest.skip("g++ is not installed")
    folder = tmp_path_factory.mktemp("vecmath")
    (folder / "body.h").write_text(BODY)
    (folder / "main.cpp").write_text(MAIN)
    csrc = ROOT / "csrc" / "cpu"
    flags = ["-std=c++20", "-O2", "-w", f"-I{csrc}", f"-I{folder}"]
    subprocess.run([compiler, *flags, "main.cpp", csrc / "isa.cpp", "-o", "main"], cwd=folder, check=True)
    lines = subprocess.run(["./main"], cwd=folder, check=True, capture_output=True, text=True).stdout.splitlines()
    tables = {}
    for isa, *words in map(str.split, lines):
        tables[isa] = {name: float(value) for name, value in zip(words[::2], words[1::2], strict=True)}
    return tables


@pytest.mark.parametrize(
    ("function", "ulps"), [("exp", 1.5), ("exp_far", 1.5), ("exp64", 2.0), ("tanh", 2.0), ("log", 1.0)]
)
def test_a_function_is_as_exact_as_it_says(errors, function, ulps):
    assert {isa: table[function] for isa, table in errors.items() if not table[function] <= ulps} == {}


def test_minus_infinity_gives_exactly_0_and_0_exactly_1(errors):
    assert all(table["zero"] == 1 for table in errors.values())


def test_nan_stays_nan(errors):
    assert all(table["nan"] == 1 for table in errors.values())
