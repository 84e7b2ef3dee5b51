"""Masks from a trained minUNet, and their pictures."""

from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from PIL import Image

from minmodels import UserError, files
from minmodels.data import images
from minmodels.data.masks import Example
from minmodels.minunet import UNet
from minmodels.plot import drawable, plain
from minmodels.recipes import load

COLORS = (np.array(matplotlib.colormaps["tab10"].colors) * 255).astype(np.uint8)  # (10, 3), of the classes from 1 on
AGREES = {"right": (80, 200, 80), "too much": (230, 60, 60), "missed": (70, 130, 255)}


def segment(paths: list[str], checkpoint: str, out: str, *, device: str = "", skip_corrupt: bool = False) -> list[Path]:
    """Writes out/NAME.mask.png and out/NAME.overlay.png for each image, or each of a folder; returns the masks' paths.

    A mask of one class is black and white, of more it has the number of the class. Raises UserError; all images are read before
    anything is written.
    """
    model, _ = load("unet", checkpoint, device)
    pictures, written = images.given(paths, skip_corrupt, out, (".mask.png", ".overlay.png")), []
    if not pictures:
        raise UserError("none of the images can be used")
    with files.writing(Path(out)):
        Path(out).mkdir(parents=True, exist_ok=True)
    for name, image in pictures.items():
        mask, path = predicted(model, image), Path(out, f"{name}.mask.png")
        with files.replacing(path) as part, files.replacing(path.with_name(f"{name}.overlay.png")) as part_overlay:  # both or neither
            Image.fromarray(mask * 255 if model.config.classes == 1 else mask).save(part)
            Image.fromarray(overlay(image, mask)).save(part_overlay)
        written.append(path)
    return written


def predicted(model: UNet, image: np.ndarray) -> np.ndarray:
    """(H, W) or (H, W, 3) -> (H, W) uint8."""
    x = images.floats(image, model.config.in_channels)[None]
    return model.segment(x.to(next(model.parameters()).device))[0].cpu().numpy()


def overlay(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8: the image, with a colour for each class but 0."""
    return _tinted(image, mask > 0, COLORS[(mask.astype(np.intp) - 1) % len(COLORS)])


@plain
def figure(examples: list[Example], found: list[np.ndarray], classes: int) -> Figure:
    """A row an example: the image, the true mask, the mask found, and where the two agree."""
    titles = "input", "truth", "prediction", "overlay"
    height, width = examples[0].mask.shape
    plot = Figure(figsize=(10, 0.6 + len(examples) * min(2.5 * height / width, 8)), dpi=120, layout="constrained")
    grid = plot.subplots(len(examples), 4, squeeze=False)
    for axes, example, mask in zip(grid, examples, found, strict=True):
        shown = images.shown(example.image)
        pictures = shown, colours(example.mask, classes), colours(mask, classes), agreement(example, mask)
        for ax, picture in zip(axes, pictures, strict=True):
            ax.imshow(picture, interpolation="nearest")
            ax.set_axis_off()
        axes[0].text(0.02, 0.98, drawable(example.name), transform=axes[0].transAxes, va="top", color="white", fontsize=8)
    for ax, title in zip(grid[0], titles, strict=True):
        ax.set_title(title)
    handles = [Patch(color=np.array(color) / 255, label=name) for name, color in AGREES.items()]
    plot.legend(handles=handles, loc="outside lower right", ncols=3, frameon=False)
    return plot


def colours(mask: np.ndarray, classes: int) -> np.ndarray:
    """(H, W, 3) uint8: white on black for one class, else a colour for each class but 0."""
    palette = np.array([[255, 255, 255]], np.uint8) if classes == 1 else COLORS
    return np.where(mask[..., None] > 0, palette[(mask.astype(np.intp) - 1) % len(palette)], np.uint8(0))


def agreement(example: Example, mask: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8: the image, and on it in the colours of AGREES what was found and is so, what was found and is not, what is and was
    not found."""
    truth = example.mask
    kind = np.where(mask == truth, 0, np.where(mask > 0, 1, 2))
    return _tinted(example.image, (mask > 0) | (truth > 0), np.array(list(AGREES.values()), np.uint8)[kind])


def _tinted(image, where, color):
    shown = images.shown(image)
    return np.where(where[..., None], shown // 2 + color // 2, shown)

