"""Triton's interpreter for tests: bfloat16 rounds to even, and is computed with in float32 (as it comes, it is cut off, and its bits are
taken for integers); the programs of a launch run in random order, so that none may count on the results of another."""

import random

import numpy as np
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle, _get_np_dtype, interpreter_builder


def mend():
    InterpreterBuilder.cast_impl = _cast(InterpreterBuilder.cast_impl)
    InterpreterBuilder.create_fp_to_fp = _cast(InterpreterBuilder.create_fp_to_fp)
    InterpreterBuilder.get_bf16 = lambda self, value: _rounded(np.array([value]))
    for name, typed in {"binary_op": 0, "unary_op": 0, "create_fma": 2, "create_rsqrt": 0, "create_dot": 2}.items():
        setattr(InterpreterBuilder, name, _in_float32(getattr(InterpreterBuilder, name), typed))
    _shuffle_programs(interpreter_builder)


def _cast(as_it_comes):
    def cast(self, src, to, *rounding):
        if tl.bfloat16 not in (src.dtype.scalar, to.scalar):
            return as_it_comes(self, src, to, *rounding)
        values = _wide(src).data
        return _rounded(values) if to.scalar == tl.bfloat16 else TensorHandle(values.astype(_get_np_dtype(to)), to.scalar)

    return cast


def _in_float32(as_it_comes, typed):
    """typed: the argument whose type the result has, unless it is a comparison's."""

    def compute(self, *args):
        result = as_it_comes(self, *map(_wide, args))
        return _rounded(result.data) if _is_bfloat16(args[typed]) and result.data.dtype == np.float32 else result

    return compute


def _is_bfloat16(x):
    return isinstance(x, TensorHandle) and x.dtype.scalar == tl.bfloat16


def _wide(x):
    return TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32) if _is_bfloat16(x) else x


def _rounded(values):
    values = np.ascontiguousarray(values, np.float32).reshape(np.shape(values))
    bits = values.view(np.uint32)
    even = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return TensorHandle(np.where(np.isnan(values), 0x7FC0, even).astype(np.uint16), tl.bfloat16)


def _shuffle_programs(grid):
    set_grid_dim, set_grid_idx, order = grid.set_grid_dim, grid.set_grid_idx, {}

    def shuffle(nx, ny, nz):
        programs = [(x, y, z) for x in range(nx) for y in range(ny) for z in range(nz)]
        order.update(zip(programs, random.Random(0).sample(programs, len(programs)), strict=True))
        set_grid_dim(nx, ny, nz)

    grid.set_grid_dim, grid.set_grid_idx = shuffle, lambda *program: set_grid_idx(*order[program])
