"""COCO average precision: pycocotools' to the last bit, from arrays and from files; and what bad ones say."""

import copy
import json
import re

import pytest
import torch

pytest.importorskip("numpy")  # a machine that has torch alone can run the other tests
pytest.importorskip("pycocotools")
pytest.importorskip("pybind11")  # without which there is no minkernels._host
import numpy as np

import metrics_cases as cases
from metrics_cases import DET, GT
from minmodels import UserError, metrics
from minmodels.metrics import coco_ap, voc_ap

pytestmark = pytest.mark.usefixtures("host")


def assert_is_pycocotools(ours, peer, printed):
    for name in ("precision", "recall", "scores"):
        assert np.array_equal(getattr(ours, name), peer.eval[name]), name
    assert np.abs(np.array(list(ours.stats.values())) - peer.stats).max() <= 1e-12
    assert str(ours) == ours.summary() and ours.summary() + "\n" == printed


def compare(gts, dets):
    truth, results = cases.to_coco(gts, dets)
    if not results:
        return None  # pycocotools cannot load none
    peer = cases.load(truth, results)
    printed = cases.score(peer)
    ours = coco_ap(gts, dets, fmt="xywh")
    assert ours.classes == tuple(peer.params.catIds)
    assert_is_pycocotools(ours, peer, printed)
    return ours


@pytest.mark.parametrize("kind", cases.KINDS)
def test_coco_ap_is_pycocotools(kind):
    scored = [compare(*cases.make(kind, seed)) for seed in cases.SEEDS]
    scored = [ap for ap in scored if ap and ap.ap > -1]
    assert len(scored) > 20 and sum(ap.ap > 0 for ap in scored) > 15  # not equal for want of anything to score


def test_more_detections_than_count():
    """130 to 400 a class and image: those past 1, 10 and 100 are left out, the first of equal scores stay."""
    for seed in (0, 1, 3):
        gts, dets = cases.make("grid", seed, images=8, classes=2, most=800)
        gts = [{key: column[:15] for key, column in item.items()} for item in gts]
        ours = compare(gts, dets)
        assert (ours.recall[..., 0] <= ours.recall[..., 1]).all() and (ours.recall[..., 1] < ours.recall[..., 2]).any()
        assert max(len(item["boxes"]) for item in dets) > 300


def test_iou_at_a_threshold_matches():
    """20 x 20 boxes of which a slice is cut off: the IoU is 0.5, 0.55, ... 0.95, and next to it."""
    for side in range(10, 20):
        for width in (np.nextafter(side, 0), side, np.nextafter(side, 30)):
            gts = [{"boxes": np.array([[0.0, 0, 20, 20]]), "classes": np.array([1]), "crowd": np.array([0]), "area": np.array([400.0])}]
            dets = [{"boxes": np.array([[0.0, 0, width, 20]]), "classes": np.array([1]), "scores": np.array([0.5])}]
            compare(gts, dets)


def test_classes_without_ground_truths_or_detections():
    gts, dets = cases.make("plain", 1, images=20, classes=4)
    for item in dets:
        item["classes"] = np.where(item["classes"] == 7, 700, item["classes"])  # class 7 is never found, 700 never there
    ours = compare(gts, dets)
    k = ours.classes.index(700)
    assert ours.ap_per_class[k] == -1 and (ours.precision[:, :, k] == -1).all()
    assert ours.ap_per_class[ours.classes.index(7)] == 0
    there = ours.ap_per_class[ours.ap_per_class > -1]
    assert ours.ap == pytest.approx(there.mean(), abs=1e-12)


def test_nothing_to_score():
    box = {"boxes": [[0, 0, 5, 5]], "classes": [3]}
    none = {"boxes": [], "classes": []}
    assert set(coco_ap([], []).stats.values()) == {-1.0}
    assert set(coco_ap([none], [{**none, "scores": []}]).stats.values()) == {-1.0}
    assert coco_ap([none], [{**box, "scores": [1]}]).ap == -1 and coco_ap([box], [{**none, "scores": []}]).ap == 0
    assert coco_ap([box], [{**box, "scores": [1]}]).ap == pytest.approx(1, abs=1e-12)


