"""What the interpreter of Triton 3.6 gets wrong, put right; it serves the tests on machines without a GPU."""

from __future__ import annotations

import functools

import numpy as np


@functools.cache
def mend() -> None:
    import triton.language as tl
    from triton.runtime import interpreter

    builder, patch, convert = interpreter.InterpreterBuilder, interpreter._patch_lang_tensor, interpreter._convert_float
    dot = builder.create_dot

    def patch_lang_tensor(tensor, scope):
        """The bounds of loops: it makes ints of arrays of one element, which numpy refuses from 2.4 on."""
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    def convert_float(x, source, target, rounding_mode):
        """bfloat16: it cuts off what a GPU rounds to the nearest, and to even, and makes zeros of subnormals."""
        if (source, target) == (tl.bfloat16, tl.float32):
            return x.astype(np.uint32) << 16
        if (source, target) != (tl.float32, tl.bfloat16):
            return convert(x, source, target, rounding_mode)
        bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
        rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
        return np.where(np.isnan(x), bits >> 16 | 0x40, rounded).astype(np.uint16).reshape(x.shape)

    def create_dot(self, a, b, *rest):
        """Products of bfloat16: it multiplies the bits as integers."""
        a, b = (self.cast_impl(x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
        return dot(self, a, b, *rest)

    interpreter._patch_lang_tensor = patch_lang_tensor
    interpreter._convert_float = convert_float
    builder.create_dot = create_dot
