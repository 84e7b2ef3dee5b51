"""How good detections and segmentations are: COCO and Pascal VOC average precision, IoU and Dice. In float64, on the CPU."""

import importlib
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from minmodels.data import boxes

IOUS = np.linspace(0.5, 0.95, 10)
RECALLS = np.linspace(0.0, 1.0, 101)
AREAS = {"all": (0.0, 1e10), "small": (0.0, 32.0**2), "medium": (32.0**2, 96.0**2), "large": (96.0**2, 1e10)}  # pixels, both ends in
MAX_DETS = 1, 10, 100  # detections of a class in an image, those with the highest scores
STATS = {  # of which array, IoU threshold (None: mean over all), area, most detections
    "ap": ("precision", None, "all", 100),
    "ap50": ("precision", 0.5, "all", 100),
    "ap75": ("precision", 0.75, "all", 100),
    "ap_small": ("precision", None, "small", 100),
    "ap_medium": ("precision", None, "medium", 100),
    "ap_large": ("precision", None, "large", 100),
    "ar1": ("recall", None, "all", 1),
    "ar10": ("recall", None, "all", 10),
    "ar100": ("recall", None, "all", 100),
    "ar_small": ("recall", None, "small", 100),
    "ar_medium": ("recall", None, "medium", 100),
    "ar_large": ("recall", None, "large", 100),
}


class Curve(NamedTuple):
    """A precision-recall curve: precision (P,) at each recall (P,), which does not fall, and the score (P,) down to which one must
    accept detections to be there."""

    recall: np.ndarray
    precision: np.ndarray
    score: np.ndarray


@dataclass(frozen=True, eq=False, repr=False)
class CocoAP:
    """What coco_ap returns. K classes; T = 10 IOUS, R = 101 RECALLS, A = 4 AREAS, M = 3 MAX_DETS. -1 is no figure: the class has no
    ground truth in that area range (for stats: no class has).

    precision: (T, R, K, A, M) float64, the best precision at that recall or a higher one, 0 where it is not reached.
    recall: (T, K, A, M) float64, the highest one reached. scores: (T, R, K, A, M) float64, at which the recall is reached.
    classes: the ids of the K classes, ascending. names: theirs in the annotation file, or the ids as text.
    stats: the 12 figures of pycocotools by name, in its order: ap ap50 ap75 ap_small ap_medium ap_large ar1 ar10 ar100 ar_small
        ar_medium ar_large.
    """

    precision: np.ndarray
    recall: np.ndarray
    scores: np.ndarray
    classes: tuple
    names: tuple[str, ...]
    stats: dict[str, float]

    @property
    def ap(self) -> float:
        """The figure that is called COCO mAP: the mean over IoU thresholds 0.50 to 0.95, recalls and classes."""
        return self.stats["ap"]

    @property
    def ap_per_class(self) -> np.ndarray:
        """(K,) float64: ap of each class."""
        return self.precision[..., 0, -1].mean((0, 1))  # where one entry is -1, all are

    def curve(self, class_id, *, iou: float = 0.5, area: str = "all", max_dets: int = 100) -> Curve:
        """Precision at the 101 RECALLS for one class, an IoU threshold of IOUS, an area of AREAS, a number of MAX_DETS."""
        k, t = _place(class_id, self.classes, "class_id"), _place(round(iou, 2), IOUS.round(2).tolist(), "iou")
        at = t, slice(None), k, _place(area, list(AREAS), "area"), _place(max_dets, MAX_DETS, "max_dets")
        return Curve(RECALLS, self.precision[at], self.scores[at])

    def summary(self) -> str:
        """The 12 lines that pycocotools prints."""
        lines = []
        for name, (array, iou, area, most) in STATS.items():
            title = "Average Precision  (AP)" if array == "precision" else "Average Recall     (AR)"
            ious = f"{IOUS[0]:.2f}:{IOUS[-1]:.2f}" if iou is None else f"{iou:.2f}"
            lines.append(f" {title} @[ IoU={ious:<9} | area={area:>6} | maxDets={most:>3} ] = {self.stats[name]:.3f}")
        return "\n".join(lines)

    __str__ = __repr__ = summary


