"""Which of the functions that we have a class calls, read from its bytecode: F.cross_entropy in forward, say."""

import dis
import sys
import types
from collections.abc import Iterator

import torch.nn.functional as F
from torch import nn

KNOWN_ELSEWHERE = {  # package's module -> its functions that come to one of ours, by whatever way
    "torchvision.ops.boxes": {"nms": "nms", "batched_nms": "nms"},
    "torch.utils.checkpoint": {"checkpoint": "checkpoint", "checkpoint_sequential": "checkpoint"},
    "diffusers.models.attention_dispatch": {"dispatch_attention_fn": "scaled_dot_product_attention"},
}
KNOWN_ATTRIBUTES = {"_gradient_checkpointing_func": "checkpoint"}  # of transformers' layers, and of those written like them


def calls(cls: type, entry: str, names: tuple[str, ...]) -> tuple[dict[str, str], dict[str, str]]:
    """({function: name} that entry calls, {function: name} that other methods alone call); a function is as it is spelled there, such as
    F.cross_entropy or sdpa, and a name one of `names`. A call counts if it is in the class, in the classes under it that super() may
    reach, or in plain functions of the same package that those call. What an object or an import inside a function gives is not seen.
    """
    methods, known = methods_of(cls), _known(names)
    inside = _reached([entry], methods, known)
    outside = _reached(list(methods), methods, known)
    return inside, {function: name for function, name in outside.items() if name not in inside.values()}


def called(cls: type, entry: str, names: tuple[str, ...]) -> set[str]:
    """Those of `names` that entry calls, without a look at all other methods, which takes 0.2 s."""
    return {*_reached([entry], methods_of(cls), _known(names)).values()}


def _known(names):
    known = {getattr(F, name): name for name in names if hasattr(F, name)}
    for module, functions in KNOWN_ELSEWHERE.items():
        if module in sys.modules:
            known |= {getattr(sys.modules[module], f, None): name for f, name in functions.items() if name in names}
    return known | {attribute: name for attribute, name in KNOWN_ATTRIBUTES.items() if name in names}


def _reached(entries, methods, known) -> dict[str, str]:
    reached, seen, waiting = {}, set(), [f for name in entries for f in methods.get(name, ())]
    while waiting:
        f = waiting.pop()
        if f in seen:
            continue
        seen.add(f)
        package = (f.__module__ or "").partition(".")[0]
        for code in _codes(f.__code__):
            waiting += [g for name in code.co_names for g in methods.get(name, ())]
            reached |= {name: known[name] for name in code.co_names if name in known}
            for spelled, value in _globals(code, f.__globals__):
                if value in known:
                    reached[spelled] = known[value]
                elif isinstance(value, types.FunctionType) and (value.__module__ or "").partition(".")[0] == package:
                    waiting += _decorated(value)
    return reached


def methods_of(cls) -> dict[str, list[types.FunctionType]]:
    """By name, those that a call can come to: an override hides what it does not call by super()."""
    methods: dict[str, list] = {}
    for c in cls.__mro__:
        if c in (nn.Module, object):
            continue
        for name, value in vars(c).items():
            if not isinstance(value, types.FunctionType):
                value = value.fget if isinstance(value, property) else getattr(value, "__wrapped__", getattr(value, "__func__", value))
            overrides = methods.setdefault(name, [])
            if not overrides or "super" in overrides[-1].__code__.co_names:
                overrides += _decorated(value)
    return methods


def _decorated(value) -> Iterator[types.FunctionType]:
    """A function behind its decorators, which may call something themselves: a checkpoint, say."""
    while isinstance(value, types.FunctionType):
        yield value
        value = getattr(value, "__wrapped__", None)


def _codes(code) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)


def _globals(code, names) -> Iterator[tuple[str, object]]:
    """(spelling, value) of each a, a.b, a.b.c ... in code where a is a global name and the others but the last are Python modules."""
    value = spelled = None
    for step in dis.get_instructions(code):
        if step.opname == "LOAD_GLOBAL":
            value, spelled = names.get(step.argval), step.argval
        elif step.opname in ("LOAD_ATTR", "LOAD_METHOD") and isinstance(value, types.ModuleType):
            value, spelled = vars(value).get(step.argval), f"{spelled}.{step.argval}"
        elif step.opname not in ("EXTENDED_ARG", "CACHE"):
            value = None
        if isinstance(value, types.FunctionType | types.BuiltinFunctionType):
            yield spelled, value
