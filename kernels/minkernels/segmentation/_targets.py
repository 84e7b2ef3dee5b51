"""The one error that only the data can show: an integer target that is neither 0 nor 1, or that names no class."""

import torch
from torch import Tensor


def check_targets(input: Tensor, target: Tensor, mask: Tensor | None) -> None:
    """Raises IndexError for the first such target that counts; float and bool targets may hold anything."""
    if target.is_floating_point() or target.dtype == torch.bool:
        return
    class_map, label = target.dim() < input.dim(), target.long()  # 256 classes would be 0 beside uint8
    bad = (label < 0) | (label >= (input.shape[1] if class_map else 2))
    if mask is not None:
        bad = bad & (mask.any(1) if class_map else mask)
    if bad.any():
        at = bad.nonzero()[0].tolist()
        found = f"target{at} is {target[tuple(at)].item()}"
        raise IndexError(
            f"{found}, out of range for {input.shape[1]} classes (0 to {input.shape[1] - 1})"
            if class_map
            else f"{found}: an integer target is 0 or 1 wherever it counts"
        )