def coco_ap(
    gts: Sequence[Mapping] | str | Path, dets: Sequence[Mapping] | str | Path, *, fmt: str = "xyxy", threads: int = 1
) -> CocoAP:
    """Average precision of boxes as pycocotools computes it, to the last bit.

    Args:
        gts: a dict for each image: "boxes" (G, 4), "classes" (G,) whole numbers; and, in all images or in none, "crowd" (G,) 0 or 1,
            default 0, and "area" (G,) in pixels, default width * height. Arrays, lists or tensors of any device and real dtype.
            Or the path of a COCO annotation file (keys images, categories, annotations).
        dets: a dict for each image, in the same order: "boxes" (D, 4), "classes" (D,), "scores" (D,). Or, with a path for gts, that
            of a COCO result file: a list of {image_id, category_id, bbox, score}.
        fmt: of the boxes in arrays: "xyxy", "xywh" or "cxcywh"; pixels, the end is not included. COCO files hold xywh.
        threads: how many the classes are shared between; the result is the same.
    Returns: CocoAP; print(coco_ap(...)) prints what pycocotools does.
    Raises: ValueError or TypeError naming the argument, the image and the column; CocoFileError (a ValueError) naming the file, the entry
        and the reason; ImportError where minkernels._host is not built. Nothing is scored before all is checked.
    Source: cocodataset/cocoapi, PythonAPI/pycocotools/cocoeval.py. One difference: pycocotools takes an annotation whose id is 0 for
        unmatched even where it is matched; here ids mean nothing.
    """
    if fmt not in ("xyxy", "xywh", "cxcywh"):
        raise ValueError(f"fmt must be 'xyxy', 'xywh' or 'cxcywh', got {fmt!r}")
    if isinstance(threads, bool) or not isinstance(threads, int) or threads < 1:
        raise ValueError(f"threads must be a positive int, got {threads!r}")
    if isinstance(gts, str | Path) and isinstance(dets, str | Path):
        scene, fmt = boxes.from_coco_files(Path(gts), Path(dets)), "xywh"
    else:
        scene = boxes.from_arrays(gts, dets, "crowd", "area")
    gts, dets, K = scene.gts, scene.dets, len(scene.classes)
    for box in (gts.box, dets.box):
        if fmt == "xyxy":
            box[:, 2:] -= box[:, :2]
        elif fmt == "cxcywh":
            box[:, :2] -= box[:, 2:] / 2
    area = gts.box[:, 2] * gts.box[:, 3] if gts.area is None else gts.area
    crowd = np.zeros(len(area), np.uint8) if gts.flag is None else gts.flag
    precision, recall, scores = host().coco_ap(
        gts.box, gts.image, gts.category, area, crowd, dets.box, dets.image, dets.category, dets.score,
        scene.images, K, IOUS, RECALLS, list(AREAS.values()), MAX_DETS, threads,
    )  # fmt: skip
    arrays = {"precision": precision.transpose(1, 4, 0, 2, 3), "recall": recall.swapaxes(0, 1)}
    stats = {}
    for name, (array, iou, area, most) in STATS.items():
        part = arrays[array][..., list(AREAS).index(area), MAX_DETS.index(most)]
        part = part if iou is None else part[iou == IOUS]
        part = part[part > -1]
        stats[name] = float(part.mean()) if part.size else -1.0
    return CocoAP(**arrays, scores=scores.transpose(1, 4, 0, 2, 3), classes=scene.classes, names=scene.names, stats=stats)


@dataclass(frozen=True, eq=False)
class VocAP:
    """What voc_ap returns.

    ap: (K,) float64, NaN for a class all of whose ground truths are difficult, or that has none. mean: of the others.
    classes: the ids of the K classes, ascending. curves: a Curve a class: a point a detection, by falling score.
    """

    ap: np.ndarray
    mean: float
    classes: tuple[int, ...]
    curves: tuple[Curve, ...]

    def curve(self, class_id: int) -> Curve:
        return self.curves[_place(class_id, self.classes, "class_id")]


