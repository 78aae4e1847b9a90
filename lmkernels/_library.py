"""The compiled libraries lmkernels/_C.so and _C_cuda.so: loading them, and what is present on this machine."""

from __future__ import annotations

import importlib.util
import os
import re
from pathlib import Path

import torch

# Every op of the package is declared through this object, beside its fake; C++ only implements. So the ops,
# and their errors, exist even where the compiled library does not.
LIBRARY = torch.library.Library("lmkernels", "DEF")

# It takes no tensor, so C++ registers it for CompositeExplicitAutograd; under CPU it would not be found.
LIBRARY.define("cpu_isa() -> str")


def _load(name: str, compiler: str, switch: str) -> str | None:
    """Loads a compiled library. Returns None, or why it is absent; never raises."""
    path = Path(__file__).with_name(name)
    if not path.exists():
        return (
            f"{path} does not exist: lmkernels was installed without {compiler} or with {switch}=1; reinstall it with "
            f"{compiler} present"
        )
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return f"{path} does not load into torch {torch.__version__}: {error.__cause__ or error}"
    return None


native_error: str | None = _load("_C.so", "a C++ compiler", "LMKERNELS_NO_EXTENSION")

# Loaded together with the package, so that torch.compile finds its ops; it asks nothing of a GPU until one is used.
cuda_error: str | None = (
    f"torch {torch.__version__} is a build without CUDA"
    if torch.version.cuda is None
    else _load("_C_cuda.so", "a CUDA compiler (nvcc)", "LMKERNELS_NO_CUDA")
)

TRITON_FLOOR = (3, 6)  # what torch 2.11 brings

# Read where triton itself reads it, and as early: a kernel is made for the interpreter or for a GPU once for all.
triton_interpreted: bool = os.environ.get("TRITON_INTERPRET") == "1"


def _find_triton() -> str | None:
    """None, or why there is no triton that the kernels can use; without importing it, which is slow."""
    spec = importlib.util.find_spec("triton")
    if spec is None or spec.origin is None:
        return "the package triton is not installed; torch's CUDA builds bring it"
    version = re.search(r"__version__ = ['\"]((\d+)\.(\d+)[^'\"]*)", Path(spec.origin).read_text())
    if version is None or (int(version[2]), int(version[3])) < TRITON_FLOOR:
        found = version[1] if version else "an unknown version"
        return f"the kernels need triton {'.'.join(map(str, TRITON_FLOOR))} or later, got {found}"
    return None


triton_error: str | None = _find_triton()


def cpu_isa() -> str | None:
    """The instruction set of the CPU kernels: generic, avx2, avx512, avx512bf16 or amx; None without the library.

    The best that this CPU has, unless LMKERNELS_CPU_ISA names another; one that does not exist, or that this
    CPU lacks, is a ValueError here and in every op that would have used it.
    """
    return None if native_error else torch.ops.lmkernels.cpu_isa()


def backends() -> dict[str, str | None]:
    """Each backend by name, with None where it is present on this machine and else the reason why it is not.

    reference: plain torch. native: the compiled library. triton: Triton kernels, for CUDA tensors.
    """
    return {"reference": None, "native": _native_absence(), "triton": _triton_absence()}


def _native_absence() -> str | None:
    if native_error:
        return native_error
    try:
        cpu_isa()
    except ValueError as error:
        return str(error)
    return None


def _triton_absence() -> str | None:
    if triton_error is not None:
        return triton_error
    if triton_interpreted:
        return None
    if not torch.cuda.is_available():
        return "torch sees no CUDA device; TRITON_INTERPRET=1 runs the kernels on the CPU, slowly"
    return gpu_absence(torch.device("cuda", torch.cuda.current_device()))


def gpu_absence(device: torch.device) -> str | None:
    """None, or why the kernels do not run on this CUDA device."""
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return f"the kernels need an NVIDIA GPU from sm_80 on, got {torch.cuda.get_device_name(device)} with sm_" + (
            "".join(map(str, capability))
        )
    return None
