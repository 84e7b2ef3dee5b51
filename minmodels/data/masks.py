"""Images with a class for each pixel: a microscopy image of nuclei, or two folders."""

import functools
import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from minmodels import UserError
from minmodels.data import images


@dataclass(frozen=True)
class Example:
    name: str
    image: np.ndarray  # (H, W) or (H, W, 3), as stored
    mask: np.ndarray  # (H, W) uint8: classes, or 0 and 1 where there is one class


@dataclass(frozen=True)
class Masks:
    name: str
    train: list[Example]
    heldout: list[Example]

    @functools.cached_property
    def channels(self) -> int:
        """1 if every image is gray, else 3."""
        return max(images.channels(example.image) for example in self.train + self.heldout)

    @functools.cached_property
    def sha256(self) -> str:
        digest = hashlib.sha256(str(len(self.train)).encode())
        for example in self.train + self.heldout:
            for array in (example.image, example.mask):
                digest.update(f"{array.shape}{array.dtype}".encode() + np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()


def nuclei(classes: int) -> Masks:
    """A fluorescence image of the Data Science Bowl 2018 (Caicedo et al. 2019) as the package stardist ships it, 512 x 512 with 125
    labelled nuclei: its left two thirds to learn, the rest held out. Three classes: background, nucleus, and the rim of a nucleus.
    """
    folder, instead = "stardist/data/images/", "--images and --masks"
    image, labels = (images.opened(images.packaged("stardist", f"{folder}{name}2d.tif", instead)) for name in ("img", "mask"))
    if classes not in (1, 3):
        raise UserError(f"--classes {classes}: the nuclei have 1 (nucleus or not) or 3 (background, nucleus, its rim)")
    mask = (labels > 0).astype(np.uint8)
    if classes == 3:
        around = np.pad(labels, 1, mode="edge")
        sides = around[:-2, 1:-1], around[2:, 1:-1], around[1:-1, :-2], around[1:-1, 2:]
        mask[(labels > 0) & np.any([side != labels for side in sides], 0)] = 2
    cut = image.shape[1] * 2 // 3
    parts = [Example(name, image[:, part], mask[:, part]) for name, part in (("left", slice(cut)), ("right", slice(cut, None)))]
    return Masks("nuclei of stardist", *([part] for part in parts))


def load(image_folder: str, mask_folder: str, classes: int, skip_corrupt: bool = False) -> Masks:
    """The images of a folder, each with the mask of the same name, or of its name and _mask, in the other; every fifth is held out.

    A mask has one value a pixel: any but 0 is the foreground, or with classes > 1 the number of a class. Raises UserError.
    """
    masks = {}
    for path in images.listed(mask_folder):
        key = str(path.relative_to(mask_folder).with_suffix("")).removesuffix("_mask")
        if key in masks:
            raise UserError(f"{path} and {masks[key]} are masks of the same image")
        masks[key] = path

    def pair(path: Path) -> Example:
        key = str(path.relative_to(image_folder).with_suffix(""))
        if key not in masks:
            raise UserError(f"{path} has no mask in {mask_folder}")
        image, mask = images.read(path), _mask(masks[key], classes)
        if image.shape[:2] != mask.shape:
            sizes = " and ".join(f"{a.shape[1]} x {a.shape[0]}" for a in (image, mask))
            raise UserError(f"{path} and its mask {masks[key]} differ in size: {sizes} pixels")
        return Example(key, image, mask)

    found = images.usable(images.listed(image_folder), pair, skip_corrupt)
    if len(found) < 2:
        raise UserError(f"{image_folder}: one image to learn and one to be held out are the least, and {len(found)} can be used")
    heldout = found[4::5] or found[-1:]
    return Masks(image_folder, [example for example in found if all(example is not h for h in heldout)], heldout)


def sample(examples: list[Example], channels: int, batch: int, crop: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random squares of random images, turned and mirrored: (batch, channels, crop, crop) float32, (batch, crop, crop) uint8. An image
    that is too small goes on as its mirror image."""
    xs, ys = [], []
    for _ in range(batch):
        picked, top, left, turn, flip = torch.randint(2**31, (5,), generator=generator).tolist()
        example = examples[picked % len(examples)]
        x, y = images.floats(example.image, channels).numpy(), example.mask
        missing = [max(0, crop - size) for size in y.shape]
        if any(missing):
            x, y = (np.pad(a, [(0, 0)] * (a.ndim - 2) + [(0, m) for m in missing], mode="symmetric") for a in (x, y))
        top, left = top % (y.shape[0] - crop + 1), left % (y.shape[1] - crop + 1)
        for parts, a in ((xs, x), (ys, y)):
            part = np.rot90(a[..., top : top + crop, left : left + crop], turn % 4, (-2, -1))
            parts.append(torch.from_numpy((part[..., ::-1] if flip % 2 else part).copy()))
    return torch.stack(xs), torch.stack(ys)


def _mask(path: Path, classes: int) -> np.ndarray:
    flat = *images.GRAY, "P", "1"
    mask = images.opened(path, lambda image: image.convert("RGB") if classes == 1 and image.mode not in flat else image)
    if classes == 1 and mask.ndim == 3:
        mask = mask.any(2)  # of the channels: a gray would round what is dark to 0
    if mask.ndim != 2:
        raise UserError(f"{path} is in colour: a mask of {classes} classes has one number a pixel")
    if classes == 1:
        return (mask != 0).astype(np.uint8)
    wrong = (mask < 0) | (mask >= classes) | (mask % 1 != 0)
    if wrong.any():
        row, column = np.argwhere(wrong)[0]
        where = f"at column {column}, row {row}"
        raise UserError(f"{path} has the unknown class {mask[row, column]} {where}: the classes are 0 to {classes - 1}")
    return mask.astype(np.uint8)

