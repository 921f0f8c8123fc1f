# SPDX-License-Identifier: Apache-2.0
"""bf16 in Triton's interpreter as a GPU computes it.

The interpreter keeps bf16 values as their bits, in 16-bit integers. Its dot multiplies those integers, and its cast
from fp32 cuts bits off instead of rounding to the nearest, ties to even.
"""

import numpy as np


def to_bits(values: np.ndarray) -> np.ndarray:
    """fp32 -> the bits of the nearest bf16; NaN stays NaN."""
    bits = values.astype(np.float32).view(np.uint32)
    rounded = (bits + (0x7FFF + (bits >> 16 & 1)).astype(np.uint32)) >> 16
    return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)


def from_bits(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def install() -> None:
    """Put it in place, for this process."""
    from triton import language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    dot, cast = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl

    def wide(t: TensorHandle) -> TensorHandle:
        return TensorHandle(from_bits(t.data), tl.float32) if t.dtype.scalar == tl.bfloat16 else t

    def create_dot(self, a, b, *others):
        return dot(self, wide(a), wide(b), *others)

    def cast_impl(self, src, to):
        if (src.dtype.scalar, to.scalar) == (tl.float32, tl.bfloat16):
            return TensorHandle(to_bits(src.data), tl.bfloat16)
        return cast(self, src, to)

    InterpreterBuilder.create_dot = create_dot
    InterpreterBuilder.cast_impl = cast_impl
    # the class body binds the name as it was
    InterpreterBuilder.create_fp_trunc = lambda self, src, to: self.cast_impl(src, to)
