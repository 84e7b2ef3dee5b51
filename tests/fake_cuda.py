"""A CUDA device that need not be there, to try what the CUDA road does around its kernels. Inside `with device:` a tensor on
"cuda" says so and has its values in CPU memory; PyTorch's operators compute there, and what is launched runs in Triton's
interpreter. As a GPU would, it refuses CPU tensors beside its own; fresh memory holds NaN, or -1, and around it lie bytes that
nobody may write. syncs lists what makes the host wait for it.

Loads the library made of fake_cuda.cpp, whose path is in FAKE_CUDA: import it first of all, in a process of its own."""

import contextlib
import ctypes
import os
import traceback
from types import SimpleNamespace

ctypes.CDLL(os.environ["FAKE_CUDA"], ctypes.RTLD_GLOBAL)
os.environ["TRITON_INTERPRET"] = "1"

import torch  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes, return_and_correct_aliasing  # noqa: E402
from torch.utils._pytree import tree_leaves, tree_map  # noqa: E402
from triton.runtime.interpreter import InterpretedFunction  # noqa: E402

import interpreted  # noqa: E402

CUDA = torch.device("cuda", 0)
BAND = 256  # bytes before and behind fresh memory
FRESH = {"aten::empty", "aten::new_empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty_strided"}
WAITS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::_unique2", "aten::equal", "aten::bincount"}
MASKABLE = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}
BETWEEN = {"aten::copy_", "aten::_to_copy", "aten::index"}  # may be given tensors of both devices

syncs: list[str] = []  # the operators that made the host wait, each with the line that called it
launches: list[str] = []  # names of the kernels
_kernels = {}  # of minkernels, by operator


class FakeCuda(torch.Tensor):
    """values: a CPU tensor of the same shape and strides. bands: what lies around it, if it was fresh memory."""

    @staticmethod
    def __new__(cls, values, bands=None):
        layout = dict(strides=values.stride(), storage_offset=values.storage_offset())
        return torch.Tensor._make_wrapper_subclass(cls, values.size(), dtype=values.dtype, device=CUDA, **layout)

    def __init__(self, values, bands=None):
        self.values, self.bands = values, bands

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


class _Device(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


device = _Device()


def _run(func, args, kwargs):
    name, tensors = func._schema.name, [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
    ours = [t for t in tensors if isinstance(t, FakeCuda)]
    to = torch.device(kwargs["device"]).type if kwargs.get("device") is not None else None
    if not ours and to != "cuda":
        return func(*args, **kwargs)
    if name.startswith("minkernels::"):
        _refuse(name, [t for t in tensors if not isinstance(t, FakeCuda)])
        with device:
            return _kernels[name.removeprefix("minkernels::")](*args, **kwargs)
    if func._can_decompose():
        with device:
            return func.decompose(*args, **kwargs)
    if name not in BETWEEN:
        _refuse(name, [t for t in tensors if not isinstance(t, FakeCuda) and t.dim()])
    down = to == "cpu" or (name == "aten::copy_" and not isinstance(args[0], FakeCuda))
    masked = name in MASKABLE and any(t is not None and t.dtype in (torch.bool, torch.uint8) for t in args[1])
    if name in WAITS or (ours and down) or masked:
        lines = [f"{frame.filename}:{frame.lineno}" for frame in traceback.extract_stack() if "torch/" not in frame.filename]
        syncs.append(f"{name} by {([line for line in lines if not line.startswith(__file__)] or ['autograd'])[-1]}")
    args_, kwargs_ = tree_map(lambda t: t.values if isinstance(t, FakeCuda) else t, (args, kwargs | ({"device": "cpu"} if to else {})))
    with _disable_current_modes():
        if func._overloadname == "dtype_out":  # of mm and addmm: a CPU has no float32 product of 16-bit matrices
            result = getattr(torch.ops.aten, name.removeprefix("aten::")).out(*(t.float() for t in args_[:-1]), **kwargs_)
        else:
            result = func(*args_, **kwargs_)
        if name == "aten::_to_copy" and result is args_[0]:
            result = result.clone()
    if down or not isinstance(result, torch.Tensor | tuple | list):
        return result
    result = _fresh(result) if name in FRESH else tree_map(lambda t: FakeCuda(t) if isinstance(t, torch.Tensor) else t, result)
    shared = any(r.alias_info for r in func._schema.returns)
    return return_and_correct_aliasing(func, args, kwargs, result) if shared else result


def _refuse(name, tensors):
    if tensors:
        raise RuntimeError(f"{name}: CPU tensors beside those on {CUDA}: {[tuple(t.shape) for t in tensors]}")


def _fresh(like):
    with _disable_current_modes():
        room = like.untyped_storage().nbytes()
        memory = torch.full((room + 2 * BAND,), 255, dtype=torch.uint8)  # NaN in every floating-point type, -1 in integers
        values = memory.view(like.dtype).as_strided(like.shape, like.stride(), BAND // like.itemsize)
        if like.dtype == torch.bool:
            values.fill_(True)
    return FakeCuda(values, (memory[:BAND], memory[BAND + room :]))


def _launch(kernel, *args, grid, warmup, **options):
    def host(t):
        if not isinstance(t, torch.Tensor):
            return tuple(map(host, t)) if isinstance(t, tuple) else t
        if not isinstance(t, FakeCuda):
            raise ValueError(f"{kernel.__name__} was given a CPU tensor of {tuple(t.shape)}")
        given.append(t)
        return t.values

    given = []
    args, options = host(args), {name: host(t) for name, t in options.items()}
    launches.append(kernel.__name__)
    with _disable_current_modes():
        _interpret(kernel, *args, grid=grid, warmup=warmup, **options)
        for t in given:
            if t.bands and not all(band.eq(255).all() for band in t.bands):
                raise RuntimeError(f"{kernel.__name__} wrote around a tensor of {tuple(t.shape)}")


def _impl(library, op, function, key="", **more):
    if library.ns == "minkernels" and key == "CUDA":
        _kernels[op] = function
    return _register(library, op, function, key, **more)


interpreted.mend()
_interpret, InterpretedFunction.run = InterpretedFunction.run, _launch
_register, torch.library.Library.impl = torch.library.Library.impl, _impl
torch.cuda._lazy_init = lambda: None
torch.cuda.is_available = lambda: True
torch.cuda.current_device = lambda: 0
torch.cuda.device_of = lambda t: contextlib.nullcontext()
torch.cuda.get_device_capability = lambda device=None: (9, 0)
torch.cuda.get_device_properties = lambda device=None: SimpleNamespace(multi_processor_count=132, major=9, minor=0)
torch.cuda.get_rng_state = lambda device=None: torch.get_rng_state()
torch.cuda.set_rng_state = lambda state, device=None: None
torch.cuda.manual_seed_all = lambda seed: None
torch.__future__.set_overwrite_module_params_on_conversion(True)  # Module.to() makes new parameters
