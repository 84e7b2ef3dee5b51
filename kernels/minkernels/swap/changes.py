"""What an adapter plans: Swap, made of changes that can be taken back, and Left; and SwapReport, what the user is told."""

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType
from typing import Any, NamedTuple

from torch import nn


class Replaced(NamedTuple):
    where: str  # dotted name of the module in the model; "" is the model itself
    what: str
    by: str


class Left(NamedTuple):
    where: str
    what: str
    why: str


@dataclass(frozen=True)
class SwapReport:
    replaced: tuple[Replaced, ...]
    left: tuple[Left, ...]
    already: tuple[Replaced, ...] = ()  # swapped before, not changed now

    def __str__(self) -> str:
        rows = [
            *_grouped(self.replaced, "replaced", "by"),
            *_grouped(self.already, "swapped before", "by"),
            *_grouped(self.left, "left", "because:"),
        ]
        return "\n".join(rows) or "nothing to swap in this model"


class Attribute:
    """owner's own attribute `name` is `value` until it is taken back; a property or class attribute of that name is hidden, not touched."""

    class MISSING:
        """A class, so that copies and pickles of it are it."""

    def __init__(self, owner: Any, name: str, value: Any):
        self.owner, self.name, self.value = owner, name, value

    @property
    def key(self) -> tuple:
        return id(self.owner), self.name

    def apply(self):
        self.before = vars(self.owner).get(self.name, self.MISSING)
        vars(self.owner)[self.name] = self.value

    def in_force(self) -> bool:
        return vars(self.owner).get(self.name, self.MISSING) == self.value

    def revert(self):
        if not self.in_force():
            return  # somebody has set another since
        if self.before is self.MISSING:
            vars(self.owner).pop(self.name, None)
        else:
            vars(self.owner)[self.name] = self.before


class Swap(NamedTuple):
    """One line of the report, and what does it."""

    where: str
    what: str
    by: str
    module: nn.Module  # remembers it
    changes: tuple  # of Attribute or of what has its key, apply(), in_force() and revert()

    @property
    def keys(self) -> set[tuple]:
        return {change.key for change in self.changes}

    def in_force(self) -> bool:
        return all(change.in_force() for change in self.changes)

    def told(self) -> Replaced:
        return Replaced(self.where, self.what, self.by)


def forward(module: nn.Module, function: Callable) -> Attribute:
    """module(...) calls function(module, ...), which is at the top level of a module, so that copies and pickles of the model work."""
    return Attribute(module, "forward", Forward(function, module))


class Forward(functools.partial):
    """A method of the module: accelerate takes methods apart by __func__, and binds them again."""

    @property
    def __func__(self) -> Callable:
        return functools.partial(self.func, *self.args[:-1])

    def __eq__(self, other) -> bool:
        if isinstance(other, MethodType) and isinstance(bound := other.__func__, functools.partial):
            return (bound.func, *bound.args, other.__self__) == (self.func, *self.args)
        return self is other

    __hash__ = functools.partial.__hash__

    @property
    def __signature__(self) -> inspect.Signature:
        """Hugging Face's Trainer reads the names. Not kept: defaults and annotations need not be such as can be copied or pickled."""
        module = self.args[-1]
        return inspect.signature(inspect.getattr_static(type(module), "forward").__get__(module, type(module)))


def _grouped(rows: tuple, title: str, link: str) -> list[str]:
    """Rows that say the same of several places are one line, with the first place and how many there are."""
    places: dict[tuple, list[str]] = {}
    for where, what, how in rows:
        places.setdefault((what, how), []).append(where or "the model")
    lines = [
        (f"{found[0]}{f' and {len(found) - 1} more' if len(found) > 1 else ''}", what, how) for (what, how), found in places.items()
    ]
    widths = [max((len(line[i]) for line in lines), default=0) for i in range(2)]
    return [f"{title:14}  {at:{widths[0]}}  {what:{widths[1]}}  {link} {how}" for at, what, how in lines]
