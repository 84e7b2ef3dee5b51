"""Detections to be scored, and pycocotools scoring them."""

import contextlib
import io

import numpy as np

SEEDS = range(24)
GT = {"boxes": [[0, 0, 5, 5], [1, 1, 2, 2]], "classes": [1, 2], "crowd": [0, 1], "area": [25.0, 1.0]}
DET = {"boxes": [[0, 0, 5, 5]], "classes": [1], "scores": [0.5]}


def plain(rng, n):
    return np.concatenate([rng.random((n, 2)) * 60, np.exp(rng.uniform(1, 5, (n, 2)))], 1)


def grid(rng, n):
    """Whole coordinates: ties, and IoUs that are a threshold exactly."""
    return np.concatenate([rng.integers(0, 3, (n, 2)), rng.integers(1, 21, (n, 2))], 1).astype(float)


def same(rng, n):
    return np.tile([3.0, 4, 40, 30], (n, 1))


def strange(rng, n):
    """Sides that are 0, negative, and so small or large that areas vanish or overflow: the IoU is NaN."""
    sides = rng.choice([0.0, -5, 1e-200, 1e-170, 1, 20, 1e5, 1e160, 1e308], (n, 2))
    return np.concatenate([rng.choice([-3.0, 0, 0, 0, 10], (n, 2)), sides], 1)


def border(rng, n):
    """Areas at, and next to, the ends of the area ranges."""
    area = rng.choice([32.0**2, 96.0**2, 1e10], n)
    area = np.choose(rng.integers(0, 3, n), [area, np.nextafter(area, 0), np.nextafter(area, np.inf)])
    return np.stack([rng.integers(0, 3, n), rng.integers(0, 3, n), area / 32, np.full(n, 32.0)], 1)


KINDS = {"plain": plain, "grid": grid, "same": same, "strange": strange, "border": border}


def make(kind, seed, *, images=6, classes=3, most=12):
    """(gts, dets) in xywh, up to `most` of each in an image; half of the detections lie near a ground truth."""
    rng = np.random.default_rng(seed)
    gts, dets = [], []
    for _ in range(images):
        g, d = rng.integers(0, most + 1, 2) * (rng.random(2) < 0.8)
        box, found = KINDS[kind](rng, g), KINDS[kind](rng, d)
        category, of_found = rng.integers(0, classes, g), rng.integers(0, classes, d)
        near = rng.integers(0, g, d) if g else np.zeros(d, int)
        if g:
            close = rng.random(d) < 0.5
            jitter = rng.normal(size=(d, 4)) * rng.choice([0, 0.02, 0.1], (d, 1)) * box[near][:, [2, 3, 2, 3]] if kind == "plain" else 0
            found = np.where(close[:, None], box[near] + jitter, found)
            of_found = np.where(close, category[near], of_found)
        own = np.minimum(box[:, 2], 1e30) * np.minimum(box[:, 3], 1e30)
        area = own if seed % 2 else rng.choice([0.0, 500, 1024, 5000, 9216, 1e6, 1e11], g)
        crowd = (rng.random(g) < rng.choice([0, 0.1, 0.5])).astype(int)
        score = rng.random(d) if seed % 3 else rng.integers(-1, 3, d) / 2
        gts.append({"boxes": box, "classes": 7 * category, "crowd": crowd, "area": area})
        dets.append({"boxes": found, "classes": 7 * of_found, "scores": score})
    return gts, dets


def to_coco(gts, dets):
    """The contents of an annotation file and of a result file."""
    classes = np.unique(np.concatenate([item["classes"] for item in gts + dets])).tolist()
    annotations, results = [], []
    for i, (g, d) in enumerate(zip(gts, dets, strict=True)):
        for box, category, crowd, area in zip(*(g[key].tolist() for key in ("boxes", "classes", "crowd", "area")), strict=True):
            entry = {"image_id": 10 + i, "category_id": category, "bbox": box, "area": area, "iscrowd": crowd}
            annotations.append({"id": len(annotations) + 1, **entry})
        for box, category, score in zip(*(d[key].tolist() for key in ("boxes", "classes", "scores")), strict=True):
            results.append({"image_id": 10 + i, "category_id": category, "bbox": box, "score": score})
    images = [{"id": 10 + i} for i in range(len(gts))]
    categories = [{"id": id, "name": f"class {id}"} for id in classes]
    return {"images": images, "categories": categories, "annotations": annotations}, results


def load(truth, results):
    """pycocotools' evaluation, before it runs. It changes what it is given."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = {"info": {}, **truth}
        coco.createIndex()
        return COCOeval(coco, coco.loadRes(results), "bbox")


def score(evaluation):
    """Runs it; returns what it prints in the end."""
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation.evaluate()
        evaluation.accumulate()
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        evaluation.summarize()
    return printed.getvalue()