def test_threads_and_dtypes_and_formats_agree():
    gts, dets = cases.make("grid", 5, images=20, classes=30, most=40)
    ours = coco_ap(gts, dets, fmt="xywh")
    assert 0 < ours.ap < 1
    before = copy.deepcopy((gts, dets))

    def relaid(fmt, convert):
        """As tensors, boxes in fmt; halves of whole numbers are exact in all dtypes."""

        def boxes(b):
            if fmt == "xyxy":
                return np.concatenate([b[:, :2], b[:, :2] + b[:, 2:]], 1)
            return np.concatenate([b[:, :2] + b[:, 2:] / 2, b[:, 2:]], 1) if fmt == "cxcywh" else b

        return [[{**item, "boxes": convert(boxes(item["boxes"]))} for item in items] for items in (gts, dets)]

    others = [
        coco_ap(gts, dets, fmt="xywh", threads=4),
        coco_ap(*relaid("xywh", np.ndarray.tolist), fmt="xywh"),
        coco_ap(*relaid("xyxy", lambda b: torch.from_numpy(b).bfloat16().requires_grad_())),
        coco_ap(*relaid("cxcywh", np.float32), fmt="cxcywh"),
        coco_ap(*relaid("xywh", lambda b: np.asfortranarray(b)[:, ::-1][:, ::-1]), fmt="xywh"),
    ]
    for other in others:
        for name in ("precision", "recall", "scores"):
            assert np.array_equal(getattr(other, name), getattr(ours, name))
    again = gts, dets
    for old, new in zip(before[0] + before[1], again[0] + again[1], strict=True):
        assert all(np.array_equal(old[key], new[key]) for key in old)  # no input is changed


def test_areas_and_crowds_have_defaults():
    gts, dets = cases.make("plain", 1)
    bare = [{"boxes": item["boxes"], "classes": item["classes"]} for item in gts]
    full = [{**item, "crowd": np.zeros(len(item["boxes"]), bool), "area": item["boxes"][:, 2] * item["boxes"][:, 3]} for item in bare]
    assert coco_ap(bare, dets, fmt="xywh").stats == coco_ap(full, dets, fmt="xywh").stats


def test_curves():
    ours = coco_ap(*cases.make("plain", 1, images=20), fmt="xywh")
    curve = ours.curve(7, iou=0.75, area="medium", max_dets=10)
    assert np.array_equal(curve.recall, np.linspace(0, 1, 101))
    assert np.array_equal(curve.precision, ours.precision[5, :, 1, 2, 1]) and np.array_equal(curve.score, ours.scores[5, :, 1, 2, 1])
    assert (np.diff(ours.curve(7).precision) <= 0).all() and ours.curve(7).precision[0] > 0
    for bad in (dict(class_id=8), dict(class_id=7, iou=0.51), dict(class_id=7, area="huge"), dict(class_id=7, max_dets=5)):
        with pytest.raises(ValueError, match="must be one of"):
            ours.curve(**bad)


