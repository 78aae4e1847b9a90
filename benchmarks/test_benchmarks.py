"""The same lines for pytest-benchmark: `pytest benchmarks --benchmark-autosave`, `--benchmark-compare` and so on."""

from __future__ import annotations

import pytest

from benchmarks.__main__ import load, names

LINES = [
    line
    for name in names()
    if hasattr(module := load(name), "lines")
    for line in module.lines()
    if line.dtype in ("float32", "bfloat16")
]


@pytest.mark.parametrize("line", LINES, ids=lambda line: line.name)
def test_ours(line, benchmark):
    benchmark.group = line.name
    assert line.wrong() is None
    benchmark(line.competitors()["ours"])


@pytest.mark.parametrize("line", LINES, ids=lambda line: line.name)
def test_best_known_peer(line, benchmark):
    """The first peer: what a user would run instead."""
    benchmark.group = line.name
    _, peer, *_ = line.competitors().values()
    benchmark(peer)
