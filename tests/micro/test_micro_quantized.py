"""Products of integers, which quantised weights are multiplied with: exact, with the largest numbers too."""

from __future__ import annotations

import numpy as np
import pytest

LARGEST = 127  # what x is scaled to
GROUP = 32  # elements of x


def in_memory(bits: int, weights):
    """Bytes of weights (lanes, 32): 4 neighbours of each lane at a time; with 4 bits two of them share a byte."""
    steps = weights.astype(np.uint8).reshape(len(weights), GROUP // 4, 4).transpose(1, 0, 2)  # (8, lanes, 4)
    return np.ascontiguousarray(steps if bits == 8 else steps[:4] | steps[4:] << 4).ravel()


@pytest.mark.parametrize(("bits", "zero"), [(8, 128), (4, 8)])
def test_products_with_integers_are_exact(isa, bits, zero):
    lanes, largest = isa.float_lanes, 2**bits - 1
    random = np.random.default_rng(0)

    def check(x, weights, factor):
        integers = np.rint(x * np.float32(factor)).astype(np.int64)
        exact = (weights.astype(np.int64) - zero) @ integers
        y = isa.integer_dot(bits, x, factor, in_memory(bits, weights))
        np.testing.assert_array_equal(y, exact.astype(np.float32))

    for _ in range(50):
        x, weights = random.uniform(-1, 1, GROUP), random.integers(0, largest + 1, (lanes, GROUP))
        check(x.astype(np.float32), weights, LARGEST)
        check(random.integers(-3, 4, GROUP).astype(np.float32), weights, 1.0)
    # every element of x meets every weight once, in every lane
    for k in range(GROUP):
        x = np.zeros(GROUP, np.float32)
        x[k] = -LARGEST
        for first in range(0, largest + 1, lanes):
            weights = np.full((lanes, GROUP), zero)
            weights[:, k] = np.minimum(first + np.arange(lanes), largest)
            check(x, weights, 1.0)
    for sign in (-1, 1):
        for weight in (0, largest):
            check(np.full(GROUP, sign * LARGEST, np.float32), np.full((lanes, GROUP), weight), 1.0)
