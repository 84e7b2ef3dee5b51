"""Checks that several families make of their arguments."""

import math
from numbers import Integral, Real

import torch
from torch import Tensor

FLOATS = torch.float16, torch.bfloat16, torch.float32, torch.float64
NARROW = torch.float32, torch.bfloat16, torch.float16  # on every device
INTEGERS = torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8
INTEGER_NAMES = "int64, int32, int16, int8 or uint8"
REDUCTIONS = "none", "mean", "sum"


def check_number(name: str, x):
    if type(x) is float and -math.inf < x < math.inf:  # what most calls give, at a tenth of the time
        return
    if isinstance(x, bool | Tensor) or not isinstance(x, Real | torch.SymFloat | torch.SymInt):
        raise TypeError(f"{name} must be a number, got {x!r}")
    if not -math.inf < x < math.inf:  # not isfinite(): torch.compile cannot trace it on a dynamic float
        raise ValueError(f"{name} must be finite, got {x}")
    if type(x) is int and not -(2**1023) < x < 2**1023:
        raise ValueError(f"{name} must fit a float, got an int of {x.bit_length()} bits")


def check_unit(name: str, x):
    """A threshold of IoUs or probabilities."""
    check_number(name, x)
    if not 0 <= x <= 1:
        raise ValueError(f"{name} must be 0 to 1, got {x}")


def as_int(name: str, x, least: int | None = None) -> int:
    """x, which may be NumPy's."""
    if type(x) is not int and not isinstance(x, torch.SymInt):
        if isinstance(x, bool) or not isinstance(x, Integral):
            raise TypeError(f"{name} must be an int, got {x!r}")
        x = int(x)
    if type(x) is int and not -(2**63) <= x < 2**63:
        raise ValueError(f"{name} must fit 64 bits, got an int of {x.bit_length() + 1}")
    if least is not None and x < least:
        raise ValueError(f"{name} must be at least {least}, got {x}")
    return x


def is_dense(t: Tensor) -> bool:
    return t.layout == torch.strided and not t.is_nested


def check_tensor(name: str, t):
    if not isinstance(t, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(t).__name__}")
    if not is_dense(t):
        raise TypeError(f"{name} must be a dense tensor, got {'a nested one' if t.is_nested else f'one of layout {t.layout}'}")


def check_floats(name: str, t, converted: bool = False):
    """converted: to the dtype of the arithmetic, wherever t is."""
    check_tensor(name, t)
    if t.dtype not in FLOATS:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {t.dtype}")
    if t.dtype == torch.float64 and t.device.type != "cpu" and not converted:
        raise TypeError(f"float64 runs on the CPU only, got {name} on {t.device}")


def check_constant(name: str, t: Tensor, input_name: str, input: Tensor):
    """t goes with input and has no gradient."""
    if t.device != input.device:
        raise TypeError(f"{name} is on {t.device}, but {input_name} is on {input.device}")
    if t.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name} requires a gradient, and there is none for it: detach it")


def on_one_device(a: Tensor, b: Tensor) -> bool:
    """A CPU or a GPU."""
    return (a.is_cpu and b.is_cpu) or (a.is_cuda and a.device == b.device)


def check_reduction(reduction):
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")
