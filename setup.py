"""Builds lmkernels._C, the CPU kernels. Everything else about the package is in pyproject.toml.

The library is written against libtorch's stable ABI and holds no Python symbol, so one build serves every
Python 3 and every torch from 2.11 on. It is left out, and the package works in plain torch, when
LMKERNELS_NO_EXTENSION=1 is set or no C++ compiler is found.
"""

import os
import shlex
import shutil
import sys
from glob import glob

from setuptools import setup
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


class BinaryWheel(bdist_wheel):
    """py3-none-<platform>: tied to a platform, not to a Python."""

    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


def native_library():
    """The arguments of setup() that build the library; none where it is to be left out."""
    if os.environ.get("LMKERNELS_NO_EXTENSION") == "1":
        return {}
    from torch.utils.cpp_extension import BuildExtension, CppExtension, get_cxx_compiler

    compiler = get_cxx_compiler()
    if shutil.which(shlex.split(compiler)[0]) is None:
        print(f"lmkernels: no C++ compiler ({compiler}): built without the native kernels", file=sys.stderr)
        return {}
    extension = CppExtension(
        "lmkernels._C",
        sorted(glob("csrc/cpu/*.cpp")),
        depends=sorted(glob("csrc/cpu/*.h")),
        extra_compile_args=CXX_FLAGS,
        py_limited_api=True,  # do not link libtorch_python
    )
    return {
        "ext_modules": [extension],
        "cmdclass": {"build_ext": BuildExtension.with_options(no_python_abi_suffix=True)},
    }


native = native_library()
setup(**native | {"cmdclass": {"bdist_wheel": BinaryWheel, **native.get("cmdclass", {})}})
