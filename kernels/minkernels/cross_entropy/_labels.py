"""The one error that only the data can show: a label that names no class."""

from torch import Tensor


def label_error(target: Tensor, row: int, V: int) -> IndexError:
    return IndexError(f"target[{row}] is {target[row].item()}, out of range for {V} classes (0 to {V - 1})")
