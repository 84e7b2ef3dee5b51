"""VOC average precision against a plain loop over its rules, segmentation scores against sets of pixels, and the building of both."""

import importlib.machinery
import re
import sys

import pytest
import torch

pytest.importorskip("numpy")  # a machine that has torch alone can run the other tests
pytest.importorskip("pycocotools")
pytest.importorskip("pybind11")  # without which there is no minkernels._host
import numpy as np

import metrics_cases as cases
from metrics_cases import DET, GT
from minkernels import _build
from minmodels.metrics import coco_ap, segmentation_scores, voc_ap

pytestmark = pytest.mark.usefixtures("host")


# VOC


def plain_voc(gts, dets, category, method, threshold, one):
    """The devkit's loop, over one class: recall, precision, average precision."""
    ranked = [(-s, i, n) for i, d in enumerate(dets) for n, s in enumerate(d["scores"]) if d["classes"][n] == category]
    taken, hits, judged, recall, precision = set(), 0, 0, [], []
    objects = sum(not bad for g in gts for c, bad in zip(g["classes"], g["difficult"], strict=True) if c == category)
    for _, i, n in sorted(ranked):
        x1, y1, x2, y2 = dets[i]["boxes"][n]
        best, largest = None, 0.0
        for j, (u1, v1, u2, v2) in enumerate(gts[i]["boxes"]):
            w, h = min(x2, u2) - max(x1, u1) + one, min(y2, v2) - max(y1, v1) + one
            if gts[i]["classes"][j] == category and w > 0 and h > 0:
                iou = w * h / ((x2 - x1 + one) * (y2 - y1 + one) + (u2 - u1 + one) * (v2 - v1 + one) - w * h)
                if iou > largest:
                    best, largest = j, iou
        if largest < threshold or not gts[i]["difficult"][best]:
            judged += 1
            if largest >= threshold and (i, best) not in taken:
                hits += 1
                taken.add((i, best))
        recall.append(hits / objects if objects else float("nan"))
        precision.append(hits / judged if judged else 0.0)
    if not objects:
        return recall, precision, float("nan")
    if method == "11-point":
        reached = [max([p for p, r in zip(precision, recall, strict=True) if r * 10 > i - 1e-9], default=0) for i in range(11)]
        return recall, precision, sum(reached) / 11
    area, before = 0.0, 0.0
    for n, r in enumerate(recall):
        area, before = area + (r - before) * max(precision[n:]), r
    return recall, precision, area


@pytest.mark.parametrize("method", ["area", "11-point"])
@pytest.mark.parametrize("inclusive", [True, False], ids=["inclusive", "exclusive"])
def test_voc_ap(method, inclusive):
    scores = []
    for seed in cases.SEEDS:
        gts, dets = cases.make(("plain", "grid", "same")[seed % 3], seed, images=10)
        for item in gts + dets:
            item["boxes"][:, 2:] += item["boxes"][:, :2]
        gts = [{"boxes": g["boxes"], "classes": g["classes"], "difficult": g["crowd"]} for g in gts]
        threshold = (0.5, 0.3, 1.0)[seed % 3]
        ours = voc_ap(gts, dets, method=method, iou_threshold=threshold, inclusive=inclusive)
        for k, category in enumerate(ours.classes):
            recall, precision, ap = plain_voc(gts, dets, category, method, threshold, inclusive)
            assert np.array_equal(ours.curve(category).recall, recall, equal_nan=True)
            assert np.array_equal(ours.curve(category).precision, precision)
            assert ours.ap[k] == pytest.approx(ap, abs=1e-12, nan_ok=True)
        assert ours.mean == pytest.approx(np.nanmean(ours.ap), abs=1e-12)
        scores.append(ours.mean)
    assert max(scores) > 0.25 and min(scores) < 0.1


def test_voc_by_hand():
    """Two objects and a difficult one; a hit, a second hit on the same, one on the difficult, a miss, the other's hit."""
    gts = [{"boxes": [[0, 0, 9, 9], [20, 0, 29, 9], [40, 0, 49, 9]], "classes": [1, 1, 1], "difficult": [0, 0, 1]}]
    at = [0, 0, 40, 60, 20]
    dets = [{"boxes": [[x, 0, x + 9, 9] for x in at], "classes": [1] * 5, "scores": [0.9, 0.8, 0.7, 0.6, 0.5]}]
    ours = voc_ap(gts, dets)
    assert ours.curve(1).recall.tolist() == [0.5, 0.5, 0.5, 0.5, 1.0]
    assert ours.curve(1).precision.tolist() == [1, 1 / 2, 1 / 2, 1 / 3, 2 / 4]
    assert ours.curve(1).score.tolist() == [0.9, 0.8, 0.7, 0.6, 0.5]
    assert ours.mean == 0.5 * 1 + 0.5 * 0.5
    assert voc_ap(gts, dets, method="11-point").mean == pytest.approx((6 * 1 + 5 * 0.5) / 11, abs=1e-12)
    assert np.isnan(voc_ap([], []).mean)


def test_a_recall_of_three_tenths_is_one():
    boxes = [[20 * i, 0, 20 * i + 9, 9] for i in range(10)]
    gts, dets = [{"boxes": boxes, "classes": [1] * 10}], [{"boxes": boxes[:3], "classes": [1] * 3, "scores": [1] * 3}]
    assert voc_ap(gts, dets, method="11-point").mean == pytest.approx(4 / 11, abs=1e-12)  # 0, 0.1, 0.2, 0.3


