"""Launches of Triton kernels. triton.jit finds out at every launch which of its compilations the arguments call for, which takes the host
several times as long as to pass them on (docs/tuning.md). Here it is asked once, and remembered."""

import functools

import torch
import triton
from torch import Tensor
from triton.runtime import JITFunction, driver

MOST = 4096  # calls that a kernel remembers


def kernel(fn=None, **options):
    """triton.jit for a function that the host launches."""
    if fn is None:
        return functools.partial(kernel, **options)
    jit = triton.jit(fn, **options)
    return Kernel(jit) if isinstance(jit, JITFunction) else jit  # else the interpreter's


class Kernel:
    """Launched as a JITFunction is: kernel[grid](...). Which compilation is right depends on the dtype and the alignment of a tensor, on
    the value of any other argument, and of those not specialized on, on whether 32 bits hold it."""

    def __init__(self, jit: JITFunction):
        self.jit, self.forms = jit, {}

    def __getitem__(self, grid):
        return functools.partial(self.launch, grid)

    def launch(self, grid, *args, **kwargs):
        if torch.version.hip:  # there the size of a tensor counts too
            return self.jit[grid](*args, **kwargs)
        values = (*args, *kwargs.values())
        form = len(args), *kwargs, *map(type, values)
        order, tensors, loose, compiled = self.forms.get(form) or self.new_form(form)
        key = [driver.active.get_current_device(), *values]
        for i in tensors:
            key[i + 1] = values[i].dtype, values[i].data_ptr() % 16
        for i in loose:
            key[i + 1] = -(2**31) <= values[i] < 2**31
        known = compiled.get(key := tuple(key))
        if known is not None:
            return known[(*grid, 1, 1)[:3]](*[values[i] for i in order])
        known = self.jit[grid](*args, **kwargs)
        if known is not None:
            if len(compiled) >= MOST:
                compiled.clear()
            compiled[key] = known

    def new_form(self, form):
        """What calls with so many arguments without a name, these names and these types have in common: where among their values the
        kernel's parameters lie, which of them are tensors and which may be any integer; and what was compiled for them."""
        named, params = (len(form) - 1 - form[0]) // 2, self.jit.params
        names, types = form[1 : 1 + named], form[1 + named :]
        order = [i if i < form[0] else form[0] + names.index(param.name) for i, param in enumerate(params)]
        tensors = [i for i in order if issubclass(types[i], Tensor)]
        loose = [i for i, param in zip(order, params, strict=True) if param.do_not_specialize and types[i] is int]
        self.forms[form] = order, tensors, loose, {}
        return self.forms[form]


def cdiv(n, d):  # triton's own take microseconds on the host
    return -(-n // d)


def next_power_of_2(n):
    return 1 << max(0, n - 1).bit_length()


@functools.cache
def processors(device):
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 16
