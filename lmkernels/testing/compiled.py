"""Compiles the Triton kernels that an op would launch, for a GPU that need not be there, and reports on them.

    with compiled.launches("sm_90") as kernels:
        layer_norm(torch.randn(64, 768, dtype=torch.bfloat16, device="meta"), None, None, 1e-5, backend="triton")
    assert kernels[0].stack == 0

Inside, tensors on the device "meta" go the way of CUDA tensors up to the launch, which compiles instead: so what is
reported on is what is launched, with the types, the divisibility and the configuration of that very call.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from ..ops import _triton

CAPABILITIES = {"sm_80": 80, "sm_90": 90}
# What one block may have: NVIDIA's programming guide, "Technical Specifications per Compute Capability".
SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_90": 227 * 1024}


@dataclass(frozen=True)
class Report:
    name: str  # of the op and the kernel, "attention.fwd"
    architecture: str  # "sm_80", ...
    grid: tuple[int, ...]
    num_warps: int
    registers: int  # of one thread
    stack: int  # bytes of one thread's memory outside the registers: what did not fit is spilled there
    shared: int  # bytes of one block
    ptx: str

    @property
    def wgmma(self) -> bool:
        """Whether Hopper's products of whole warp groups are used."""
        return "wgmma.mma_async" in self.ptx

    @property
    def mma(self) -> bool:
        """Whether the matrix units are used at all."""
        return self.wgmma or "mma.sync" in self.ptx

    @property
    def atomics(self) -> bool:
        """Whether memory is added to in an order that differs from run to run."""
        return re.search(r"\b(atom|red)\.", self.ptx) is not None

    @property
    def widest_load(self) -> int:
        """Bytes that one thread reads from global memory at once, at most; 16 is what the hardware has."""
        widths = [
            int(count or 1) * int(bits) // 8
            for count, bits in re.findall(
                r"\bld\.global(?:\.(?!v\d|[bufs]\d)[\w:]+)*(?:\.v(\d))?\.[bufs](\d+)", self.ptx
            )
        ]
        widths += map(int, re.findall(r"cp\.async\.c[ag]\.shared\.global[^;]*\], 0x([0-9a-f]+)", self.ptx))
        return max(widths + [16] * ("cp.async.bulk" in self.ptx), default=0)

    def __str__(self) -> str:
        return (
            f"{self.name} {self.architecture}: {self.num_warps} warps, {self.registers} registers, "
            f"{self.stack} bytes of stack, {self.shared} of shared memory, loads of {self.widest_load} bytes"
        )


@contextmanager
def launches(architecture: str) -> Iterator[list[Report]]:
    """Collects a report for every kernel launched in the block, each different one once; nothing is computed."""
    from triton.runtime import driver

    reports, seen = [], set()
    target = _Target(CAPABILITIES[architecture])

    def compile_only(kernel, grid, *arguments, **options):
        if 0 in grid:
            return
        compiled = kernel.warmup(*arguments, grid=grid, **options)
        if id(compiled) not in seen:
            seen.add(id(compiled))
            op = kernel.fn.__module__.split(".")[-2]
            reports.append(_report(compiled, f"{op}.{kernel.fn.__name__}", architecture, grid))

    before = _triton.direct, _triton.launch, _triton.capability, driver._active
    _triton.direct, _triton.launch, _triton.capability = True, compile_only, lambda device: target.capability
    driver.set_active(target)
    try:
        yield reports
    finally:
        _triton.direct, _triton.launch, _triton.capability = before[:3]
        driver.set_active(before[3])


class _Target:
    """All that a compilation asks of triton's driver."""

    def __init__(self, capability: int):
        self.capability = capability

    def get_current_device(self) -> int:
        return self.capability  # kernels are kept by device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)


def _report(compiled, name: str, architecture: str, grid: tuple[int, ...]) -> Report:
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = (int(re.search(rf"\b{key}:(\d+)", usage)[1]) for key in ("REG", "STACK"))
    metadata = compiled.metadata
    return Report(
        name,
        architecture,
        grid,
        metadata.num_warps,
        registers,
        stack,
        metadata.shared,
        compiled.asm["ptx"],
    )