def voc_ap(
    gts: Sequence[Mapping], dets: Sequence[Mapping], *, method: str = "area", iou_threshold: float = 0.5, inclusive: bool = True
) -> VocAP:
    """Average precision as the Pascal VOC devkits compute it.

    A detection is judged by the ground truth of its class and image with which it overlaps most, the first of equals: a true positive
    if the IoU is at least iou_threshold and no detection with a higher score took it, left out if that one is difficult, else false.

    Args:
        gts: a dict for each image: "boxes" (G, 4) xyxy in pixels, "classes" (G,) whole numbers; and, in all images or in none,
            "difficult" (G,) 0 or 1, default 0. Arrays, lists or tensors of any device and real dtype.
        dets: a dict for each image, in the same order: "boxes" (D, 4), "classes" (D,), "scores" (D,); equal scores rank as they come.
        method: "area" under the precision that never falls (VOC 2010 and later), or "11-point": its mean at the recalls 0, 0.1, ... 1.
        inclusive: boxes contain their last pixel, as in VOC's files: their width is x2 - x1 + 1. False: x2 - x1.
    Returns: VocAP.
    Raises: ValueError or TypeError naming the argument, the image and the column; ImportError where minkernels._host is not built.
    Source: VOCdevkit 2007 and 2010, VOCevaldet.m and VOCap.m. One difference: recalls are compared as whole numbers, 10 hits >= i
        objects, where the devkit's 0:0.1:1 holds 0.1 * 3, which is more than 3 / 10.
    """
    if method not in ("area", "11-point"):
        raise ValueError(f"method must be 'area' or '11-point', got {method!r}")
    if isinstance(iou_threshold, bool) or not isinstance(iou_threshold, int | float):
        raise TypeError(f"iou_threshold must be a number, got {iou_threshold!r}")
    if not 0 < iou_threshold <= 1:
        raise ValueError(f"iou_threshold must be in (0, 1], got {iou_threshold!r}")
    scene = boxes.from_arrays(gts, dets, "difficult")
    gts, dets, K = scene.gts, scene.dets, len(scene.classes)
    difficult = np.zeros(len(gts.box), np.uint8) if gts.flag is None else gts.flag
    outcome = host().voc_match(
        gts.box, gts.image, gts.category, difficult, dets.box, dets.image, dets.category, dets.score,
        scene.images, K, iou_threshold, float(inclusive),
    )  # fmt: skip
    objects = np.bincount(gts.category[difficult == 0], minlength=K)
    order = np.lexsort((-dets.score, dets.category))  # a stable sort
    parts = np.split(order, np.cumsum(np.bincount(dets.category, minlength=K))[:-1]) if K else []
    ap, curves = np.full(K, np.nan), []
    for k, part in enumerate(parts):
        hits, false = np.cumsum(outcome[part] == 1), np.cumsum(outcome[part] == 0)
        precision = hits / np.maximum(hits + false, 1)
        recall = hits / objects[k] if objects[k] else np.full(len(part), np.nan)
        curves.append(Curve(recall, precision, dets.score[part]))
        if objects[k]:
            ap[k] = _voc_area(recall, precision) if method == "area" else _voc_11_point(hits, objects[k], precision)
    scored = ap[~np.isnan(ap)]
    return VocAP(ap, float(scored.mean()) if scored.size else float("nan"), scene.classes, tuple(curves))


def _voc_area(recall, precision):
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    return float((np.diff(recall, prepend=0.0) * envelope).sum())


def _voc_11_point(hits, objects, precision):
    envelope = np.append(np.maximum.accumulate(precision[::-1])[::-1], 0.0)  # 0: a recall that is not reached
    return float(envelope[np.searchsorted(10 * hits, np.arange(11) * objects)].sum() / 11)


@dataclass(frozen=True, eq=False)
class SegmentationScores:
    """What segmentation_scores returns. NaN for a class that neither side has; the means are over the others.

    iou: (C,) float64, intersection over union of each class, all images together. dice: (C,) float64, 2 intersection / (sum of both).
    mean_iou, mean_dice: floats. pixels: (C, 3) int64: intersection, predicted, true.
    """

    iou: np.ndarray
    dice: np.ndarray
    mean_iou: float
    mean_dice: float
    pixels: np.ndarray


