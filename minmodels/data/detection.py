"""Images with boxes and classes."""

from dataclasses import dataclass

import numpy as np
from torch import Tensor


@dataclass(frozen=True)
class Scene:
    name: str
    image: np.ndarray  # (H, W) or (H, W, 3)
    boxes: Tensor  # (G, 4) float32 x1 y1 x2 y2, pixels
    classes: Tensor  # (G,) int64
