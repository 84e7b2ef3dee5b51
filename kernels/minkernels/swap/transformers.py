"""Hugging Face transformers: attention through its AttentionInterface, its losses, and causal language models without logits."""

import functools
import inspect
import re
import sys
import warnings
from collections.abc import Iterator

from torch import nn

import minkernels
from minkernels.swap import _hf_attention, _hf_losses
from minkernels.swap.calls import called, methods_of
from minkernels.swap.changes import Attribute, Left, Swap, forward
from minkernels.swap.mode import NAMES
from minkernels.swap.modules import OPS

ATTENTION = {"scaled_dot_product_attention", "multi_head_attention_forward"}
CLASSES = {"CrossEntropyLoss": "cross_entropy", "BCEWithLogitsLoss": "binary_cross_entropy_with_logits"}
TESTED = (4, 57), (6, 0)  # from the first, before the second
NOT_OURS = {"DeepseekV4Attention": "it makes its mask longer, which it can only with a whole one"}


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
    """A Swap for each config: the modules that ask it for their implementation, and the models that build their masks by it."""
    parts = list(model.named_modules(prefix=where))
    models = {name: module for name, module in parts if isinstance(module, kind)}
    weights = any(getattr(m.config, "output_attentions", False) for m in models.values())
    routed, inside, why = {}, set(), {}  # id(config): modules; names of what they are in; id(config): why none of them can be swapped
    for name, module in parts:
        if name in models or not _uses_interface(type(module)):
            continue
        owner = _owner(name, models)
        at = id(getattr(module, "config", owner.config))
        routed.setdefault(at, []).append((name, module))
        inside.update(_upwards(name))
        reason = NOT_OURS.get(type(module).__name__) or _sdpa_only(type(module))
        if reason or not owner._can_set_attn_implementation():
            why[at] = reason or f"{type(owner).__name__} does not support setting its attention implementation"
        if weights:
            why[at] = "config.output_attentions asks for its weights, which we do not form"
    names = functools.cache(lambda kind: called(kind, "forward", NAMES))
    others = {name: module for name, module in parts if name not in models and name not in inside and _is_attention(module)}
    for name, module in others.items():
        if any(up in others for up in _upwards(name)[1:]):
            continue
        if not _on_functions(module, names):
            yield Left(name, type(module).__name__, "it does not go through AttentionInterface")
        if "attention_mask" in inspect.signature(type(module).forward).parameters:
            why.setdefault(id(_owner(name, models).config), f"{type(module).__name__} beside it could not read our masks")
    configs = {}
    for name, module in models.items():
        configs.setdefault(id(module.config), []).append((name, module))
    for at, found in routed.items():
        what = f"{len(found)} {', '.join(sorted({type(module).__name__ for _, module in found}))}"
        if at in why or at not in configs:
            yield Left(found[0][0], what, why.get(at, "its config belongs to no PreTrainedModel"))
            continue
        name, module = configs[at][0]
        changes = [_hf_attention.Implementation(module.config)]
        for _, m in configs[at]:
            copied = vars(m).get("_attn_implementation")  # by some models, when they are made
            if copied in (module.config._attn_implementation, _hf_attention.NAME):
                changes.append(Attribute(m, "_attn_implementation", _hf_attention.NAME))
        yield Swap(name, what, "attention", module, tuple(changes))
    for at, ((name, module), *_) in configs.items():
        if not why and at not in routed and name in inside:  # a model around those, which may build their masks
            yield Swap(name, f"masks of {type(module).__name__}", "attention's", module, (_hf_attention.Implementation(module.config),))


def _owner(name, models):
    """The innermost PreTrainedModel around a module."""
    return next(models[up] for up in _upwards(name) if up in models)


def _upwards(name):
    """name, and the modules that it is in, the innermost first."""
    parts = name.split(".")
    return [".".join(parts[:n]) for n in range(len(parts), 0, -1)] + ([""] if name else [])


def _is_attention(module):
    kind = type(module)
    return "Attention" in kind.__name__ and not kind.__module__.startswith("torch.") and any(True for _ in module.parameters())


def _on_functions(module, names):
    """Whether modules.py has a say of it: it, or an attention in it, calls what that redirects."""
    parts = [m for m in module.modules() if m is module or _is_attention(m) or isinstance(m, nn.MultiheadAttention)]
    return any(isinstance(m, nn.MultiheadAttention) or ATTENTION & names(type(m)) for m in parts)


@functools.cache
def _code(kind):
    """The code of every method of a class and of those that it comes from."""
    methods = [f for base in kind.__mro__ if base is not nn.Module for f in vars(base).values() if inspect.isfunction(f)]
    return [inspect.unwrap(f).__code__ for f in methods]


def _uses_interface(kind):
    return any("ALL_ATTENTION_FUNCTIONS" in code.co_names for code in _code(kind))


def _sdpa_only(kind):
    """Models of sparse attention put what is not to be seen into their masks, but only where these go to functions that they know."""
    names = [name for code in _code(kind) for const in code.co_consts for name in (const if isinstance(const, tuple) else (const,))]
    return "it does for sdpa what it would not do for us" if "sdpa" in names else ""


def _names(kind):
    """Every name in forward, and in those that it comes to by super()."""
    return {name for f in methods_of(kind).get("forward", ()) for name in f.__code__.co_names}


def _loss(where, model, linear):
    used, kind = _names(type(model)), type(model).__name__
    own = vars(model).get("forward")
    swappable = own is None or getattr(own, "func", None) in (_hf_losses.without_logits, _hf_losses.with_losses)
    if linear and "lm_head" in used:
        why = _hf_losses.no_linear(model)
        if not why and swappable:
            yield Swap(where, f"{kind}'s logits and loss", "linear_cross_entropy", model, (forward(model, _hf_losses.without_logits),))
            return
        yield Left(where, f"{kind}'s logits", why or "its forward has been replaced by another's")
    if "loss_function" in used:
        own, ours = _hf_losses.loss_of(model)
        if ours is None:
            yield Left(where, f"{kind}'s loss, {getattr(own, '__name__', own)}", "no fused form of it")
        elif ours is not own:
            yield Swap(where, own.__name__, "cross_entropy", model, (Attribute(model, "_loss_function", ours),))
    used = {CLASSES.get(name, name) for name in used} | called(type(model), "forward", _hf_losses.LOSSES)
    losses = [name for name in _hf_losses.LOSSES if name in used]
    if losses:
        what, by = f"{', '.join(f'F.{name}' for name in losses)} in {kind}", ", ".join(OPS[name] for name in losses)
        if swappable:
            yield Swap(where, what, by, model, (forward(model, _hf_losses.with_losses),))
        else:
            yield Left(where, what, "its forward has been replaced by another's")
