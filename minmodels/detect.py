"""Objects found by a trained minYOLO: boxes on the image, and JSON."""

import json
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from minmodels import UserError, files
from minmodels.data import images
from minmodels.data.detection import Scene
from minmodels.kernels import yolo_detect
from minmodels.minyolo import YOLO
from minmodels.recipes import load
from minmodels.segment import COLORS


def detect(
    paths: list[str], checkpoint: str, out: str, *, score: float = 0.25, iou: float = 0.5, device: str = "", skip_corrupt: bool = False
) -> dict[str, list[dict]]:
    """Writes out/NAME.boxes.png for each image, or each of a folder, and out/detections.json; returns what the latter holds:
    {NAME: [{"box": [x1, y1, x2, y2] in pixels of the image, "score", "class", "name"}, ...]}, highest scores first.

    score: detections below it are left out. iou: of two boxes of a class that overlap more, the better one stays. Raises UserError; all
    images are read before anything is written.
    """
    model, meta = load("yolo", checkpoint, device)
    pictures, results, drawn = images.given(paths, skip_corrupt, out, (".boxes.png",)), {}, {}
    if not pictures:
        raise UserError("none of the images can be used")
    for name, image in pictures.items():
        results[name] = told(predicted(model, image, score_threshold=score, iou_threshold=iou), meta["names"])
        drawn[name] = picture(image, results[name])
    with files.writing(Path(out)):
        Path(out).mkdir(parents=True, exist_ok=True)
    for name, image in drawn.items():
        with files.replacing(Path(out, f"{name}.boxes.png")) as part:
            image.save(part)
    with files.replacing(Path(out, "detections.json")) as part:
        part.write_text(json.dumps(results, indent=1))
    return results


def find(
    model: YOLO, x: Tensor, *, score_threshold: float, iou_threshold: float = 0.5, multi_label: bool = False
) -> list[dict[str, Tensor]]:
    """(N, channels, side, side) -> a dict for each image: boxes (D, 4) x1 y1 x2 y2 in pixels of x and inside it, scores (D,), classes (D,),
    the highest scores first, at most 100."""
    c = model.config
    found = yolo_detect(
        model(x).float(), head="v1", boxes_per_cell=c.boxes, num_classes=c.classes, image_size=c.side, score_threshold=score_threshold,
        iou_threshold=iou_threshold, max_output=100, multi_label=multi_label,
    )  # fmt: skip
    boxes = found.boxes.clamp(0, c.side)
    counts = found.counts.tolist()
    return [{"boxes": boxes[i, :n], "scores": found.scores[i, :n], "classes": found.classes[i, :n]} for i, n in enumerate(counts)]


def predicted(model: YOLO, image: np.ndarray, **thresholds) -> dict[str, Tensor]:
    """find() in an image of any size; the boxes are in its pixels."""
    side, device = model.config.side, next(model.parameters()).device
    x = images.floats(images.resized(image, side), model.config.in_channels)[None]
    found = find(model, x.to(device), **thresholds)[0]
    height, width = image.shape[:2]
    return {**found, "boxes": found["boxes"].cpu() * (torch.tensor([width, height] * 2) / side)}


def picture(image: np.ndarray, found: list[dict], truth: Tensor | None = None) -> Image.Image:
    """The image, enlarged where it is small, with the boxes of detect()'s rows and in white those of the truth."""
    shown = Image.fromarray(images.shown(image))
    zoom = max(1, round(448 / max(shown.size)))
    shown = shown.resize((shown.width * zoom, shown.height * zoom))
    draw, font = ImageDraw.Draw(shown), ImageFont.load_default(12)
    for box in [] if truth is None else truth.tolist():
        draw.rectangle(_corners(box, zoom, shown.size), outline="white")
    for one in found:
        corners, color = _corners(one["box"], zoom, shown.size), tuple(COLORS[one["class"] % len(COLORS)].tolist())
        draw.rectangle(corners, outline=color, width=2)
        text = f"{one['name']} {one['score']:.2f}"
        place = draw.textbbox((corners[0] + 2, max(0, corners[1] - 14)), text, font=font)
        draw.rectangle(place, fill=color)
        draw.text(place[:2], text, fill="white", font=font, anchor="lt")
    return shown


def figure(model: YOLO, scenes: list[Scene], names: list[str], *, score: float = 0.25) -> Figure:
    """Scenes with the boxes found and, in white, the true ones."""
    columns = min(3, len(scenes))
    rows = -(-len(scenes) // columns)
    plot = Figure(figsize=(4 * columns, 4 * rows), dpi=120, layout="constrained")
    grid = plot.subplots(rows, columns, squeeze=False).ravel()
    for ax in grid:
        ax.set_axis_off()
    for ax, scene in zip(grid, scenes, strict=False):
        ax.imshow(picture(scene.image, told(predicted(model, scene.image, score_threshold=score), names), scene.boxes))
    return plot


def told(found: dict[str, Tensor], names: list[str]) -> list[dict]:
    """What find() found in an image, as JSON."""
    rows = zip(found["boxes"].tolist(), found["scores"].tolist(), found["classes"].tolist(), strict=True)
    return [{"box": [round(v, 2) for v in b], "score": round(s, 4), "class": c, "name": names[c]} for b, s, c in rows]


def _corners(box, zoom, size):
    """Pixels inside the picture, in order."""
    x1, y1, x2, y2 = (min(max(v * zoom, 0), size[i % 2] - 1) for i, v in enumerate(box))
    return x1, y1, max(x1, x2), max(y1, y2)