def segmentation_scores(pred: Iterable, target: Iterable, *, num_classes: int, ignore_index: int | None = None) -> SegmentationScores:
    """IoU and Dice of each class and their means, over all pixels of all images.

    Args:
        pred, target: (N, ...) label maps of whole numbers 0 .. C - 1, or (N, C, ...) bool masks, in which classes may overlap. Arrays or
            tensors, or one of them an image, of any sizes; no copy of them all is made.
        num_classes: C. ignore_index: pixels whose target is that label count nowhere; for label maps alone.
    Raises: ValueError or TypeError naming the argument and the image.
    """
    if isinstance(num_classes, bool) or not isinstance(num_classes, int) or num_classes < 1:
        raise ValueError(f"num_classes must be a positive int, got {num_classes!r}")
    if ignore_index is not None and (isinstance(ignore_index, bool) or not isinstance(ignore_index, int)):
        raise TypeError(f"ignore_index must be an int or None, got {ignore_index!r}")
    pixels = np.zeros((num_classes, 3), np.int64)
    if hasattr(pred, "__len__") and hasattr(target, "__len__") and len(pred) != len(target):
        raise ValueError(f"pred and target must have as many images, got {len(pred)} and {len(target)}")
    nothing = object()
    for i, (p, t) in enumerate(itertools.zip_longest(pred, target, fillvalue=nothing)):
        if p is nothing or t is nothing:
            raise ValueError(f"pred and target must have as many images, got {i} and more")
        p, t = boxes._array(p), boxes._array(t)
        if p.shape != t.shape:
            raise ValueError(f"pred[{i}] and target[{i}] must have the same shape, got {p.shape} and {t.shape}")
        if p.dtype == t.dtype == bool:
            if ignore_index is not None:
                raise ValueError(f"ignore_index is for label maps, got {ignore_index} and masks")
            if p.ndim < 1 or len(p) != num_classes:
                raise ValueError(f"pred[{i}] must be masks of shape ({num_classes}, ...), got {p.shape}")
            p, t = p.reshape(num_classes, -1), t.reshape(num_classes, -1)
            pixels += np.stack([np.count_nonzero(mask, 1) for mask in (p & t, p, t)], 1)
            continue
        if p.dtype.kind not in "iu" or t.dtype.kind not in "iu":
            raise TypeError(f"pred[{i}] and target[{i}] must both be whole numbers or both bool, got {p.dtype} and {t.dtype}")
        p, t = p.ravel(), t.ravel()
        if ignore_index is not None:
            p, t = p[t != ignore_index], t[t != ignore_index]
        for name, labels in (("pred", p), ("target", t)):
            if labels.size and not 0 <= labels.min() <= labels.max() < num_classes:
                bad = labels[(labels < 0) | (labels >= num_classes)][0]
                raise ValueError(f"{name}[{i}] must hold labels 0 .. {num_classes - 1}, got {bad}")
        pixels += np.stack([np.bincount(labels, minlength=num_classes) for labels in (t[p == t], p, t)], 1)
    both, predicted, true = pixels.T
    with np.errstate(invalid="ignore"):  # 0 / 0: the class is nowhere
        iou, dice = both / (predicted + true - both), 2 * both / (predicted + true)
    there = predicted + true > 0
    means = (float(score[there].mean()) if there.any() else float("nan") for score in (iou, dice))
    return SegmentationScores(iou, dice, *means, pixels)


def _place(value, among: Sequence, name: str) -> int:
    if value not in among:
        raise ValueError(f"{name} must be one of {', '.join(map(str, among))}, got {value!r}")
    return among.index(value)


def host():
    """The C++ side. Raises ImportError where it is not built."""
    try:
        return importlib.import_module("minkernels._host")
    except ModuleNotFoundError as error:
        if error.name != "minkernels._host":
            raise
        reason = "minkernels._host is not built for this Python: pip install pybind11, then python -m minkernels build"
        raise ImportError(reason) from error
