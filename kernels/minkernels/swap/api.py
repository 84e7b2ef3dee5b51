"""swap, unswap, swapped: what each adapter plans is done at once or not at all, remembered in the modules, and taken back."""

import contextlib
import importlib
import sys
from collections.abc import Iterator

from torch import nn

from minkernels.swap.changes import Left, Replaced, Swap, SwapReport

ADAPTERS = {  # module here -> the package whose models it knows: without that package imported there is nothing to do
    "modules": "torch",
    "transformers": "transformers",
}
RECORD = "_minkernels_swaps"  # the attribute of a module that remembers its swaps


def swap(model: nn.Module, *, linear_cross_entropy: bool = False, strict: bool = False) -> SwapReport:
    """Puts our kernels into a model, in place: its attention, its losses, its NMS, wherever an adapter knows them.

    linear_cross_entropy: a causal language model of transformers that is given labels computes its loss by linear_cross_entropy:
        logits are never formed, and its output has none.
    strict: raise where anything is left, instead of saying so in the report.
    Parameters, buffers, hooks and the state dict stay as they are; results are the same within rounding. What we cannot serve is left as
    it is and named in the report; a call with an option that we lack takes the model's own road. unswap(model) takes all of it back. A
    second swap puts back what somebody has undone since, and changes nothing more.

    Returns: SwapReport, what was replaced by what, what was left and why, what had been swapped before. str() of it is a table.
    Raises: TypeError: model is no nn.Module. ValueError, with nothing changed: strict, and something was left or there was nothing to swap;
        or a shallow copy of a swapped module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    recorded = [*_recorded(model)]
    already = [s for s in recorded if s.in_force()]
    taken = set().union(*(s.keys for s in already))
    planned = [found for adapter in _adapters() for found in adapter.plan(model, linear_cross_entropy=linear_cross_entropy)]
    swaps = [s for s in planned if isinstance(s, Swap) and taken.isdisjoint(s.keys)]
    left = [found for found in planned if isinstance(found, Left)]
    report = SwapReport(tuple(map(Swap.told, swaps)), tuple(left), tuple(map(Swap.told, already)))
    if strict and (left or not (swaps or already)):
        raise ValueError(f"swap(strict=True): not all of it can be swapped, so nothing was\n{report}")
    again = set().union(*(s.keys for s in swaps))
    _take_back([s for s in recorded if not again.isdisjoint(s.keys)])
    done = []
    try:
        for change in (change for s in swaps for change in s.changes):
            change.apply()
            done.append(change)
    except BaseException:
        for change in reversed(done):
            change.revert()
        raise
    for s in swaps:
        vars(s.module).setdefault(RECORD, []).append(s)
    return report


def unswap(model: nn.Module) -> tuple[Replaced, ...]:
    """Takes back every swap in a model and its submodules. Returns what was taken back, empty if nothing was."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    return _take_back([*_recorded(model)])


@contextlib.contextmanager
def swapped(model: nn.Module | None = None, **options) -> Iterator[SwapReport | None]:
    """with swapped(model, ...): swap(model, ...) inside, as it was after; what had been swapped before stays so.

    with swapped(): no model is touched; inside, calls of F.scaled_dot_product_attention, F.multi_head_attention_forward,
    F.cross_entropy, F.binary_cross_entropy_with_logits and torchvision.ops.nms take our kernels, whoever makes them in this thread, and
    PyTorch's own where they want what we lack. Each call of any other function of torch costs about a microsecond more there.
    """
    if model is None:
        if options:
            raise TypeError(f"swapped() without a model takes no options, got {', '.join(options)}")
        from minkernels.swap.mode import Functions  # importlib would stop torch.compile

        with Functions():
            yield None
        return
    before = [s.changes for s in _recorded(model)] if isinstance(model, nn.Module) else []
    report = swap(model, **options)
    try:
        yield report
    finally:
        _take_back([s for s in _recorded(model) if s.changes not in before])


def _adapters() -> list:
    return [importlib.import_module(f"minkernels.swap.{name}") for name, package in ADAPTERS.items() if package in sys.modules]


def _take_back(swaps: list[Swap]) -> tuple[Replaced, ...]:
    for s in swaps:
        for change in s.changes:
            change.revert()
        vars(s.module)[RECORD] = [other for other in vars(s.module)[RECORD] if other.changes is not s.changes]
        if not vars(s.module)[RECORD]:
            del vars(s.module)[RECORD]
    return tuple(map(Swap.told, swaps))


def _recorded(model: nn.Module) -> Iterator[Swap]:
    for where, module in model.named_modules():
        for s in vars(module).get(RECORD, ()):
            if s.module is not module:
                raise ValueError(f"{where or 'model'} is a shallow copy of a swapped module and runs that one's forward: use copy.deepcopy")
            yield s._replace(where=where)