def test_voc_bad_input():
    truth = {"boxes": GT["boxes"], "classes": GT["classes"]}
    for options, message in [({"method": "12-point"}, "method must be"), ({"iou_threshold": 0}, "iou_threshold must be in (0, 1], got 0")]:
        with pytest.raises(ValueError, match=re.escape(message)):
            voc_ap([truth], [DET], **options)
    with pytest.raises(ValueError, match=re.escape("and may have difficult; got boxes, classes, crowd")):
        voc_ap([{**truth, "crowd": [0, 0]}], [DET])


def test_without_the_module_one_sentence_says_how_to_build_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "minkernels._host", None)
    for call in (coco_ap, voc_ap):
        message = "^minkernels._host is not built for this Python: pip install pybind11, then python -m minkernels build$"
        with pytest.raises(ImportError, match=message):
            call([{"boxes": [], "classes": []}], [{"boxes": [], "classes": [], "scores": []}])


def test_the_build(tmp_path, monkeypatch):
    """The module's name is one that this Python imports."""
    out = _build.build_host(tmp_path / _build.HOST)
    assert importlib.machinery.PathFinder.find_spec("_host", [str(tmp_path)]).origin == str(out)
    out.unlink()
    monkeypatch.setitem(sys.modules, "pybind11", None)
    with pytest.raises(RuntimeError, match=r"^no pybind11: pip install pybind11$"):
        _build.build_host(out)
    assert not out.exists()


# Segmentation


def plain_scores(pred, target, classes, ignore):
    """IoU and Dice of each class, by sets of (image, pixel)."""
    iou, dice = [], []
    for c in range(classes):
        p, t = (
            {(i, x) for i, (a, b) in enumerate(zip(mine, target, strict=True)) for x in np.flatnonzero((a == c) & (b != ignore)).tolist()}
            for mine in (pred, target)
        )
        iou.append(len(p & t) / len(p | t) if p | t else float("nan"))
        dice.append(2 * len(p & t) / (len(p) + len(t)) if p | t else float("nan"))
    return iou, dice


@pytest.mark.parametrize("dtype", [np.uint8, np.int64])
@pytest.mark.parametrize("ignore", [None, 255, 0])
def test_label_maps(dtype, ignore):
    rng = np.random.default_rng(0)
    sizes = (7, 9), (0, 3), (30,), (2, 3, 4)
    target = [rng.integers(0, 4, size).astype(dtype) for size in sizes]
    pred = [np.where(rng.random(t.shape) < 0.6, t, rng.integers(0, 4, t.shape)).astype(dtype) for t in target]
    if ignore == 255:
        for p, t in zip(pred, target, strict=True):
            skip = rng.random(t.shape) < 0.2
            t[skip], p[skip] = 255, 77  # what is predicted there does not matter
    ours = segmentation_scores(pred, target, num_classes=5, ignore_index=ignore)
    iou, dice = plain_scores(pred, target, 5, ignore)
    assert np.allclose(ours.iou, iou, rtol=0, atol=1e-15, equal_nan=True) and np.isnan(ours.iou[4])
    assert np.allclose(ours.dice, dice, rtol=0, atol=1e-15, equal_nan=True)
    assert ours.mean_iou == pytest.approx(np.nanmean(iou)) and ours.mean_dice == pytest.approx(np.nanmean(dice))
    assert 0.3 < ours.mean_iou < ours.mean_dice < 0.9


def test_masks_are_label_maps_that_may_overlap():
    target, pred = torch.randint(0, 3, (2, 4, 8, 8), generator=torch.Generator().manual_seed(0))
    maps = segmentation_scores(pred, target, num_classes=3)
    masks = [torch.nn.functional.one_hot(t, 3).movedim(-1, 1).bool() for t in (pred, target)]
    ours = segmentation_scores(*masks, num_classes=3)
    assert np.array_equal(ours.pixels, maps.pixels) and ours.mean_dice == maps.mean_dice
    both = segmentation_scores(torch.ones(1, 2, 5, dtype=torch.bool), torch.ones(1, 2, 5, dtype=torch.bool), num_classes=2)
    assert both.iou.tolist() == [1, 1] and both.pixels.tolist() == [[5, 5, 5]] * 2
    assert np.isnan(segmentation_scores([], [], num_classes=2).mean_iou)


def test_segmentation_bad_input():
    ones = np.ones((2, 3), int)
    for args, options, kind, message in [
        (([ones, ones * 7], [ones, ones]), {}, ValueError, "pred[1] must hold labels 0 .. 2, got 7"),
        (([ones], [-ones]), {}, ValueError, "target[0] must hold labels 0 .. 2, got -1"),
        (([ones], [ones[:1]]), {}, ValueError, "pred[0] and target[0] must have the same shape, got (2, 3) and (1, 3)"),
        (([ones], [ones, ones]), {}, ValueError, "must have as many images, got 1 and 2"),
        (([ones / 2], [ones]), {}, TypeError, "must both be whole numbers or both bool, got float64 and int64"),
        (([ones > 0], [ones]), {}, TypeError, "must both be whole numbers or both bool, got bool and int64"),
        (([ones > 0], [ones > 0]), {}, ValueError, "pred[0] must be masks of shape (3, ...), got (2, 3)"),
        (([ones > 0], [ones > 0]), {"ignore_index": 255}, ValueError, "ignore_index is for label maps, got 255 and masks"),
        (([ones], [ones]), {"num_classes": 0}, ValueError, "num_classes must be a positive int, got 0"),
        (([ones], [ones]), {"ignore_index": "0"}, TypeError, "ignore_index must be an int or None, got '0'"),
        (([ones], [ones]), {"ignore_index": True}, TypeError, "ignore_index must be an int or None, got True"),
        ((iter([ones]), iter([])), {}, ValueError, "pred and target must have as many images, got 0 and more"),
    ]:
        with pytest.raises(kind, match=re.escape(message)):
            segmentation_scores(*args, **{"num_classes": 3, **options})
