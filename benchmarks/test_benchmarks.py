"""The same cases for pytest-benchmark: `pytest benchmarks --benchmark-autosave`, `--benchmark-compare` and so on."""

from __future__ import annotations

import pytest

from benchmarks import harness
from benchmarks.ops import attention

DTYPES = ("float32", "bfloat16")


@pytest.mark.parametrize("competitor", ["ours", "SDPA"])
@pytest.mark.parametrize("direction", attention.PASSES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", attention.every_case(), ids=str)
def test_attention(case, dtype, direction, competitor, benchmark):
    if direction not in attention.passes(case):
        pytest.skip("nobody trains with one query")
    benchmark.group = f"{case.name} {dtype} {direction}"
    if competitor == "ours":
        assert attention.wrong(case, harness.DTYPES[dtype]) is None
    benchmark(attention.competitors(case, harness.DTYPES[dtype], direction)[competitor])
