"""The kernels compiled for sm_80 and sm_90, and what the compiler reports: no GPU is needed for that.

`make test` compiles what is hot; `make test-gpu-compile` every configuration, dtype and architecture.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

from lmkernels import _library, layer_norm, rms_norm
from lmkernels.testing import compiled

pytestmark = pytest.mark.skipif(
    _library.triton_error is not None or _library.triton_interpreted, reason=f"no compiler: {_library.triton_error}"
)


@dataclass(frozen=True)
class Call:
    """An op on tensors of the device "meta", which is torch's default device while it runs."""

    name: str
    run: Callable[[torch.dtype], None]
    hot: bool = False  # compiled in every run of the tests
    wide: bool = True  # memory is read 16 bytes at a time; not where rows begin anywhere

    def __str__(self) -> str:
        return self.name


def leaf(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, requires_grad=True)


def with_gradients(function: Callable, *leaves: torch.Tensor) -> None:
    outs = function(*leaves)
    outs = outs if isinstance(outs, tuple) else (outs,)
    torch.autograd.grad(outs, leaves, [torch.empty_like(out) for out in outs])


def norm(d: int, residual: bool, center: bool = True, **options) -> Call:
    def run(dtype):
        x, weight = leaf(1000, d, dtype=dtype), leaf(d, dtype=dtype)
        added = leaf(1000, d, dtype=dtype).detach() if residual else None
        if center:
            with_gradients(
                lambda x, weight, bias: layer_norm(x, weight, bias, 1e-5, residual=added, backend="triton"),
                x,
                weight,
                leaf(d, dtype=dtype),
            )
        else:
            with_gradients(lambda x, weight: rms_norm(x, weight, 1e-5, residual=added, backend="triton"), x, weight)

    return Call(f"{'layer' if center else 'rms'}_norm {d}{' residual' * residual}", run, **options)


CALLS = [
    norm(768, True, hot=True),
    norm(4096, False, center=False, hot=True),
    *(norm(d, residual, center) for d in (64, 768, 1024, 4096, 8192, 16384, 32768) for residual in (False, True)
      for center in (False, True)),
    norm(50257, True, wide=False),
]  # fmt: skip


def runs(config) -> list[tuple[Call, torch.dtype, str]]:
    if config.getoption("--every-configuration"):
        dtypes = (torch.float32, torch.bfloat16, torch.float16)
        return [(call, dtype, arch) for call in CALLS for dtype in dtypes for arch in compiled.CAPABILITIES]
    return [
        (call, dtype, arch)
        for call in CALLS
        if call.hot
        for dtype, arch in ((torch.bfloat16, "sm_90"), (torch.float32, "sm_80"))
    ]


def pytest_generate_tests(metafunc):
    metafunc.parametrize(("call", "dtype", "architecture"), runs(metafunc.config), ids=str)


def test_the_compiler_has_nothing_to_spill_and_reads_wide(call, dtype, architecture):
    with compiled.launches(architecture) as reports, torch.device("meta"):
        call.run(dtype)
    assert reports
    wrong = [
        str(report)
        for report in reports
        if report.stack > 0
        or report.shared > compiled.SHARED_LIMIT[architecture]
        or (call.wide and report.widest_load < 16)
    ]
    assert wrong == []
