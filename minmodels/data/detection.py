"""Images with boxes and classes: a COCO annotation file and its images, or a folder in the format of YOLO."""

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from minmodels import UserError
from minmodels.data import images
from minmodels.data.boxes import CocoFileError, _Entries, _load

MOST_CLASSES = 100_000


@dataclass(frozen=True)
class Scene:
    name: str
    image: np.ndarray  # (H, W) or (H, W, 3)
    boxes: Tensor  # (G, 4) float32 x1 y1 x2 y2, pixels
    classes: Tensor  # (G,) int64


@dataclass(frozen=True)
class Scenes:
    """Square images of one size, in memory; every fifth is held out."""

    name: str
    names: tuple[str, ...]  # of the classes
    scenes: list[Scene]

    @cached_property
    def heldout(self) -> list[Scene]:
        return self.scenes[4::5] or self.scenes[-1:]

    @cached_property
    def train(self) -> list[Scene]:
        return [scene for scene in self.scenes if all(scene is not other for other in self.heldout)]

    @cached_property
    def channels(self) -> int:
        return max(images.channels(scene.image) for scene in self.scenes)

    @cached_property
    def sha256(self) -> str:
        digest = hashlib.sha256(repr(self.names).encode())
        for scene in self.scenes:
            digest.update(scene.image.tobytes() + scene.boxes.numpy().tobytes() + scene.classes.numpy().tobytes())
        return digest.hexdigest()

    @property
    def about(self) -> str:
        boxes = (sum(len(scene.boxes) for scene in part) for part in (self.train, self.heldout))
        counts = f"{len(self.train)} and {len(self.heldout)} held-out images with {next(boxes)} and {next(boxes)} boxes"
        return f"{self.name}: {counts} of {len(self.names)} classes"

    def batch(self, count: int, generator: torch.Generator) -> list[Scene]:
        picked = torch.randint(len(self.train), (count,), generator=generator).tolist()
        return [_zoomed(self.train[i], generator) for i in picked]


def coco(file: str, folder: str, side: int, skip_corrupt: bool = False) -> Scenes:
    """The boxes of a COCO annotation file, but for crowds, on the images of a folder, resized to side x side. Raises UserError."""
    path, data = Path(file), _load(Path(file))
    images.listed(folder)
    parts = {}
    for key in ("images", "categories", "annotations"):
        if not isinstance(data, dict) or not isinstance(data.get(key), list):
            raise CocoFileError(f"{path} has no list of {key}")
        parts[key] = _Entries(path, key, data[key])
    image_of, category_of = parts["images"].ids(), parts["categories"].ids()
    annotations = parts["annotations"]
    image, category = annotations.lookup("image_id", image_of, path), annotations.lookup("category_id", category_of, path)
    xywh = annotations.boxes()
    single = np.array([not entry.get("iscrowd") for entry in annotations.entries], bool)
    names = {entry["id"]: str(entry.get("name", entry["id"])) for entry in parts["categories"].entries}
    files = parts["images"].column("file_name")
    sources = {image_of[entry["id"]]: Path(folder, str(file)) for entry, file in zip(data["images"], files, strict=True)}
    sizes = {image_of[entry["id"]]: (entry.get("width"), entry.get("height")) for entry in data["images"]}

    def scene(i: int) -> Scene:
        mine = np.flatnonzero((image == i) & single)
        boxes = np.concatenate((xywh[mine, :2], xywh[mine, :2] + xywh[mine, 2:]), 1)
        picture, size = images.read(sources[i]), sizes[i]
        if all(size) and size != picture.shape[1::-1]:
            told = f"{size[0]} x {size[1]} pixels, and it has {picture.shape[1]} x {picture.shape[0]}"
            raise UserError(f"{path} has boxes for {sources[i]} of {told}: --images takes the images that were annotated")
        return _resized(sources[i], picture, boxes, category[mine], side, lambda g: f"{path}: annotations[{mine[g]}]")

    return _usable(file, tuple(names[id] for id in category_of), sorted(sources), scene, skip_corrupt)


