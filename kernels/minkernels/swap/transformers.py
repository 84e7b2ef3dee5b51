"""Hugging Face transformers: attention through its AttentionInterface, its losses, and causal language models without logits."""

import functools
import inspect
import re
import sys
import warnings
from collections.abc import Iterator

import minkernels
from torch import nn

from minkernels.swap import _hf_attention, _hf_losses
from minkernels.swap.changes import Attribute, Left, Swap, forward

TESTED = (4, 57), (6, 0)  # from the first, before the second


def plan(model: nn.Module, *, linear_cross_entropy: bool = False, **_) -> Iterator[Swap | Left]:
    library = sys.modules.get("transformers.modeling_utils")
    if library is None:  # no model of it can be in this process
        return
    where_to = list(_outermost(model, "", library.PreTrainedModel))
    if not where_to:
        return
    version = sys.modules["transformers"].__version__
    if not TESTED[0] <= tuple(map(int, re.findall(r"\d+", version)[:2])) < TESTED[1]:
        tested = f"{_dotted(TESTED[0])} to before {_dotted(TESTED[1])}"
        _warn(f"minkernels {minkernels.__version__} knows transformers {tested}, this is {version}: its models are left as they are")
        for where, found in where_to:
            yield Left(where, type(found).__name__, f"transformers {version} is outside the tested range, {tested}")
        return
    for where, found in where_to:
        yield from _attention(where, found, library.PreTrainedModel)
        for inside, m in found.named_modules(prefix=where):
            if isinstance(m, library.PreTrainedModel):
                yield from _loss(inside, m, linear_cross_entropy)


_warn = functools.cache(functools.partial(warnings.warn, stacklevel=2))  # once


def _dotted(version):
    return ".".join(map(str, version))


def _outermost(module, where, kind):
    if isinstance(module, kind):
        yield where, module
        return
    for name, child in module.named_children():
        yield from _outermost(child, f"{where}.{name}" if where else name, kind)


def _attention(where, model, kind):
    """One Swap for each config: the modules that ask it for their implementation, and the models that build the masks for them."""
    routed, others, owners, configs = {}, [], {}, {}
    for name, module in model.named_modules(prefix=where):
        config = getattr(module, "config", None)
        if isinstance(module, kind):
            owners[name] = config
            configs.setdefault(id(config), []).append((name, module))
            continue
        owner = next(o for o in _upwards(name) if o in owners)  # the model itself is the last of them
        if _uses_interface(type(module)):
            config = owners[owner] if config is None else config
            routed.setdefault(id(config), (config, owner, []))[2].append((name, module))
        elif "Attention" in type(module).__name__ and not type(module).__module__.startswith("torch.") and list(module.parameters()):
            others.append((name, module, owners[owner]))
    inside = {up for _, _, found in routed.values() for name, _ in found for up in _upwards(name)}
    blocked = {}  # configs whose masks also reach attention that does not take ours
    outer = [name for name, *_ in others]
    for name, module, config in others:
        if name in inside or any(up in outer for up in _upwards(name)[1:]):
            continue  # a wrapper of what is routed, or a part of what is named already
        takes_mask = "attention_mask" in inspect.signature(type(module).forward).parameters
        if takes_mask:
            blocked[id(config)] = type(module).__name__
        yield Left(name, type(module).__name__, "it does not go through AttentionInterface")
    for name, module in model.named_modules(prefix=where):
        if isinstance(module, kind) and id(module.config) in routed and not module._can_set_attn_implementation():
            blocked.setdefault(id(module.config), type(module).__name__)
    for at, (config, owner, found) in routed.items():
        if at in blocked:
            yield Left(owner, f"attention of {_kinds(found)}", f"{blocked[at]} beside it cannot take another implementation")
            continue
        if at not in configs:
            yield Left(owner, f"attention of {_kinds(found)}", "its config belongs to no PreTrainedModel")
            continue
        name, module = configs[at][0]
        changes = [_hf_attention.Implementation(config)]
        for _, m in configs[at]:
            if vars(m).get("_attn_implementation") == config._attn_implementation:  # what some models copy when they are made
                changes.append(Attribute(m, "_attn_implementation", _hf_attention.NAME))
        yield Swap(name, f"{len(found)} {_kinds(found)}", "attention", module, tuple(changes))
    if not blocked:
        for at, models in configs.items():  # those above, which may build the masks
            name, module = models[0]
            if at not in routed and name in inside:
                changes = (_hf_attention.Implementation(module.config),)
                yield Swap(name, f"masks of {type(module).__name__}", "those of attention", module, changes)


def _upwards(name):
    """name, and the modules that it is in, the innermost first."""
    parts = name.split(".")
    return [".".join(parts[:n]) for n in range(len(parts), 0, -1)] + ([""] if name else [])


def _kinds(found):
    return ", ".join(sorted({type(module).__name__ for _, module in found}))


@functools.cache
def _names(kind, method="forward"):
    """The globals and attributes that a method of this class names, and no others of its class."""
    code = getattr(inspect.unwrap(getattr(kind, method, None)), "__code__", None)
    return frozenset(code.co_names) if code else frozenset()


@functools.cache
def _uses_interface(kind):
    return any("ALL_ATTENTION_FUNCTIONS" in _names(kind, name) for name, f in vars(kind).items() if inspect.isfunction(f)) or any(
        map(_uses_interface, kind.__bases__)
    )


def _loss(where, model, linear):
    used, kind = _names(type(model)), type(model).__name__
    swappable = getattr(vars(model).get("forward"), "func", None) in (None, _hf_losses.without_logits, _hf_losses.with_cross_entropy)
    swappable &= "forward" not in vars(model) or hasattr(vars(model)["forward"], "func")
    if linear and "lm_head" in used:
        why = _hf_losses.no_linear(model)
        if not why and swappable:
            yield Swap(where, f"{kind}'s logits and loss", "linear_cross_entropy", model, (forward(model, _hf_losses.without_logits),))
            return
        yield Left(where, f"{kind}'s logits", why or "its forward has been replaced by another's")
    if "loss_function" in used:
        own, ours = _hf_losses.loss_of(model)
        if ours is None:
            yield Left(where, f"{kind}'s loss, {own}", "no fused form of it")
        elif ours is not own:
            yield Swap(where, own.__name__, "cross_entropy", model, (Attribute(model, "_loss_function", ours),))
    if used & {"CrossEntropyLoss", "cross_entropy"}:
        if swappable:
            yield Swap(where, f"F.cross_entropy in {kind}", "cross_entropy", model, (forward(model, _hf_losses.with_cross_entropy),))
        else:
            yield Left(where, f"F.cross_entropy in {kind}", "its forward has been replaced by another's")