def test_curves_are_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    from minmodels.plot import precision_recall_figure

    gts, dets = cases.make("grid", 1)
    voc = voc_ap([{"boxes": item["boxes"], "classes": item["classes"]} for item in gts], dets)
    curves = {"COCO": coco_ap(gts, dets, fmt="xywh").curve(7), "VOC": voc.curve(7)}
    figure = precision_recall_figure(curves, "class 7")
    lines = figure.axes[0].get_lines()
    assert [line.get_label() for line in lines] == ["COCO", "VOC"]
    assert all(np.array_equal(line.get_ydata(), curve.precision) for line, curve in zip(lines, curves.values(), strict=True))
    figure.savefig(tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


# Bad arrays

BAD = {
    "gt boxes of three": ({"boxes": [[0, 0, 5], [1, 1, 2]]}, {}, ValueError, "gts[1]['boxes'] must have shape (2, 4), got (2, 3)"),
    "gt NaN": ({"boxes": [[0] * 4, [0, np.nan, 5, 5]]}, {}, ValueError, "gts[1]['boxes'] must be finite, got [ 0. nan  5.  5.] in row 1"),
    "gt text": ({"boxes": [["0", "0", "5", "5"]] * 2}, {}, TypeError, "gts[1]['boxes'] must hold numbers, got <U1"),
    "gt classes": ({"classes": [1.0, 2.0]}, {}, TypeError, "gts[1]['classes'] must hold whole numbers, got float64"),
    "gt too few classes": ({"classes": [1]}, {}, ValueError, "gts[1]['classes'] must have shape (2,), got (1,)"),
    "crowd of 2": ({"crowd": [0, 2]}, {}, ValueError, "gts[1]['crowd'] must be 0 or 1, got 2 in row 1"),
    "crowd of 256": ({"crowd": np.array([0, 256])}, {}, ValueError, "gts[1]['crowd'] must be 0 or 1, got 256 in row 1"),
    "crowd of -255": ({"crowd": np.array([-255, 0])}, {}, ValueError, "gts[1]['crowd'] must be 0 or 1, got -255 in row 0"),
    "class of 2**63": (
        {"classes": np.array([0, 2**63], np.uint64)}, {}, ValueError, f"gts[1]['classes'] must hold numbers below 2**63, got {2**63}",
    ),
    "no boxes": ({}, {"boxes": 3}, ValueError, "dets[1]['boxes'] must have shape (N, 4), got ()"),
    "ragged boxes": ({}, {"boxes": [[1, 2, 3, 4], [1, 2]]}, ValueError, "dets[1]['boxes'] is no array: "),
    "area inf": ({"area": [np.inf, 1]}, {}, ValueError, "gts[1]['area'] must be finite, got inf in row 0"),
    "unknown": ({"iscrowd": [0, 0]}, {}, ValueError, "gts[1] must have boxes, classes and may have area, crowd; got boxes"),
    "difficult": ({"difficult": [0, 0]}, {}, ValueError, "and may have area, crowd; got"),
    "no crowd": ({"crowd": None}, {}, ValueError, "'crowd' must be in all gts or in none: gts[1] lacks it"),
    "no scores": ({}, {"scores": None}, ValueError, "dets[1] must have boxes, classes, scores; got boxes, classes"),
    "score NaN": ({}, {"scores": [np.nan]}, ValueError, "dets[1]['scores'] must be finite, got nan in row 0"),
    "scores bool": ({}, {"scores": [True]}, TypeError, "dets[1]['scores'] must hold numbers, got bool"),
}


@pytest.mark.parametrize("gt, det, kind, message", BAD.values(), ids=BAD)
def test_bad_arrays(gt, det, kind, message):
    gts, dets = ([good, {k: v for k, v in {**good, **bad}.items() if v is not None}] for good, bad in ((GT, gt), (DET, det)))
    with pytest.raises(kind, match=re.escape(message)):
        coco_ap(gts, dets)


def test_bad_arguments():
    for args, options, kind, message in [
        (([GT], [DET, DET]), {}, ValueError, "an entry for each image, got 1 and 2"),
        ((GT, DET), {}, TypeError, "gts must be a list with a dict for each image"),
        (("a.json", [DET]), {}, TypeError, "gts must be a list with a dict for each image, or both gts and dets a path, got str"),
        (([[0, 0, 5, 5]], [DET]), {}, TypeError, "gts[0] must be a dict, got list"),
        (([GT], [DET]), {"fmt": "yxyx"}, ValueError, "fmt must be"),
        (([GT], [DET]), {"threads": 0}, ValueError, "threads must be a positive int, got 0"),
    ]:
        with pytest.raises(kind, match=re.escape(message)):
            coco_ap(*args, **options)


# COCO files


def write(folder, truth, results):
    paths = folder / "truth.json", folder / "found.json"
    for path, data in zip(paths, (truth, results), strict=True):
        path.write_text(data if isinstance(data, str) else json.dumps(data))
    return paths


@pytest.mark.parametrize("seed", range(4))
def test_files_are_scored_as_pycocotools_does(tmp_path, seed):
    """Entries in any order; ids of images that are text; an annotation whose id is 0, which pycocotools would not count."""
    truth, results = cases.to_coco(*cases.make("grid", seed, images=24))
    rng = np.random.default_rng(seed)
    for entries in (truth["images"], truth["annotations"], results):
        rng.shuffle(entries)
    if seed == 3:
        for entry in truth["annotations"] + results:
            entry["image_id"] = f"image {entry['image_id']}"
        truth["images"] = [{"id": f"image {entry['id']}"} for entry in truth["images"]]
    paths = write(tmp_path, truth, results)
    peer = cases.load(truth, results)
    printed = cases.score(peer)
    ours = coco_ap(*paths)
    assert ours.ap > 0 and ours.names == tuple(f"class {id}" for id in ours.classes)
    assert_is_pycocotools(ours, peer, printed)
    from_zero = {**truth, "annotations": [{**entry, "id": entry["id"] - 1} for entry in truth["annotations"]]}
    from_zero["annotations"] = [{k: v for k, v in e.items() if k not in ("ignore", "_ignore")} for e in from_zero["annotations"]]
    again = coco_ap(*map(str, write(tmp_path, from_zero, json.loads(paths[1].read_text()))))
    assert np.array_equal(again.precision, ours.precision)


def spoil(where, i, **changes):
    """Changes entry i of a list; None removes a key."""

    def change(truth, results):
        entry = (truth[where] if where else results)[i]
        entry.update(changes)
        for key, value in changes.items():
            if value is None:
                del entry[key]

    return change


BAD_FILES = {  # what is done to good files, which file is named, the rest of the message
    "no annotations": (lambda t, r: t.pop("annotations"), "truth", "it has no annotations"),
    "images no list": (lambda t, r: t.update(images={}), "truth", "images is {}, not a list"),
    "no bbox": (spoil("annotations", 3, bbox=None), "truth", "annotations[3]: it has no bbox"),
    "no area": (spoil("annotations", 3, area=None), "truth", "annotations[3]: it has no area"),
    "no iscrowd": (spoil("annotations", 3, iscrowd=None), "truth", "annotations[3]: it has no iscrowd"),
    "no category_id": (spoil("annotations", 3, category_id=None), "truth", "annotations[3]: it has no category_id"),
    "no id": (spoil("categories", 1, id=None), "truth", "categories[1]: it has no id"),
    "three numbers": (spoil("annotations", 2, bbox=[1, 2, 3]), "truth", "annotations[2]: bbox is [1, 2, 3], not four finite numbers"),
    "text": (spoil("annotations", 2, bbox=[1, 2, 3, "4"]), "truth", "annotations[2]: bbox is [1, 2, 3, '4'], not four finite numbers"),
    "true": (spoil("annotations", 2, bbox=[1, 2, 3, True]), "truth", "annotations[2]: bbox is [1, 2, 3, True], not four finite numbers"),
    "NaN": (spoil("annotations", 2, bbox=[1, 2, 3, np.nan]), "truth", "annotations[2]: bbox is [1, 2, 3, nan], not four finite numbers"),
    "huge": (spoil("annotations", 2, bbox=[1, 2, 3, 10**400]), "truth", "annotations[2]: bbox is [1, 2, 3, 1000"),
    "a number": (spoil("annotations", 2, bbox=7), "truth", "annotations[2]: bbox is 7, not four finite numbers"),
    "area text": (spoil("annotations", 4, area="12"), "truth", "annotations[4]: area is '12', not a finite number"),
    "crowd of 2": (spoil("annotations", 1, iscrowd=2), "truth", "annotations[1]: iscrowd is 2, neither 0 nor 1"),
    "an unknown image": (spoil("annotations", 1, image_id=99), "truth", "annotations[1]: image_id 99 is not in "),
    "an unknown category": (spoil("annotations", 1, category_id=5), "truth", "annotations[1]: category_id 5 is not in "),
    "a list for an id": (spoil("annotations", 1, image_id=[1]), "truth", "annotations[1]: image_id is [1], neither a number nor text"),
    "an id twice": (spoil("annotations", 5, id=2), "truth", "annotations[5]: its id 2 is that of annotations[1] too"),
    "an image twice": (spoil("images", 2, id=10), "truth", "images[2]: its id 10 is that of images[0] too"),
    "ids of two kinds": (spoil("images", 2, id="b"), "truth", "images[2]: its id is 'b' where that of images[0] is 10"),
    "an entry no object": (lambda t, r: t["annotations"].insert(1, [1, 2]), "truth", "annotations[1]: it is [1, 2], not an object"),
    "a result's image": (spoil("", 3, image_id=99), "found", "detections[3]: image_id 99 is not in "),
    "a result's category": (spoil("", 3, category_id=5), "found", "detections[3]: category_id 5 is not in "),
    "a result's box": (spoil("", 3, bbox=[1, 2, 3, 4, 5]), "found", "detections[3]: bbox is [1, 2, 3, 4, 5], not four finite numbers"),
    "no score": (spoil("", 3, score=None), "found", "detections[3]: it has no score"),
    "score null": (lambda t, r: r[3].update(score=None), "found", "detections[3]: score is None, not a finite number"),
    "score infinite": (spoil("", 3, score=np.inf), "found", "detections[3]: score is inf, not a finite number"),
}


@pytest.mark.parametrize("spoil, which, message", BAD_FILES.values(), ids=BAD_FILES)
def test_bad_files(tmp_path, monkeypatch, spoil, which, message):
    monkeypatch.setattr(metrics, "host", lambda: pytest.fail("something was computed"))
    truth, results = cases.to_coco(*cases.make("grid", 1))
    spoil(truth, results)
    paths = write(tmp_path, truth, results)
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path / which}.json: {message}")) as error:
        coco_ap(*paths)
    assert isinstance(error.value, UserError) and "\n" not in str(error.value)


def test_files_that_are_no_coco_files(tmp_path):
    truth, results = cases.to_coco(*cases.make("grid", 1))
    for bad, message in [
        ((json.dumps(truth)[:-9], results), "truth.json is not JSON, or cut off"),
        (("[" * 100_000, results), "truth.json is not JSON, or cut off"),
        ((results, results), "truth.json: an object with images, categories, annotations was expected, got list"),
        ((truth, truth), "found.json: a list of detections was expected, got dict"),
    ]:
        with pytest.raises(UserError, match=re.escape(message)):
            coco_ap(*write(tmp_path, *bad))
    with pytest.raises(UserError, match=r"cannot read .*none\.json: No such file"):
        coco_ap(tmp_path / "none.json", tmp_path / "found.json")
    assert coco_ap(*write(tmp_path, truth, [])).ap == 0
