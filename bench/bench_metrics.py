"""COCO average precision of boxes beside pycocotools and what is made to replace it, from memory and from files. CPU alone, one thread."""

import contextlib
import io
import json
import tempfile
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from bench.timing import installed
from minmodels import metrics


class Case(NamedTuple):
    images: int
    dets: int  # in each image
    classes: int = 80

    def __str__(self):
        return f"{self.images}x{self.dets}-{self.classes}-classes"


def load(name):
    """() -> (COCO, COCOeval)"""

    def classes():
        if name == "pycocotools":
            from pycocotools.coco import COCO
            from pycocotools.cocoeval import COCOeval
        elif name == "hotcoco":
            from hotcoco import COCO, COCOeval
        else:
            from faster_coco_eval import COCO
            from faster_coco_eval import COCOeval_faster as COCOeval
        return lambda: (COCO, COCOeval)

    return installed(name, classes)


def load_ours():
    metrics.host()
    return metrics.coco_ap


coco_ap = installed("minkernels._host", load_ours)
PEERS = {name: load(name) for name in ("pycocotools", "hotcoco", "faster-coco-eval")}
IMPLS = *PEERS, "minkernels"  # the first one judges the others
SIZES = [Case(500, 100), Case(5000, 100)]
CASES = {"cpu": SIZES, "cuda": [], "tiny": [Case(5, 10, 3)]}


def make(case):
    """xywh boxes: 0 to 14 objects in an image, as dense as COCO val's; the nearer a detection lies to one, the higher its score."""
    rng = np.random.default_rng(0)
    gts, dets = [], []
    for _ in range(case.images):
        g, d = rng.integers(0, 15), case.dets
        box = np.concatenate([rng.random((g + 1, 2)) * 500, np.exp(rng.uniform(2, 5.5, (g + 1, 2)))], 1)
        category, near = rng.integers(0, case.classes, g + 1), rng.integers(0, g + 1, d)  # the last one is a false alarm
        noise = rng.exponential(0.12, d)
        found = box[near] + rng.normal(size=(d, 4)) * (noise[:, None] * box[near][:, [2, 3, 2, 3]])
        confused = np.where(rng.random(d) < 0.6, category[near], rng.integers(0, case.classes, d))
        score = np.exp(-4 * noise * rng.uniform(0.5, 2, d)).round(4)
        crowd = (rng.random(g) < 0.01).astype(int)
        gts.append({"boxes": box[:g], "classes": category[:g], "crowd": crowd, "area": 0.7 * box[:g, 2] * box[:g, 3]})
        dets.append({"boxes": found, "classes": confused, "scores": score})
    return gts, dets


def to_files(folder, case, gts, dets):
    truth = {"info": {}, "images": [], "categories": [{"id": c, "name": str(c)} for c in range(case.classes)], "annotations": []}
    results = []
    for i, (g, d) in enumerate(zip(gts, dets, strict=True)):
        truth["images"].append({"id": i, "file_name": f"{i}.jpg", "width": 640, "height": 480})
        for *values, crowd, area in zip(*(g[key].tolist() for key in ("classes", "boxes", "crowd", "area")), strict=True):
            entry = {"id": len(truth["annotations"]) + 1, "image_id": i, "iscrowd": crowd, "area": area}
            truth["annotations"].append({**entry, **dict(zip(("category_id", "bbox"), values, strict=True))})
        for category, box, score in zip(*(d[key].tolist() for key in ("classes", "boxes", "scores")), strict=True):
            results.append({"image_id": i, "category_id": category, "bbox": box, "score": score})
    paths = Path(folder, "truth.json"), Path(folder, "found.json")
    for path, data in zip(paths, (truth, results), strict=True):
        path.write_text(json.dumps(data))
    return [str(path) for path in paths]


def opened(COCO, paths):
    truth = COCO(paths[0])
    return truth, truth.loadRes(paths[1])


def evaluated(COCOeval, objects):
    evaluation = COCOeval(*objects, "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return list(evaluation.stats)[:12]


def run(timed, case, op, from_files):
    def build():
        folder = tempfile.TemporaryDirectory()  # lives as long as the callables
        gts, dets = make(case)
        paths = to_files(folder.name, case, gts, dets)

        def peer(name):
            @cache
            def ready():
                COCO, COCOeval = PEERS[name]()
                return COCO, COCOeval, None if from_files else opened(COCO, paths)

            def call():
                with contextlib.redirect_stdout(io.StringIO()):
                    COCO, COCOeval, objects = ready()
                    return evaluated(COCOeval, objects or opened(COCO, paths))

            return call

        def ours():
            result = coco_ap(*paths) if from_files else coco_ap(gts, dets, fmt="xywh")
            str(result)
            return list(result.stats.values())

        first = []

        def judge(stats, keep=folder):
            first.append(stats)
            error = max(abs(a - b) for a, b in zip(stats, first[0], strict=True))
            assert error <= 1e-4, f"figures {error:.3g} from those of the first one"  # hotcoco promises no more
            return error

        return {**{name: peer(name) for name in PEERS}, "minkernels": ours}, judge

    rounds = {"warmup": 0, "min_rounds": 1} if case.images > 1000 else {}  # pycocotools takes minutes
    timed(op, build, shape=case, dtype=torch.float64, **rounds)


def bench_coco_ap(timed, device, case, impl):
    """Theirs: evaluate, accumulate and summarize, with both files loaded; ours: from the arrays of each image."""
    run(timed, case, "coco_ap", from_files=False)


def bench_coco_ap_files(timed, device, case, impl):
    run(timed, case, "coco_ap from files", from_files=True)


bench_coco_ap_files.cases = {**CASES, "cpu": SIZES[:1]}
