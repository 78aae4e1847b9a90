"""Register tiles of every size: exact on integers, which leaves no room for a wrong index, and accurate on others.

Every operand is an array that ends with the last element that the product may read.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_micro_rows import PRODUCTS, bf16_bits, bf16_to_float, in_pairs, lanes_of, panel_of, skip_without

ZERO, ADD, SCALE_AND_ADD = range(3)  # enum class Start
UNTOUCHED = -77.0

elements_ = pytest.mark.parametrize("elements", PRODUCTS)


def wide(elements: str) -> type:
    return np.float64 if elements == "float64" else np.float32


def lay(x, memory, offset: int, strides: tuple[int, int]) -> None:
    """Writes x into 1-D memory, at these strides."""
    view = memory[offset : offset + extent(x.shape, strides)]
    np.lib.stride_tricks.as_strided(view, x.shape, [n * x.itemsize for n in strides])[...] = x


def extent(shape: tuple[int, int], strides: tuple[int, int]) -> int:
    """Elements from the first to the last one of x, both included."""
    return sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True)) + 1 if 0 not in shape else 0


def laid_out(x, strides: tuple[int, int]):
    memory = np.zeros(extent(x.shape, strides), x.dtype)
    lay(x, memory, 0, strides)
    return memory


def multiply(
    isa, elements, a, b, c, factor, start, *, a_order="rows", a_gap=0, b_panels=False, b_gap=0, c_gap=0
) -> np.ndarray:
    """`c` after the product; a (rows, depth), b (depth, cols) and c (rows, cols) in float32 or float64.

    a_order: depth is contiguous in "rows" and rows are in "columns"; *_gap: elements between two lines
    b_panels: b in panels (depth, panel), as pack_columns leaves them
    """
    lanes = lanes_of(isa, elements)
    rows, vecs = a.shape[0], b.shape[1] // lanes
    if elements == "bfloat16 pairs":
        a, b = in_pairs(bf16_bits(a), 1), in_pairs(bf16_bits(b), 0)
    depth, cols, panel = a.shape[1], b.shape[1], panel_of(isa, elements)
    a_row, a_depth = (depth + a_gap, 1) if a_order == "rows" else (1, rows + a_gap)
    if b_panels:
        b_depth, b_panel = panel, panel * max(depth, 1) + b_gap
        blocks = [b[:, n : n + panel] for n in range(0, cols, panel)]
        last = extent(blocks[-1].shape, (panel, 1))
        b_memory = np.zeros((len(blocks) - 1) * b_panel + last, b.dtype)
        for i, block in enumerate(blocks):
            lay(block, b_memory, i * b_panel, (panel, 1))
    else:
        b_depth, b_panel = cols + b_gap, panel
        b_memory = laid_out(b, (b_depth, 1))
    c_row = cols + c_gap
    whole_c = np.full((rows, c_row), UNTOUCHED, c.dtype)
    whole_c[:, :cols] = c
    c_memory = whole_c.ravel()[: whole_c.size - c_gap].copy()
    isa.gemm(
        start, rows, vecs, depth, laid_out(a, (a_row, a_depth)), a_row, a_depth, b_memory, b_depth, b_panel, c_memory,
        c_row, factor,
    )  # fmt: skip
    whole_c.ravel()[: c_memory.size] = c_memory
    assert (whole_c[:, cols:] == UNTOUCHED).all()
    return whole_c[:, :cols]


def expected(a, b, c, factor, start):
    before = {ZERO: 0, ADD: c.astype(np.float64), SCALE_AND_ADD: factor[:, None] * c.astype(np.float64)}[start]
    return before + a.astype(np.float64) @ b.astype(np.float64)


def integers(elements, lanes, rows, vecs, depth, seed=0):
    """a, b, c and factor, of which every sum of products is exact in float32 and every element in bfloat16."""
    random = np.random.default_rng(seed)
    return [
        random.integers(-64, 65, shape).astype(wide(elements))
        for shape in ((rows, depth), (depth, vecs * lanes), (rows, vecs * lanes), (rows,))
    ]


@elements_
@pytest.mark.parametrize("start", [ZERO, ADD, SCALE_AND_ADD], ids=["zero", "add", "scale and add"])
@pytest.mark.parametrize("b_panels", [False, True], ids=["b in rows", "b in panels"])
def test_every_tile_is_exact(isa, elements, start, b_panels):
    skip_without(isa, elements)
    most = 2 * isa.tile_vecs + 1
    for rows in range(1, 14):  # two tiles and one row
        for vecs in range(1, most + 1):
            for depth in (0, 1, 2, 7):
                arrays = integers(elements, lanes_of(isa, elements), rows, vecs, depth)
                c = multiply(isa, elements, *arrays, start, b_panels=b_panels)
                np.testing.assert_array_equal(c, expected(*arrays, start), f"{rows} rows, {vecs} vectors, {depth} deep")


@pytest.mark.parametrize("start", [ZERO, ADD, SCALE_AND_ADD], ids=["zero", "add", "scale and add"])
@pytest.mark.parametrize("a_order", ["rows", "columns"])
@pytest.mark.parametrize("b_panels", [False, True], ids=["b in rows", "b in panels"])
def test_deep_products_of_bfloat16_are_exact(isa, start, a_order, b_panels):
    """Whole tiles of 16 rows, 16 columns and a depth of 32, and what is left over."""
    elements = "bfloat16 pairs"
    skip_without(isa, elements)
    for rows in (1, 15, 16, 17, 31, 32, 33, 70):
        for vecs in (1, 2, 3, 5):
            for depth in (31, 32, 34, 64, 100, 600):
                arrays = integers(elements, lanes_of(isa, elements), rows, vecs, depth)
                c = multiply(isa, elements, *arrays, start, a_order=a_order, b_panels=b_panels)
                np.testing.assert_array_equal(c, expected(*arrays, start), f"{rows} rows, {vecs} vectors, {depth} deep")


@elements_
@settings(max_examples=50, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_strides_are_exact(isa, elements, data):
    skip_without(isa, elements)
    size, gap = st.integers(1, 13), st.integers(0, 5)
    rows, vecs, depth = data.draw(size), data.draw(st.integers(1, 9)), data.draw(st.integers(0, 40))
    start = data.draw(st.sampled_from([ZERO, ADD, SCALE_AND_ADD]))
    arrays = integers(elements, lanes_of(isa, elements), rows, vecs, depth, seed=data.draw(st.integers(0, 99)))
    c = multiply(
        isa,
        elements,
        *arrays,
        start,
        a_order=data.draw(st.sampled_from(["rows", "columns"])),
        a_gap=data.draw(gap),
        b_panels=data.draw(st.booleans()),
        b_gap=data.draw(gap),
        c_gap=data.draw(gap),
    )
    np.testing.assert_array_equal(c, expected(*arrays, start))


@elements_
@pytest.mark.parametrize("depth", [1, 33, 257])
def test_a_sum_errs_by_its_roundings_only(isa, elements, depth):
    """The product of one depth starts from zero: the error does not grow with what it is added to."""
    skip_without(isa, elements)
    random = np.random.default_rng(0)
    rows, cols = 7, 5 * lanes_of(isa, elements)
    shapes = ((rows, depth), (depth, cols), (rows, cols), (rows,))
    a, b, c, factor = (random.standard_normal(shape).astype(wide(elements)) for shape in shapes)
    if elements == "bfloat16 pairs":
        a, b = bf16_to_float(bf16_bits(a)), bf16_to_float(bf16_bits(b))
    epsilon = np.finfo(wide(elements)).eps / 2
    exact, size = expected(a, b, c, factor, ZERO), np.abs(a) @ np.abs(b)
    # twice where multiplication and addition round apart
    roundings = 2 * depth
    assert (np.abs(multiply(isa, elements, a, b, c, factor, ZERO) - exact) <= roundings * epsilon * size).all()
    big = 1000 * c
    error = np.abs(multiply(isa, elements, a, b, big, factor, ADD) - expected(a, b, big, factor, ADD))
    assert (error <= roundings * epsilon * size + epsilon * (np.abs(big) + size)).all()
