"""Builds lmkernels._C, the CPU kernels, and lmkernels._C_cuda. Everything else about the package is in pyproject.toml.

The libraries are written against libtorch's stable ABI and hold no Python symbol, so one build serves every
Python 3 and every torch from 2.11 on. They are left out, and the package works in plain torch, when
LMKERNELS_NO_EXTENSION=1 is set or no C++ compiler is found; the CUDA library alone when LMKERNELS_NO_CUDA=1 is set or
nvcc is not found.
"""

import os
import shlex
import shutil
import subprocess
import sys
from glob import glob
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel

CXX_FLAGS = [
    "-std=c++20",
    "-O3",
    "-g0",  # Python's own flags say -g, which makes the library eight times as large
    "-fvisibility=hidden",
    "-Wall",
    "-Wno-maybe-uninitialized",  # false alarms from gcc's AVX-512 headers
    "-DTORCH_TARGET_VERSION=0x020b000000000000",  # nothing newer than torch 2.11
]

# Ampere, Hopper, and code that later GPUs compile for themselves.
NVCC_FLAGS = [
    "-std=c++17",
    "-O3",
    "-Xcompiler=-fPIC,-fvisibility=hidden",
    "-Icsrc/cuda",
    "--threads=2",
    "-gencode=arch=compute_80,code=sm_80",
    "-gencode=arch=compute_90a,code=sm_90a",
    "-gencode=arch=compute_90,code=compute_90",
]


class BinaryWheel(bdist_wheel):
    """py3-none-<platform>: tied to a platform, not to a Python."""

    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


def native_library():
    """The arguments of setup() that build the library; none where it is to be left out."""
    if os.environ.get("LMKERNELS_NO_EXTENSION") == "1":
        return {}
    from setuptools.modified import newer_group
    from torch.utils import cpp_extension
    from torch.utils.cpp_extension import BuildExtension, CppExtension, get_cxx_compiler

    class Build(BuildExtension):
        """With the CUDA library, for which torch's own class would need a CUDA build of torch."""

        def build_extension(self, extension):
            if extension.name != "lmkernels._C_cuda":
                super().build_extension(extension)
                return
            library = Path(self.get_ext_fullpath(extension.name))
            if not newer_group([*extension.sources, *extension.depends], library):
                return
            folder = Path(self.build_temp, "csrc/cuda")
            folder.mkdir(parents=True, exist_ok=True)
            library.parent.mkdir(parents=True, exist_ok=True)
            objects = []
            for source in [*cuda_sources, *extension.sources]:
                objects.append(str(folder / (Path(source).stem + ".o")))
                if newer_group([source, *extension.depends], objects[-1]):
                    compiler_flags = [nvcc, *NVCC_FLAGS] if source.endswith(".cu") else [*cxx, *binding_flags]
                    subprocess.run([*compiler_flags, "-c", source, "-o", objects[-1]], check=True)
            # what a CPU-only torch lacks is found in the torch that loads the library
            stub = folder / "libtorch_cuda.so"
            text = 'extern "C" void aoti_torch_get_current_cuda_stream() {}'
            stub_flags = ["-shared", "-fPIC", "-x", "c++", "-", "-Wl,-soname,libtorch_cuda.so", "-o", str(stub)]
            subprocess.run([*cxx, *stub_flags], input=text, text=True, check=True)
            libraries = [f"-L{path}" for path in [folder, *cpp_extension.library_paths()]]
            libraries += ["-ltorch_cuda", "-ltorch_cpu", "-lc10", "-cudart=static"]
            subprocess.run([nvcc, "-shared", "--no-device-link", *objects, *libraries, "-o", str(library)], check=True)

    compiler = get_cxx_compiler()
    if shutil.which(shlex.split(compiler)[0]) is None:
        print(f"lmkernels: no C++ compiler ({compiler}): built without the native kernels", file=sys.stderr)
        return {}
    cxx = shlex.split(compiler)
    binding_flags = [*CXX_FLAGS, "-fPIC", "-DUSE_CUDA", *(f"-I{path}" for path in cpp_extension.include_paths())]
    extension = CppExtension(
        "lmkernels._C",
        sorted(glob("csrc/cpu/*.cpp")),
        depends=sorted(glob("csrc/cpu/*.h")),
        extra_compile_args=CXX_FLAGS,
        py_limited_api=True,  # do not link libtorch_python
    )
    extensions = [extension]
    cuda_sources = sorted(glob("csrc/cuda/*.cu"))  # not named to torch's class, which would ask for a CUDA torch
    nvcc = shutil.which("nvcc") or (cpp_extension.CUDA_HOME and shutil.which(f"{cpp_extension.CUDA_HOME}/bin/nvcc"))
    if nvcc and cuda_sources and os.environ.get("LMKERNELS_NO_CUDA") != "1":
        depends = [*cuda_sources, *glob("csrc/cuda/*.h"), *glob("csrc/cuda/*.cuh"), "setup.py"]
        extensions.append(Extension("lmkernels._C_cuda", ["csrc/cuda/bindings.cpp"], depends=sorted(depends)))
    elif not nvcc:
        print("lmkernels: no CUDA compiler (nvcc): built without the CUDA kernels", file=sys.stderr)
    return {
        "ext_modules": extensions,
        "cmdclass": {"build_ext": Build.with_options(no_python_abi_suffix=True)},
    }


native = native_library()
setup(**native | {"cmdclass": {"bdist_wheel": BinaryWheel, **native.get("cmdclass", {})}})
