"""What this machine offers to lmkernels, and what to do about what is missing."""

import importlib.util
import os
import platform
import shutil
import subprocess
from importlib.metadata import version

import torch

import lmkernels
from lmkernels import _library
from lmkernels.ops._precision import float32_parts


def diagnosis() -> dict:
    """Versions, processor, threads, compiler, GPUs, backends (None = present, else the reason) and advice.

    cuda_kernels: None or the reason likewise, for what backend="native" runs on a GPU.
    """
    try:
        isa, isa_error = _library.cpu_isa(), None
    # LMKERNELS_CPU_ISA names something that this processor lacks
    except ValueError as error:
        isa, isa_error = None, str(error)
    report = {
        "lmkernels": lmkernels.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": version("triton") if importlib.util.find_spec("triton") else None,
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": cpu_name(),
        "cpu_isa": isa,
        "cpu_isa_forced": os.environ.get("LMKERNELS_CPU_ISA"),
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "matmul_precision": {3: "highest", 2: "high", 1: "medium"}[float32_parts()],
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "compiler": compiler(),
        "backends": lmkernels.backends(),
        "cuda_kernels": _library.cuda_error,
    }
    return report | {"advice": advice(report, isa_error)}


def advice(report: dict, isa_error: str | None) -> list[str]:
    """One sentence for each thing that could be better."""
    sentences = []
    if isa_error:
        sentences.append(f"unset or correct LMKERNELS_CPU_ISA: {isa_error}")
    if report["backends"].get("native"):
        compiler_first = "" if report["compiler"] else "install a C++ compiler (Debian: apt install g++), then "
        sentences.append(
            f"attention runs through the slow reference: {compiler_first}build the library with `pip install .`"
            " in a checkout of lmkernels"
        )
    if report["gpus"] and report["backends"].get("triton"):
        sentences.append("a GPU is present but not Triton: install a CUDA build of torch, which brings it")
    if report["threads"] < report["cpus"]:
        sentences.append(
            f"torch uses {report['threads']} of {report['cpus']} CPUs: raise OMP_NUM_THREADS or pass --threads"
        )
    return sentences


def text(report: dict) -> str:
    """The report for people."""
    isa = report["cpu_isa"] or "none, the compiled library is not in use"
    if report["cpu_isa_forced"]:
        isa += f" (LMKERNELS_CPU_ISA={report['cpu_isa_forced']})"
    lines = [
        ("lmkernels", f"{report['lmkernels']}, Python {report['python']}, torch {report['torch']}"),
        ("triton", report["triton"] or "not installed"),
        ("system", report["system"]),
        ("processor", f"{report['cpu']}, {report['cpus']} CPUs, torch sees {report['torch_cpu_capability']}"),
        ("kernels' ISA", isa),
        ("threads", report["threads"]),
        ("float32 products", float32_products(report)),
        ("GPUs", ", ".join(report["gpus"]) or "none"),
        ("compiler", report["compiler"] or "none found"),
    ]
    for name, reason in report["backends"].items():
        lines.append((f"backend {name}", "present" if reason is None else f"absent: {reason}"))
    if report["gpus"]:
        reason = report["cuda_kernels"]
        lines.append(("CUDA C++ kernels", "present, on request" if reason is None else f"absent: {reason}"))
    for sentence in report["advice"]:
        lines.append(("to do", sentence))
    return "\n".join(f"{name:<18} {value}" for name, value in lines)


def float32_products(report: dict) -> str:
    """What torch's precision of float32 products is, and what another would give."""
    precision = report["matmul_precision"]
    if report["cpu_isa"] != "amx" or precision != "highest":
        return precision
    return f"{precision}; about twice as fast with torch.set_float32_matmul_precision('high')"


def cpu_name() -> str:
    """The processor's name, as the system tells it."""
    try:
        with open("/proc/cpuinfo") as file:
            names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def compiler() -> str | None:
    """The first line of `c++ --version`, or None without a C++ compiler."""
    for name in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        if name and shutil.which(name):
            result = subprocess.run([name, "--version"], capture_output=True, text=True)
            return result.stdout.splitlines()[0] if result.returncode == 0 and result.stdout else name
    return None
