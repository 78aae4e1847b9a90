"""Rows in any dtype to float and back, and packed as the products read them, for every value and every length.

Each row and each destination is an array of its own that ends where it is promised to end: what reads or writes beyond
is caught by the sanitizers, and what writes beyond within the array by the values.
"""

from __future__ import annotations

import os
from functools import cache

import numpy as np
import pytest
import torch

STRIDE = int(os.environ.get("LMKERNELS_SWEEP_STRIDE", 2003))  # see test_micro_math.py
F32, BF16, F16, F64 = range(4)  # enum class DType
DTYPES = {F32: np.float32, BF16: np.uint16, F16: np.uint16, F64: np.float64}
HALF_BITS = np.arange(1 << 16, dtype=np.uint16)


def wide(dtype: int) -> type:
    return np.float64 if dtype == F64 else np.float32


def bf16_to_float(bits):
    return (bits.astype(np.uint32) << 16).view(np.float32)


def to_float(dtype: int, x):
    """The values of an array of elements of `dtype`."""
    return {BF16: bf16_to_float, F16: lambda bits: bits.view(np.float16).astype(np.float32)}.get(dtype, np.asarray)(x)


def bf16_bits(x):
    return torch.from_numpy(x).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)


def f16_bits(x):
    with np.errstate(over="ignore"):
        return x.astype(np.float16).view(np.uint16)


