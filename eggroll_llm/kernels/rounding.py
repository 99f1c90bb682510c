"""Rounding inside Triton kernels, to the same bits on a GPU and in Triton's interpreter."""

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
"""Whether kernels run in Triton's interpreter, on the CPU: TRITON_INTERPRET=1 was set before triton was imported."""
DEVICE = "cpu" if INTERPRETED.value else "cuda"
"""Type of the device on which the kernels run."""


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """Return float32 `x` in `dtype`, rounded to nearest, ties to even."""
    if INTERPRETED and dtype == tl.bfloat16:  # the interpreter cuts off instead
        bits = x.to(tl.uint32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = tl.where(x == x, nearest.to(tl.float32, bitcast=True), x)
    return x.to(dtype)
