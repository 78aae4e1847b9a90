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
    """A Python that imports the package of the folder, and whose tests of tests/micro take the module there."""
    variables |= {"LMKERNELS_MICRO": str(folder / "micro.so"), "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, *arguments],
        env=native_build.sanitizer_environment(**variables),
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def start_ops(folder: Path, *arguments: str, isa: str = "") -> subprocess.Popen:
    return start(folder, TESTS / "sanitized_ops.py", *arguments, LMKERNELS_CPU_ISA=isa)


IMPORT = "import numpy as np, micro; m = micro.generic; "
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
    process = start_ops(folder, "poison")
    output, _ = process.communicate()
    assert process.returncode != 0 and "use-after-poison" in output and "lmk::" in output


def test_every_kernel_is_clean(folder):
    """The micro-kernels on every instruction set, the ops on the best and on AVX2, all at the same time."""
    # --capture=sys leaves a sanitizer's report to us
    micro = ["-m", "pytest", TESTS / "micro", "-q", "--capture=sys", "-p", "no:cacheprovider"]
    processes = [
        start(folder, *micro, LMKERNELS_SWEEP_STRIDE="1000003"),
        start_ops(folder, "float32", "bfloat16", "float64"),
    ]
    if (_library.cpu_isa() or "generic") != "generic":
        processes.append(start_ops(folder, "float16", isa="avx2"))
    outputs = [process.communicate()[0] for process in processes]
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output[-12000:]
    assert " passed" in outputs[0]
    assert all(output.split()[-1] == list(sanitized_ops.OPS)[-1] for output in outputs[1:])


def test_every_native_op_is_among_them():
    native = {path.parent.name for path in TESTS.parent.glob("lmkernels/ops/*/native.py")}
    assert native | {"dropout"} == set(sanitized_ops.OPS)  # which has no other backend, and so no folder
