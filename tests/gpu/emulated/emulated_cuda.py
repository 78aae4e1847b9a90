"""A plugin of pytest: the CUDA kernels, emulated on the CPU, stand in for the CPU's in the tests of `attention_decode`.

LMKERNELS_EMULATED_CUDA names the library that tests/native_build.py makes of csrc/cuda and common.cuh here.
"""

import os

import torch

from lmkernels.ops.attention_decode import native


def pytest_configure():
    torch.ops.load_library(os.environ["LMKERNELS_EMULATED_CUDA"])
    native._decode, native._FLOATS = native._decode_cuda, native._FLOATS[:3]
