"""Plain nn modules, and whatever calls one of PyTorch's functions in its forward."""

import functools
import inspect
import sys
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from minkernels.swap import functional
from minkernels.swap.calls import calls
from minkernels.swap.changes import Attribute, Left, Swap, forward
from minkernels.swap.mode import NAMES, Functions

CHECKPOINT = "checkpoint"
OPS = {
    "scaled_dot_product_attention": "attention",
    "multi_head_attention_forward": "attention",
    "cross_entropy": "cross_entropy",
    "binary_cross_entropy_with_logits": "bce_with_logits",
    "nms": "nms",
}


def plan(model: nn.Module, **_) -> Iterator[Swap | Left]:
    calls_of = functools.cache(functools.partial(calls, names=(*NAMES, CHECKPOINT)))
    scripted = torch.jit.ScriptModule  # its forward is no Python; and another adapter looks after the models of transformers
    spared = scripted, getattr(sys.modules.get("transformers.modeling_utils"), "PreTrainedModel", scripted)
    for where, module in model.named_modules():
        if not isinstance(module, spared):
            yield from _plan(where, module, calls_of)


def _plan(where: str, module: nn.Module, calls_of: Callable) -> Iterator[Swap | Left]:
    cls = type(module)
    for known, (by, changes) in PLAIN.items():
        if cls.forward is known.forward:
            yield from _unless_replaced(Swap(where, f"nn.{known.__name__}", by, module, changes(module)))
            return
    inside, outside = _called(module, calls_of), calls_of(cls, "forward")[1]
    names = tuple(name for name in NAMES if name in inside.values())
    if names and (inner := _recomputing(module, names, calls_of)):
        yield Left(where, ", ".join(sorted(inside)), f"what {inner} recomputes in a backward would be outside the scope of its forward")
    elif names:
        unbound = isinstance(inspect.getattr_static(cls, "forward"), staticmethod | classmethod)
        change = forward(module, functools.partial(_inside_unbound if unbound else _inside, Functions(names)))
        by = ", ".join(dict.fromkeys(OPS[name] for name in names)) + ", in its forward"
        yield from _unless_replaced(Swap(where, ", ".join(sorted(inside)), by, module, (change,)))
    for known in PLAIN:
        if isinstance(module, known) and not names:
            yield Left(where, f"a subclass of nn.{known.__name__}", "it has a forward of its own")
    outside = sorted(spelled for spelled, name in outside.items() if name != CHECKPOINT)
    if outside:
        yield Left(where, ", ".join(outside), "not called by forward: run what calls it inside swapped()")


def _called(module: nn.Module, calls_of: Callable) -> dict[str, str]:
    inside, package = calls_of(type(module), "forward")[0], type(module).__module__.partition(".")[0]
    for helper in {type(value) for value in vars(module).values()}:  # the processors of diffusers, say
        if helper.__module__.partition(".")[0] == package and not issubclass(helper, nn.Module):
            inside = inside | calls_of(helper, "__call__")[0]
    return inside


def _recomputing(module: nn.Module, names: tuple[str, ...], calls_of: Callable) -> str | None:
    """The module inside, "it" for itself, whose forward calls a checkpoint and one of these functions, perhaps in it."""
    for where, inner in module.named_modules():
        called = {*_called(inner, calls_of).values()}
        if CHECKPOINT in called and not called.isdisjoint(names):
            return where or "it"
    return None


def _unless_replaced(swap: Swap) -> Iterator[Swap | Left]:
    present = vars(swap.module).get("forward")
    if present is not None and not (isinstance(present, functools.partial) and present.func.__module__ == __name__):
        yield Left(swap.where, swap.what, "something else has replaced its forward")
    elif swap.changes:
        yield swap


def _inside(mode: Functions, module: nn.Module, *args, **kwargs):
    with mode:
        return type(module).forward(module, *args, **kwargs)


def _inside_unbound(mode: Functions, module: nn.Module, *args, **kwargs):
    """A static or a class method is not given the module."""
    with mode:
        return type(module).forward(*args, **kwargs)


def parameter(module: nn.Module, name: str) -> Tensor | None:
    """getattr(module, name), in an eighth of the time that nn.Module takes, where it is a parameter as it was made."""
    found = module._parameters.get(name)
    return getattr(module, name) if found is None else found


def cross_entropy_loss(module: nn.CrossEntropyLoss, input: Tensor, target: Tensor) -> Tensor:
    loss = functional.cross_entropy(
        input, target, module.weight, None, module.ignore_index, None, module.reduction, module.label_smoothing
    )
    return type(module).forward(module, input, target) if loss is None else loss


def bce_with_logits_loss(module: nn.BCEWithLogitsLoss, input: Tensor, target: Tensor) -> Tensor:
    loss = functional.binary_cross_entropy_with_logits(input, target, module.weight, None, None, module.reduction, module.pos_weight)
    return type(module).forward(module, input, target) if loss is None else loss


def multihead_attention(
    module: nn.MultiheadAttention, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None = None,
    need_weights: bool = True, attn_mask: Tensor | None = None, average_attn_weights: bool = True, is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    out = None
    if not need_weights:
        separate = not module._qkv_same_embed_dim
        projections = (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight) if separate else (None, None, None)
        last = module.out_proj
        out = functional.multi_head_attention(
            module.batch_first, query, key, value, module.embed_dim, module.num_heads, parameter(module, "in_proj_weight"),
            parameter(module, "in_proj_bias"), module.bias_k, module.bias_v, module.add_zero_attn, module.dropout,
            parameter(last, "weight"), parameter(last, "bias"), module.training, key_padding_mask, False, attn_mask, separate, *projections,
            is_causal=is_causal,
        )  # fmt: skip
    if out is None:
        out = type(module).forward(module, query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal)
    return out


PLAIN = {
    nn.MultiheadAttention: (
        "attention, in calls with need_weights=False",
        lambda module: (forward(module, multihead_attention),),
    ),
    nn.TransformerEncoderLayer: (
        "its own modules one by one, also in eval",
        lambda layer: (Attribute(layer, "activation_relu_or_gelu", 0),) if layer.activation_relu_or_gelu else (),
    ),
    nn.TransformerEncoder: (
        "no nested tensors: padded places hold values, not zeros",
        lambda encoder: (Attribute(encoder, "use_nested_tensor", False),) if encoder.use_nested_tensor else (),
    ),
    nn.CrossEntropyLoss: ("cross_entropy (of 16-bit logits: float32)", lambda module: (forward(module, cross_entropy_loss),)),
    nn.BCEWithLogitsLoss: ("bce_with_logits (of 16-bit logits: float32)", lambda module: (forward(module, bce_with_logits_loss),)),
}
