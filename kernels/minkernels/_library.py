"""The one road from an operator to its kernels: define() registers it, needs_grad() gates autograd, cpp() finds the C++."""

import functools
import importlib
import importlib.abc
import importlib.util
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.autograd import forward_ad

if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 11):  # pip does not look with --no-deps
    raise ImportError(f"minkernels needs torch 2.11 or newer, this is {torch.__version__}")

_LIB = torch.library.Library("minkernels", "FRAGMENT")  # a fragment: _ops.so defines its private operators in the same space
PATH = Path(__file__).with_name("_ops.so")
BUILD = "python -m minkernels build"


def define(name: str, schema: str, *, fake: Callable, reference: Callable, cpu: str | None, cuda: str, flops: Callable | None = None):
    """Registers minkernels::name and returns it. cpu and cuda name a "module:function" that is imported at the first call; cpu is
    None where the C++ library, once loaded, registers the operator itself: calls so small that Python would take most of the time."""
    _LIB.define(name + schema)

    def other(*args):  # every device that has no kernel of its own; the CPU until the library is loaded; and every layout
        for t in args:
            if isinstance(t, Tensor) and t.layout != torch.strided:
                raise TypeError(f"{name} takes dense tensors alone, got one of layout {t.layout}")
        if cpu is None and args[0].device.type == "cpu" and cpp():
            if not torch._C._dispatch_has_kernel_for_dispatch_key(f"minkernels::{name}", "CPU"):
                raise _other_version(f"it has no {name}")
            return getattr(torch.ops.minkernels, name).default(*args)
        return reference(*args)

    _LIB.impl(name, other, "CompositeExplicitAutograd")
    if cpu is not None:
        _LIB.impl(name, _first_call(lambda: _resolve_cpp(cpu) if cpp() else reference), "CPU")
    _LIB.impl(name, _first_call(lambda: _resolve(cuda)), "CUDA")
    torch.library.register_fake(f"minkernels::{name}", fake, lib=_LIB)
    op = getattr(torch.ops.minkernels, name)
    if flops is not None:
        _flops.add(op, flops)
    return op.default


class _FlopFormulas(importlib.abc.MetaPathFinder):
    """Gives PyTorch's flop counter our formulas when a program imports it. To import it here would take Triton along, and with it
    longer than all of minkernels."""

    COUNTER = "torch.utils.flop_counter"

    def __init__(self):
        self.formulas, self.finding = {}, False
        sys.meta_path.insert(0, self)

    def add(self, op, flops: Callable):
        self.formulas[op] = flops
        self.register(sys.modules.get(self.COUNTER))

    def register(self, counter):
        for op, flops in self.formulas.items():
            if op not in getattr(counter, "flop_registry", self.formulas):
                counter.register_flop_formula(op)(flops)

    def find_spec(self, name, path=None, target=None):
        if name != self.COUNTER or self.finding:
            return None
        self.finding = True
        try:
            spec = importlib.util.find_spec(name)  # as everybody else finds it
        finally:
            self.finding = False
        if spec is not None and spec.loader is not None:
            spec.loader.exec_module = functools.partial(self.execute, spec.loader.exec_module)
        return spec

    def execute(self, exec_module: Callable, module):
        exec_module(module)
        if module.__name__ == self.COUNTER:
            self.register(module)


_flops = _FlopFormulas()


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether autograd must see this call; forward-mode AD (torch.func.jvp) does not show in requires_grad."""
    if forward_ad._current_level >= 0:
        return True
    if torch._C._are_functorch_transforms_active() and not torch.compiler.is_compiling():
        return True  # vmap hides what its tensors are made from
    if torch.is_grad_enabled():
        for t in tensors:  # any() of a generator takes three times as long
            if t is not None and t.requires_grad:
                return True
    return False


def autocast_dtype(t: Tensor) -> torch.dtype | None:
    """What autocast casts to on t's device, where it is on."""
    if not torch._C._is_any_autocast_enabled():  # faster than to ask for the device's
        return None
    device = t.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):  # none is for meta tensors
        return torch.get_autocast_dtype(device)
    return None


def traceable(*args):
    """args. In a graph of a functorch transform, views of the tensors among them: torch.compile says of the transform's own inputs that
    they require no gradient, and needs_grad() would believe it. In any graph, of a tensor that is given twice: it takes none twice."""
    if not torch.compiler.is_compiling():
        return args
    every, distinct = torch._C._are_functorch_transforms_active(), []
    for a in args:
        again = every
        for b in distinct:
            again = again or a is b
        distinct.append(a.view_as(a) if again and isinstance(a, Tensor) else a)
    return tuple(distinct)


def no_gradient(ctx, **places: int):
    """For a backward: raises where a gradient is wanted of an argument that has none. The check before the forward cannot see it under
    vmap, nor in a graph of a functorch transform."""
    for name, place in places.items():
        if ctx.needs_input_grad[place]:
            raise ValueError(f"{name} requires a gradient, and there is none for it: detach it")


def apply(function: type[torch.autograd.Function], *args):
    """function.apply(*args). In plain eager mode without its inspect.signature(), which takes longer than a small kernel."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return function.apply(*args)
    return super(torch.autograd.Function, function).apply(*args)


def once_differentiable(op: Callable) -> Callable:
    """op for a backward to call: a derivative of its results raises, where PyTorch would silently take it for zero."""

    class Once(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(*args):
            return op(*args)

        @staticmethod
        def setup_context(ctx, inputs, output):
            pass

        @staticmethod
        def backward(ctx, *_):
            raise RuntimeError(f"{getattr(op, '__name__', op)} has no derivative: second derivatives are not implemented")

    def call(*args):
        return apply(Once, *args) if needs_grad(*(a for a in args if isinstance(a, Tensor))) else op(*args)

    return call


def cpp() -> bool:
    """Whether the C++ library is loaded; warns once where it was never built, raises where it is broken."""
    reason = cpp_missing()
    if reason:
        _warn(f"minkernels: {reason}; CPU tensors take the slow reference road. To build it: {BUILD}")
    return not reason


_warn = functools.cache(functools.partial(warnings.warn, stacklevel=2))  # once, from whatever line


@functools.cache
def cpp_missing() -> str:
    """Loads _ops.so, once. Empty if it is there, else why not."""
    if not PATH.exists():
        return f"the C++ library is not built ({PATH.name} is not in {PATH.parent})"
    try:
        torch.ops.load_library(PATH)
    except OSError as error:
        why = error.__cause__ or error
        raise ImportError(f"{PATH} does not load under torch {torch.__version__}: {why}. To rebuild it: {BUILD}") from error
    return ""


def _resolve(path: str) -> Callable:
    module, function = path.split(":")
    try:
        return getattr(importlib.import_module(module), function)
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        raise ImportError("on a GPU minkernels needs Triton, which is not installed: pip install triton") from error


def _resolve_cpp(path: str) -> Callable:
    try:
        return _resolve(path)
    except AttributeError as error:  # one of the library's private operators is not there
        raise _other_version(error) from error


def _other_version(why) -> ImportError:
    return ImportError(f"{PATH} is of another version of minkernels: {why}. To rebuild it: {BUILD}")


def _first_call(find: Callable[[], Callable]) -> Callable:
    kernel = None

    def call(*args):
        nonlocal kernel
        if kernel is None:
            kernel = find()
        return kernel(*args)

    return call
