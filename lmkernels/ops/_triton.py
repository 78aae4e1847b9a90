"""What the Triton backends share: when they can run, how an op reaches them, how a kernel is launched.

Nothing here imports triton. The kernels of an op are in `<op>/triton_kernels.py`, which is imported when the first of
them is launched.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from .. import _library

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Whether implementations are called as they are: the dispatcher knows them for CUDA tensors only.
direct: bool = _library.triton_interpreted


def unsupported(x: Tensor) -> str | None:
    """None, or why no Triton kernel runs on tensors like x; what a backend's own `unsupported` begins with."""
    if _library.triton_error is not None:
        return _library.triton_error
    if not x.is_cuda and not direct:
        return (
            f"the kernels run on CUDA tensors, got device {x.device.type!r}; in a process with TRITON_INTERPRET=1 they "
            "run on the CPU too, slowly"
        )
    # a graph is compiled for the device at hand, which torch's own compiler has found new enough
    if x.is_cuda and not direct and not torch.compiler.is_compiling():
        reason = _gpu_absence(x.device)
        if reason is not None:
            return reason
    if x.dtype not in DTYPES:
        return f"dtype {x.dtype} is not one of float32, bfloat16, float16"
    return None


_gpu_absence = functools.cache(_library.gpu_absence)


def op(name: str) -> Callable[[Callable], Callable]:
    """Makes a function what torch.ops.lmkernels.<name> runs on CUDA; its schema and fake are declared with native's.

    Returns what the backend calls: the op, so that fakes, torch.compile and CUDA graphs hold; or, for the tensors on
    the CPU that the interpreter takes, the function.
    """

    def register(function: Callable) -> Callable:
        @functools.wraps(function)
        def implementation(*arguments):
            # autocast has had its say in the api; within an op, a product must not be cast again
            device = "cpu" if direct else "cuda"
            if torch.is_autocast_enabled(device):
                with torch.autocast(device, enabled=False):
                    return function(*arguments)
            return function(*arguments)

        _library.LIBRARY.impl(name, implementation, "CUDA")
        registered = getattr(torch.ops.lmkernels, name).default

        def call(*arguments):
            return implementation(*arguments) if direct else registered(*arguments)

        return call

    return register


def launch(kernel, grid: tuple[int, ...], x: Tensor, *arguments, **options) -> None:
    """kernel[grid](x, *arguments, **options) on x's device; an empty grid is no launch.

    options: the constexpr arguments, num_warps and num_stages.
    """
    if 0 in grid:
        return
    if not x.is_cuda:
        from ._triton_interpreter import mend

        mend()
        kernel[grid](x, *arguments, **options)
        return
    with torch.cuda.device(x.device):
        kernel[grid](x, *arguments, **options)


def multiprocessors(device: torch.device) -> int:
    """How many there are on the GPU; a few on the CPU, where the interpreter runs the programs in turn."""
    return _multiprocessors(device) if device.type == "cuda" else 2


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def capability(device: torch.device) -> int:
    """80 for sm_80, 90 for sm_90."""
    return _capability(device) if device.type == "cuda" else 80


@functools.cache
def _capability(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def next_power_of_2(n: int) -> int:
    return 1 << (max(n, 1) - 1).bit_length()


def ceil_div(n: int, m: int) -> int:
    return -(-n // m)


def row_tile(d: int) -> dict[str, int]:
    """For rows that stay in registers: about 4096 elements, 16 per thread, so that each has some loads in flight."""
    cols = next_power_of_2(d)
    rows = min(64, max(1, 4096 // cols))
    return {"ROWS": rows, "COLS": cols, "num_warps": min(32, max(4, rows * cols // 512))}


def broadcast_strides(index: Tensor) -> tuple[int, int]:
    """The strides of (s,), (1, s) or (b, s) indices as (b, s)."""
    return (index.stride(0) if index.dim() == 2 and index.shape[0] > 1 else 0, index.stride(-1))


def product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a b in `dtype`, which is a's or, beside 16 bits, float32; by cuBLAS, with sums in float32."""
    if dtype == a.dtype:
        return torch.mm(a, b)
    return torch.mm(a, b, out_dtype=dtype) if a.is_cuda else torch.mm(a.to(dtype), b.to(dtype))


def rows_of(x: Tensor) -> Tensor:
    """x (..., d) as (rows, d) with a contiguous last axis; a copy only where no view is."""
    rows = x.reshape(-1, x.shape[-1]) if x.dim() != 2 else x
    return rows if rows.stride(1) == 1 or rows.shape[1] <= 1 else rows.contiguous()


def column_sums(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x (rows, d) summed over its rows in float32, (d,) in `dtype`; their order depends on shape and GPU alone."""
    from . import _triton_kernels as kernels

    rows, d = x.shape
    tile = {"ROWS": 32, "COLS": 64, "num_warps": 4}
    columns, tiles = ceil_div(d, tile["COLS"]), ceil_div(rows, tile["ROWS"])
    # a share of the rows for each program, as far as there are programs to spare and tiles to share
    shares = max(1, min(tiles // 4, ceil_div(2 * multiprocessors(x.device), max(columns, 1))))
    if shares > 1:
        partial = x.new_empty(shares, d, dtype=torch.float32)
        launch(kernels.column_sums, (columns, shares), x, partial, rows, d, x.stride(0), **tile)
        x, rows = partial, shares
    out = x.new_empty(d, dtype=dtype)
    launch(kernels.column_sums, (columns, 1), x, out, rows, d, x.stride(0), **tile)
    return out