@cache
def floats_to_round(dtype: int):
    """Floats of both signs, every exponent and every upper mantissa, just at, below and above what decides a rounding;
    and what they are as 16-bit numbers."""
    low = 16 if dtype == BF16 else 13  # bits that are rounded away
    below = np.array([0, 1, (1 << low - 1) - 1, 1 << low - 1, (1 << low - 1) + 1, (1 << low) - 1], np.uint32)
    above = np.arange(1 << 32 - low, dtype=np.uint32) << np.uint32(low)
    x = (above[:, None] | below).ravel().view(np.float32)
    x = x[:: -(-STRIDE // 2003)].copy()
    if dtype == F16:  # where it is denormal, the bits that decide lie higher
        x = np.concatenate([x, np.ldexp(np.arange(-4100, 4100, dtype=np.float32), -26)])
    return x, (bf16_bits if dtype == BF16 else f16_bits)(x)


def assert_same_floats(actual, expected):
    """Bit for bit, the sign of 0 included; a NaN is a NaN."""
    nan = np.isnan(expected)
    np.testing.assert_array_equal(np.isnan(actual), nan)
    np.testing.assert_array_equal(actual.view(np.uint32)[~nan], expected.view(np.uint32)[~nan])


def assert_same_halves(dtype, actual, expected):
    nan = np.isnan(to_float(dtype, expected))
    np.testing.assert_array_equal(np.isnan(to_float(dtype, actual)), nan)
    np.testing.assert_array_equal(actual[~nan], expected[~nan])


@pytest.mark.parametrize("dtype", [BF16, F16], ids=["bfloat16", "float16"])
def test_every_16_bit_number_is_read_exactly(isa, dtype):
    expected = to_float(dtype, HALF_BITS)
    y = np.empty(HALF_BITS.size, np.float32)
    isa.load_row(dtype, HALF_BITS, HALF_BITS.size, y)
    assert_same_floats(y, expected)
    if dtype == F16:
        assert_same_floats(isa.from_f16(HALF_BITS), expected)


@pytest.mark.parametrize("dtype", [BF16, F16], ids=["bfloat16", "float16"])
def test_floats_are_rounded_to_the_nearest_even_16_bit_number(isa, dtype):
    x, expected = floats_to_round(dtype)
    y = np.empty(x.size, np.uint16)
    isa.store_row(dtype, x, x.size, y)
    assert_same_halves(dtype, y, expected)
    assert_same_halves(dtype, (isa.to_bf16 if dtype == BF16 else isa.to_f16)(x), expected)


def some_row(dtype: int, n: int):
    """n elements without a NaN that are all different, and none of them 0."""
    if dtype in (BF16, F16):
        return np.arange(0x3C01, 0x3C01 + n, dtype=np.uint16)
    return np.arange(1, n + 1, dtype=DTYPES[dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16", "float16", "float64"])
def test_rows_of_every_length_are_read_and_written_to_their_end(isa, dtype):
    for n in range(70):
        x = some_row(dtype, n)
        y = np.empty(n, wide(dtype))
        isa.load_row(dtype, x, n, y)
        np.testing.assert_array_equal(y, to_float(dtype, x))
        back = np.empty_like(x)
        isa.store_row(dtype, y, n, back)
        np.testing.assert_array_equal(back, x)


# --- packing; a product's elements are float32, float64, or pairs of bfloat16 in uint32

PRODUCTS = {"float32": np.float32, "float64": np.float64, "bfloat16 pairs": np.uint32}
# (elements of the product, dtype of the rows)
PACKED = {
    "float32": ("float32", F32),
    "float32 of bfloat16": ("float32", BF16),
    "float32 of float16": ("float32", F16),
    "float64": ("float64", F64),
    "bfloat16 pairs": ("bfloat16 pairs", BF16),
    "bfloat16 pairs of float32": ("bfloat16 pairs", F32),
}
packed = pytest.mark.parametrize(("elements", "dtype"), PACKED.values(), ids=PACKED.keys())
UNWRITTEN = 0x5A


def rows_of(dtype: int, n: int, n_cols: int) -> list:
    every = some_row(dtype, n * n_cols)
    return [every[i * n_cols : (i + 1) * n_cols].copy() for i in range(n)]


def lanes_of(isa, elements: str) -> int:
    return isa.double_lanes if elements == "float64" else isa.float_lanes


def by_tiles(isa, elements: str) -> bool:
    return isa.__name__ == "micro.amx" and elements.startswith("bfloat16")


def panel_of(isa, elements: str) -> int:
    """Columns of a packed panel of B."""
    return (2 if by_tiles(isa, elements) else isa.tile_vecs) * lanes_of(isa, elements)


def skip_without(isa, elements: str) -> None:
    if elements == "bfloat16 pairs" and not isa.has_bf16_products:
        pytest.skip("this instruction set multiplies no bfloat16")


def fresh(shape: tuple, elements: str):
    size = int(np.prod(shape)) * np.dtype(PRODUCTS[elements]).itemsize
    return np.full(size, UNWRITTEN, np.uint8).view(PRODUCTS[elements]).reshape(shape)


def in_pairs(x, axis: int):
    """(..., 2 n or 2 n - 1, ...) bfloat16 -> (..., n, ...) uint32, the earlier one in the low half."""
    x = np.moveaxis(x, axis, -1)
    if x.shape[-1] % 2:
        x = np.concatenate([x, np.zeros_like(x[..., :1])], -1)
    pairs = x[..., ::2].astype(np.uint32) | x[..., 1::2].astype(np.uint32) << 16
    return np.moveaxis(pairs, -1, axis)


def as_elements(rows: list, dtype: int, elements: str, pair_axis: int):
    x = np.stack(rows)
    if elements != "bfloat16 pairs":
        return to_float(dtype, x)
    return in_pairs(bf16_bits(x) if dtype == F32 else x, pair_axis)


def padded(x, shape: tuple):
    y = np.zeros(shape, x.dtype)
    y[tuple(slice(n) for n in x.shape)] = x
    return y


@packed
@pytest.mark.parametrize("way", ["rows", "depth"])
def test_packed_rows_are_zero_beyond_their_end(isa, elements, dtype, way):
    skip_without(isa, elements)
    pack = getattr(isa, f"pack_{way}")
    for n in (1, 2, 5):
        for n_cols in [*range(1, 36), 63, 64, 65, 97]:
            rows = rows_of(dtype, n, n_cols)
            expected = as_elements(rows, dtype, elements, 1 if way == "rows" else 0)
            for ld in (expected.shape[1], expected.shape[1] + 1, expected.shape[1] + 19):
                dst = fresh((expected.shape[0], ld), elements)
                pack(dtype, rows, n_cols, dst.ravel(), ld)
                np.testing.assert_array_equal(dst, padded(expected, dst.shape), f"{n} rows of {n_cols}, ld {ld}")


@packed
def test_packed_columns_are_panels_that_are_zero_beyond_the_last_row(isa, elements, dtype):
    skip_without(isa, elements)
    lanes = lanes_of(isa, elements)
    panel = panel_of(isa, elements)
    for n in sorted({1, 2, lanes - 1, lanes, lanes + 1, panel - 1, panel, panel + 1, 2 * panel + lanes} - {0}):
        for n_cols in [1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 48, 64]:
            rows = rows_of(dtype, n, n_cols)
            columns = as_elements(rows, dtype, elements, 1).T  # (depth, n)
            depth, panels = columns.shape[0], -(-n // panel)
            # the vectors that hold a row, or pairs of them for tiles; what is beyond in the last panel is not written
            unit = 2 * lanes if by_tiles(isa, elements) else lanes
            whole = -(-n // unit) * unit
            dst = fresh((panels, depth, panel), elements)
            buffer = fresh((lanes, -(-depth // 16) * 16), elements)
            isa.pack_columns(dtype, rows, n_cols, dst.ravel(), buffer.ravel())
            expected = padded(columns, (depth, whole))
            actual = np.concatenate(list(dst), 1)  # (depth, panels * panel)
            np.testing.assert_array_equal(actual[:, :whole], expected, f"{n} rows of {n_cols}")
            assert (np.ascontiguousarray(actual[:, whole:]).view(np.uint8) == UNWRITTEN).all()


def test_a_tile_is_transposed(isa):
    if not hasattr(isa, "transpose_tile"):
        pytest.skip("this instruction set has no transposition of its own")
    lanes = isa.float_lanes
    for k in (0, 3):
        rows = [np.arange(k + lanes, dtype=np.uint32) + 1000 * i for i in range(lanes)]
        dst = np.full((lanes, lanes + 2), 7, np.uint32)
        # the last row ends with its last element
        exact = dst.ravel()[: lanes * (lanes + 2) - 2].copy()
        isa.transpose_tile(rows, k, exact, lanes + 2)
        dst.ravel()[: exact.size] = exact
        np.testing.assert_array_equal(dst[:, :lanes], np.stack(rows)[:, k:].T)
        assert (dst[:, lanes:] == 7).all()


def test_floats_are_rounded_into_pairs(isa):
    if not isa.has_bf16_products:
        pytest.skip("this instruction set multiplies no bfloat16")
    x, rounded = floats_to_round(BF16)
    kept = (np.abs(x) >= 2.0**-126) & np.isfinite(x)  # the instruction rounds a denormal to 0
    x, rounded = x[kept], rounded[kept]
    for n in [*range(16, 160, 16), x.size // 32 * 32]:
        dst = np.empty(n // 2, np.uint32)
        isa.pack_row(x[:n].copy(), dst)
        np.testing.assert_array_equal(dst, in_pairs(rounded[:n], 0))
        dst = np.empty(n, np.uint32)
        isa.pack_row_pair(x[:n].copy(), x[-n:].copy(), dst)
        np.testing.assert_array_equal(dst, in_pairs(np.stack([rounded[:n], rounded[-n:]]), 0)[0])
