"""What the Triton kernels of several families compute with."""

import torch
import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)  # exp(x) == exp2(x * LOG2E), and exp2 is one instruction
INF = tl.constexpr(float("inf"))
EXACT = dict(enable_fp_fusion=False)  # of a launch whose results have the bits of the CPU's
FUSED = dict(enable_fp_fusion=True)  # of a launch whose last bits nobody compares; left unsaid it changes with Triton 3.10
ASSERT = dict(debug=True, sanitize_overflow=False)  # of a launch: keeps its device asserts, and adds no other


def registers(num_warps):
    """Of a launch: a thread may have all that there are; else ptxas spills some, to make room for programs that need not come."""
    return {} if torch.version.hip else dict(maxnreg=min(255, 65536 // (32 * num_warps)))


@triton.jit
def blocks_of(n, BLOCK):
    return (n - 1) // BLOCK + 1  # tl.cdiv() passes 2**31 where n nearly does


@triton.jit
def image_and_block(n, BLOCK):
    """The image, and the BLOCK of its n, that a program owns. The grid is one number: its second may not pass 65535."""
    blocks = blocks_of(n, BLOCK)
    return (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks


@triton.jit
def exp(x):
    return tl.exp2(x * LOG2E)


@triton.jit
def tanh(x):
    """Right in relative terms near 0 too, where 1 - 2 / (exp(2x) + 1) cancels: there Cephes' polynomial for |x| < 0.625."""
    y = x * x
    rest = (((-5.70498872745e-3 * y + 2.06390887954e-2) * y - 5.37397155531e-2) * y + 1.33314422036e-1) * y - 3.33332819422e-1
    return tl.where(tl.abs(x) < 0.625, x + x * y * rest, 1.0 - 2.0 / (tl.exp2(x * (2.0 * LOG2E)) + 1.0))


@triton.jit
def log1p(e):
    """For 0 <= e <= 1: minimax (Remez) of log1p(e) / e with the first coefficient 1, relative error 5.2e-9 before rounding."""
    p = -3.318467578e-3 * e + 2.020456281e-2
    p = p * e - 5.766440397e-2
    p = p * e + 1.068055168e-1
    p = p * e - 1.535539427e-1
    p = p * e + 1.969539996e-1
    p = p * e - 2.495858734e-1
    p = p * e + 3.333051132e-1
    p = p * e - 4.999993276e-1
    return p * e * e + e