def yolo(folder: str, side: int, skip_corrupt: bool = False) -> Scenes:
    """folder/images/NAME.jpg with folder/labels/NAME.txt, which has a line an object: class x y w h, the centre and size as parts of the
    image; without that file the image has no object. folder/classes.txt, if there, names a class on each line. Raises UserError."""
    pictures, listed = Path(folder, "images"), Path(folder, "classes.txt")
    paths, names = images.listed(pictures), None
    if listed.exists():
        names = tuple(line.strip() for line in _text(listed).rstrip().split("\n"))
        if "" in names:
            raise UserError(f"{listed}, line {names.index('') + 1} is empty: each line names a class, the first one class 0")
    most = 0

    def scene(path: Path) -> Scene:
        nonlocal most
        labels = Path(folder, "labels", path.relative_to(pictures)).with_suffix(".txt")
        rows = [line.split() for line in (_text(labels).split("\n") if labels.exists() else [])]
        where = [f"{labels}, line {i}" for i, row in enumerate(rows, 1) if row]
        rows = [_numbers(row, line) for row, line in zip(filter(None, rows), where, strict=True)]
        classes = np.array([int(row[0]) for row in rows], np.int64)
        for c, line in zip(classes, where, strict=True):
            if names is not None and c >= len(names):
                raise UserError(f"{line}: the unknown class {c}: {listed} has {len(names)} names, from 0 on")
        most = max(most, *(classes + 1), 0)
        cxcywh = np.array([row[1:] for row in rows], np.float64).reshape(-1, 4)
        boxes = np.concatenate((cxcywh[:, :2] - cxcywh[:, 2:] / 2, cxcywh[:, :2] + cxcywh[:, 2:] / 2), 1)
        return _resized(path, images.read(path), boxes, classes, side, where.__getitem__, parts=True)

    found = _usable(folder, names or (), paths, scene, skip_corrupt)
    return found if names else Scenes(folder, tuple(map(str, range(most))), found.scenes)


def _usable(name, names, sources, scene, skip_corrupt) -> Scenes:
    found = images.usable(sources, scene, skip_corrupt)
    if len(found) < 2:
        raise UserError(f"{name}: one image to learn and one to be held out are the least, and {len(found)} can be used")
    scenes = Scenes(name, names, found)
    for part, what in ((scenes.train, "to learn"), (scenes.heldout, "held out")):
        if not any(len(scene.boxes) for scene in part):
            raise UserError(f"{name}: the images {what} have no box")
    return scenes


def _resized(path: Path, picture: np.ndarray, boxes: np.ndarray, classes: np.ndarray, side: int, where, parts: bool = False) -> Scene:
    """boxes: (G, 4) x1 y1 x2 y2 in pixels or, with parts, as parts of the picture. where(g) says where box g was read."""
    size = np.array([picture.shape[1], picture.shape[0]] * 2, np.float64)
    boxes = boxes * size if parts else boxes
    for g, (x1, y1, x2, y2) in enumerate(boxes):
        told = f"the box from ({x1:g}, {y1:g}) to ({x2:g}, {y2:g})"
        if not (x1 < x2 and y1 < y2):
            raise UserError(f"{where(g)}: {told} has no area")
        if min(x1, y1) < -1 or x2 > size[0] + 1 or y2 > size[1] + 1:  # a pixel, for those who round
            raise UserError(f"{where(g)}: {told} is not inside {path}, which has {size[0]:g} x {size[1]:g} pixels")
    scaled = torch.from_numpy(np.clip(boxes / size, 0, 1) * side).float()
    for g in np.flatnonzero((scaled[:, 2:] <= scaled[:, :2]).any(1)):
        raise UserError(f"{where(g)}: nothing of the box is inside {path}")
    return Scene(str(path), images.resized(picture, side), scaled, torch.from_numpy(classes.astype(np.int64)))


def _zoomed(scene: Scene, generator: torch.Generator) -> Scene:
    """A random square part of the image, at least 0.8 of its side, at full size again; objects whose centre is cut off are left out."""
    side = scene.image.shape[0]
    zoom, *at = torch.rand(3, generator=generator).tolist()
    part = round(side * (0.8 + 0.2 * zoom))
    left, top = (round(a * (side - part)) for a in at)
    boxes = (scene.boxes - torch.tensor([left, top, left, top])) * (side / part)
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    kept = ((centres > 0) & (centres < side)).all(-1)
    image = images.resized(scene.image[top : top + part, left : left + part], side)
    return Scene(scene.name, image, boxes[kept].clamp(0, side), scene.classes[kept])


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or 'it is not UTF-8 text'}") from error


def _numbers(row: list[str], where: str) -> list[float]:
    try:
        numbers = [float(word) for word in row]
    except ValueError:
        numbers = []
    if len(numbers) != 5 or not np.isfinite(numbers).all() or numbers[0] < 0 or numbers[0] % 1:
        raise UserError(f"{where}: a class and four numbers were expected, got {' '.join(row)!r}")
    if numbers[0] >= MOST_CLASSES:
        raise UserError(f"{where}: the unknown class {row[0]}: a model has {MOST_CLASSES} at most, from 0 on")
    return numbers
