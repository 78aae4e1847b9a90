"""The C++ that only the tests need, built by ninja in build/tests; what has not changed is not compiled again.

plain/micro.so: the micro-kernels of tests/micro as a Python module, with the flags of the library
sanitized/micro.so: the same under AddressSanitizer and UndefinedBehaviorSanitizer
sanitized/lmkernels/: the package with the library under both sanitizers
emulated/_C_cuda.so: the CUDA kernels for a CPU, through tests/gpu/emulated/common.cuh
"""

from __future__ import annotations

import fcntl
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from contextlib import suppress
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "build" / "tests"
COMPILER = os.environ.get("CXX", "c++")

# Checks are calls, which compile in half the time. That an address is null or its sum has wrapped is not checked:
# AddressSanitizer sees what such an address reads.
SANITIZE = [
    "-fsanitize=address,undefined,float-cast-overflow",
    "-fno-sanitize=null,object-size,pointer-overflow",
    "-fno-sanitize-recover=all",
]
SANITIZED = ["-g1", "-fno-omit-frame-pointer", "--param", "asan-instrumentation-with-call-threshold=0", *SANITIZE]
COMMON = ["-std=c++20", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wno-maybe-uninitialized"]


@cache
def missing() -> str | None:
    """Why nothing can be built here, or None."""
    if shutil.which(shlex.split(COMPILER)[0]) is None:
        return f"there is no C++ compiler ({COMPILER})"
    if _ninja() is None:
        return "ninja is not installed"
    return None


@cache
def sanitizers_missing() -> str | None:
    """Why nothing can be run under sanitizers here, or None."""
    if reason := missing():
        return reason
    version = subprocess.run([*shlex.split(COMPILER), "--version"], capture_output=True, text=True).stdout
    if "Free Software Foundation" not in version:
        return f"{COMPILER} is not gcc, whose sanitizers are loaded into Python"
    if not asan().is_file():
        return f"{COMPILER} has no libasan.so"
    run = subprocess.run([sys.executable, "-c", ""], env=sanitizer_environment(), capture_output=True, text=True)
    if run.returncode:
        return f"Python does not start under {asan()}: {run.stderr[-300:]}"
    return None


@cache
def asan() -> Path:
    command = [*shlex.split(COMPILER), "-print-file-name=libasan.so"]
    return Path(subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip())


def sanitizer_environment(**variables: str) -> dict[str, str]:
    """Of a Python that loads what is sanitized. Python itself never frees all, so leaks are not news."""
    return {
        **os.environ,
        "LD_PRELOAD": str(asan()),
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        **variables,
    }


def build(*targets: str) -> list[Path]:
    """Brings the targets up to date, all in one run of ninja; where tests run side by side, one process at a time."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    rules = _rules()
    with open(FOLDER / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (FOLDER / "build.ninja").exists() or (FOLDER / "build.ninja").read_text() != rules:
            (FOLDER / "build.ninja").write_text(rules)
        run = subprocess.run([_ninja(), "-C", FOLDER, *targets], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[:8000] + run.stderr
    return [FOLDER / target for target in targets]


def build_sanitized_package() -> Path:
    """The folder to import lmkernels from: links to the package's files, and the sanitized library among them."""
    (library,) = build("sanitized/lmkernels/_C.so")
    for path in (ROOT / "lmkernels").iterdir():
        link = library.with_name(path.name)
        if path.suffix != ".so" and path.name != "__pycache__":
            with suppress(FileExistsError):
                link.symlink_to(path)
    return library.parents[1]


def _ninja() -> str | None:
    return shutil.which("ninja", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")


def _rules() -> str:
    import pybind11
    from torch.utils import cpp_extension

    csrc, micro = ROOT / "csrc" / "cpu", ROOT / "tests" / "micro"
    python_includes = [f"-I{sysconfig.get_path('include')}", f"-I{pybind11.get_include()}"]
    torch_includes = [f"-I{path}" for path in cpp_extension.include_paths()]
    torch_libraries = [f"-L{path}" for path in cpp_extension.library_paths()]
    lines = [
        f"cxx = {COMPILER}",
        "rule compile",
        "  command = $cxx $flags -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        "  command = $cxx -shared $flags $in $libraries -o $out",
    ]

    def edge(rule: str, out: str, sources: list, **variables: list[str]) -> str:
        lines.append(f"build {out}: {rule} {' '.join(map(str, sources))}")
        lines.extend(f"  {name} = {' '.join(value)}" for name, value in variables.items())
        return out

    def objects(folder: str, sources: list[Path], flags: list[str]) -> list[str]:
        flags = [*COMMON, *flags, f"-I{micro}", f"-I{csrc}"]
        return [edge("compile", f"{folder}/{path.stem}.o", [path], flags=flags) for path in sources]

    # the same for both modules: what binds is not what is tested
    binding = objects("binding", [micro / "bindings.cpp"], ["-O0", *python_includes])
    sources = [micro / "micro.cpp", csrc / "isa.cpp"]
    edge("link", "plain/micro.so", [*objects("plain", sources, ["-O3"]), *binding], flags=[])
    sanitized = objects("sanitized", sources, ["-O0", *SANITIZED])
    edge("link", "sanitized/micro.so", [*sanitized, *binding], flags=SANITIZE)
    library = objects(
        "sanitized/library",
        sorted(csrc.glob("*.cpp")),
        ["-Og", *SANITIZED, "-fno-sanitize=alignment", *torch_includes, "-DTORCH_TARGET_VERSION=0x020b000000000000"],
    )
    edge(
        "link",
        "sanitized/lmkernels/_C.so",
        library,
        flags=SANITIZE,
        libraries=[*torch_libraries, "-ltorch", "-ltorch_cpu", "-lc10"],
    )
    # threads of the emulated GPU jump between stacks, which fortified jumps refuse
    cuda, emulation = ROOT / "csrc" / "cuda", ROOT / "tests" / "gpu" / "emulated"
    flags = [*COMMON, "-O2", "-U_FORTIFY_SOURCE", "-Wno-unknown-pragmas", f"-I{emulation}", *torch_includes]
    flags.append("-DTORCH_TARGET_VERSION=0x020b000000000000")
    sources = [(cuda / "attention_decode.cu", ["-x", "c++"]), (cuda / "bindings.cpp", [])]
    emulated = [edge("compile", f"emulated/{path.stem}.o", [path], flags=[*flags, *x]) for path, x in sources]
    edge("link", "emulated/_C_cuda.so", emulated, flags=[], libraries=[*torch_libraries, "-ltorch_cpu", "-lc10"])
    return "\n".join(lines) + "\n"
