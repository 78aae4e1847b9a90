"""The kernels under AddressSanitizer and UndefinedBehaviorSanitizer: nothing beyond its memory, nothing undefined.

The sanitizers stop a process at the first error, with a report. They do not follow masked loads and stores.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import native_build
import pytest
import sanitized_ops

from lmkernels import _library

TESTS = Path(__file__).parent


@pytest.fixture(scope="module")
def folder() -> Path:
    """Of the sanitized module `micro`, and of the package with the sanitized library."""
    if reason := native_build.sanitizers_missing():
        pytest.skip(reason)
    native_build.build("sanitized/micro.so", "sanitized/lmkernels/_C.so")
    return native_build.build_sanitized_package()


def start(folder: Path, *arguments: str | Path, **variables: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, *arguments],
        env=native_build.sanitizer_environment(LMKERNELS_MICRO=str(folder / "micro.so"), **variables),
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def output_of(process: subprocess.Popen) -> str:
    output, _ = process.communicate()
    assert process.returncode == 0, output[-12000:]
    return output


IMPORT = "import numpy as np, sys; sys.path.insert(0, '.'); import micro; m = micro.generic; "
BROKEN = {
    "heap-buffer-overflow": "m.load_row(1, np.zeros(7, np.uint16), 8, np.zeros(8, np.float32))",
    "signed integer overflow": "x = np.zeros(64, np.float32); m.gemm(0, 3, 1, 1, x, 2**62, 1, x, 4, 4, x, 4, x)",
}


@pytest.mark.parametrize("report", BROKEN)
def test_an_error_of_a_micro_kernel_is_reported(folder, report):
    process = start(folder, "-c", IMPORT + BROKEN[report])
    output, _ = process.communicate()
    assert process.returncode != 0 and report in output


def test_an_error_of_an_op_is_reported(folder):
    process = start(folder, TESTS / "sanitized_ops.py", "poison", PYTHONPATH=str(folder))
    output, _ = process.communicate()
    assert process.returncode != 0 and "use-after-poison" in output and "lmk::" in output


def test_micro_kernels_are_clean(folder):
    # --capture=sys leaves a sanitizer's report to us
    command = ["-m", "pytest", TESTS / "micro", "-q", "--capture=sys", "-p", "no:cacheprovider"]
    output = output_of(start(folder, *command, LMKERNELS_SWEEP_STRIDE="1000003"))
    assert " passed" in output and " failed" not in output


def test_ops_are_clean(folder):
    """On the best instruction set and on AVX2, at the same time; the micro-kernels run on all."""
    best = _library.cpu_isa() or "generic"
    isas = {best} if best == "generic" else {best, "avx2"}
    ops = TESTS / "sanitized_ops.py"
    processes = [start(folder, ops, PYTHONPATH=str(folder), LMKERNELS_CPU_ISA=isa) for isa in isas]
    for process in processes:
        assert output_of(process).splitlines()[-1] == list(sanitized_ops.OPS)[-1]


def test_every_native_op_is_among_them():
    native = {path.parent.name for path in TESTS.parent.glob("lmkernels/ops/*/native.py")}
    assert native == set(sanitized_ops.OPS)
