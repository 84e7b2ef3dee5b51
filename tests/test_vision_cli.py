"""minUNet and minYOLO through the command line: exact resumption, what they learn, the files they write, the text of each error."""

import json
import os
import re
import sys

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib")  # the extra "models"
pytest.importorskip("rich")
pytest.importorskip("safetensors")
pytest.importorskip("minkernels._host", reason="minkernels._host is not built: pip install pybind11, python -m minkernels build")

from matplotlib.figure import Figure
from PIL import Image

from minmodels import files
from minmodels.recipes import yolo
from test_minmodels_cli import metrics, run, stop_after
from vision_cases import shapes, squares

TINY = {
    "unet": ["--width", 4, "--depth", 2, "--crop", 32, "--batch-size", 4, "--warmup", 3],
    "yolo": ["--width", 4, "--cells", 4, "--batch-size", 4, "--warmup", 3],
}
USES = {"unet": "segment", "yolo": "detect"}
PICTURES = {"unet": ["segmentation.png"], "yolo": ["detections.png", "precision_recall.png"]}


def data(model, folder, **kwargs):
    """The options that name a small data set."""
    if model == "unet":
        squares(folder, **kwargs)
        return "--images", folder / "images", "--masks", folder / "masks"
    return "--yolo", shapes(folder, **kwargs)


def tiny(model, options, out, *more):
    return run("train", model, *options, "--out", out, *TINY[model], *more)


@pytest.mark.parametrize("model", TINY)
def test_resuming_repeats_the_losses_bit_for_bit(model, tmp_path, monkeypatch, capsys):
    straight, broken, options = tmp_path / "straight", tmp_path / "broken", data(model, tmp_path / "data")
    length = "--steps", 6, "--eval-every", 2, "--seed", 3
    assert tiny(model, options, straight, *length) == 0
    with monkeypatch.context() as m:
        stop_after(m, 3)
        assert tiny(model, options, broken, *length) == 130
    capsys.readouterr()
    assert run("train", model, "--out", broken, "--resume") == 0
    told = capsys.readouterr().out.splitlines()[-1]
    assert told == f"to use it: python -m minmodels {USES[model]} IMAGE --checkpoint {broken} --out DIR"
    scores = {"unet": ["Dice", "IoU"], "yolo": ["AP50", "AP", "VOC AP"]}[model]
    for key in ("loss", "lr", "heldout", *scores):
        assert metrics(broken, key) == metrics(straight, key) != []
    (tensors, _), (others, _) = (files.load_checkpoint(out) for out in (straight, broken))
    assert tensors.keys() == others.keys() and all(torch.equal(t, others[name]) for name, t in tensors.items())
    assert any(name.endswith("running_var") for name in tensors)
    assert sorted(os.listdir(broken)) == sorted([files.CHECKPOINT, files.METRICS, files.CONFIG, "loss.png", *PICTURES[model]])
    for name in PICTURES[model]:
        pixels = np.asarray(Image.open(broken / name).convert("L"))
        assert (pixels < 255).mean() > (0.3 if name != "precision_recall.png" else 0.01)  # images, not their empty frames
    capsys.readouterr()
    assert run("eval", model, "--checkpoint", broken) == 0
    assert capsys.readouterr().out.startswith(f"held-out loss {metrics(straight, 'heldout')[-1][1]:.3f}  {scores[0]} ")


@pytest.mark.parametrize("classes", [1, 3])
def test_minunet_learns_and_segments(classes, tmp_path, capsys):
    options, out = data("unet", tmp_path / "data", classes=classes), tmp_path / "run"
    assert tiny("unet", options, out, "--classes", classes, "--steps", 100, "--eval-every", 50, "--lr", 0.02, "--width", 8) == 0
    dice = metrics(out, "Dice" if classes == 1 else "mean Dice")[-1][1]
    assert dice > (0.95 if classes == 1 else 0.8)
    found = tmp_path / "found"
    capsys.readouterr()
    assert run("segment", tmp_path / "data" / "images", "--checkpoint", out, "--out", found) == 0
    assert capsys.readouterr().out.splitlines() == [str(found / f"{i}.mask.png") for i in range(6)]
    truth = np.asarray(Image.open(tmp_path / "data" / "masks" / "5.png"))
    mask = np.asarray(Image.open(found / "5.mask.png"))
    overlay = np.asarray(Image.open(found / "5.overlay.png"))
    assert mask.shape == truth.shape and overlay.shape == (*truth.shape, 3) and (mask == truth).mean() > 0.95
    shown = np.asarray(Image.open(tmp_path / "data" / "images" / "5.png"))
    coloured = overlay.max(-1) != overlay.min(-1)
    assert shown.ndim == 2 and np.array_equal(coloured, mask > 0)


def test_minyolo_learns_and_detects(tmp_path, capsys):
    out, options = tmp_path / "run", data("yolo", tmp_path / "data", count=12)
    assert tiny("yolo", options, out, "--steps", 150, "--eval-every", 150, "--lr", 0.02, "--width", 8, "--batch-size", 8) == 0
    assert metrics(out, "AP50")[-1][1] > 0.5
    found = tmp_path / "found"
    capsys.readouterr()
    one = tmp_path / "data" / "images" / "3.png"
    big = tmp_path / "big.png"
    Image.open(one).resize((256, 128)).save(big)
    assert run("detect", one, big, "--checkpoint", out, "--out", found) == 0
    assert re.search(r"^3: .*square 0\.\d\d", capsys.readouterr().out, re.M)
    assert sorted(os.listdir(found)) == ["3.boxes.png", "big.boxes.png", "detections.json"]
    results = json.loads((found / "detections.json").read_text())
    line = (tmp_path / "data" / "labels" / "3.txt").read_text().split()[:5]
    cx, cy, w, h = (float(v) for v in line[1:])
    for name, (width, height) in {"3": (64, 64), "big": (256, 128)}.items():
        best = next(r for r in results[name] if r["name"] == "square")
        assert best["class"] == 0 and 0.25 < best["score"] <= 1.5
        x1, y1, x2, y2 = best["box"]
        assert abs((x1 + x2) / 2 / width - cx) < 0.1 and abs((y1 + y2) / 2 / height - cy) < 0.1
        assert abs((x2 - x1) / width - w) < 0.15 and abs((y2 - y1) / height - h) < 0.15
    assert run("detect", one, "--checkpoint", out, "--out", found, "--score", 1) == 0 and capsys.readouterr().out == "3: nothing\n"


def test_a_class_that_no_held_out_image_has_is_given_no_curve(tmp_path, monkeypatch):
    folder, drawn = shapes(tmp_path / "data"), []
    lines = (folder / "labels" / "4.txt").read_text().splitlines()
    (folder / "labels" / "4.txt").write_text(lines[0])  # of the image that is held out
    monkeypatch.setattr(yolo, "precision_recall_figure", lambda curves, title: drawn.append(list(curves)) or Figure())
    assert tiny("yolo", ("--yolo", folder), tmp_path / "run", "--steps", 40, "--eval-every", 40, "--lr", 0.02) == 0
    assert drawn == [["square"]]


@pytest.mark.parametrize("model", TINY)
def test_a_full_disk_is_told_and_leaves_no_part_of_a_file(model, tmp_path, monkeypatch, capsys):
    assert tiny(model, data(model, tmp_path / "data"), tmp_path / "run", "--steps", 1) == 0
    saved = []

    def full(self, path, *args, **kwargs):
        if saved:
            raise OSError(28, "No space left on device")
        saved.append(path)
        save(self, path, *args, **kwargs)

    save = Image.Image.save
    monkeypatch.setattr(Image.Image, "save", full)
    capsys.readouterr()
    status = run(USES[model], tmp_path / "data" / "images", "--checkpoint", tmp_path / "run", "--out", tmp_path / "found")
    fails(capsys, status, r"cannot write .*: No space left on device")
    assert os.listdir(tmp_path / "found") == ([] if model == "unet" else [saved[0].name.replace(".part", "")])  # whole, or not there


def fails(capsys, status, message):
    assert status == 2
    err = capsys.readouterr().err
    assert re.fullmatch(f"error: [^\n]*{message}[^\n]*\n", err), err


def edited(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def truncated(path):
    os.truncate(path, path.stat().st_size // 2)


BAD_MASKS = {
    "no-images": (lambda d: [p.unlink() for p in (d / "images").iterdir()], r"images has no images \("),
    "no-folder": (lambda d: os.rename(d / "masks", d / "other"), "masks is no folder"),
    "no-mask": (lambda d: (d / "masks" / "2.png").unlink(), r"2\.png has no mask in "),
    "another-size": (
        lambda d: Image.new("L", (9, 8)).save(d / "masks" / "2.png"),
        r"images/2\.png and its mask .*masks/2\.png differ in size: 40 x 48 and 9 x 8 pixels",
    ),
    "corrupt": (lambda d: truncated(d / "images" / "3.png"), r"cannot read .*images/3\.png: .* \(--skip-corrupt leaves such files out\)"),
    "corrupt-mask": (lambda d: (d / "masks" / "3.png").write_bytes(b"no image"), r"cannot read .*masks/3\.png: damaged, or no image"),
    "one-image": (lambda d: [(d / "images" / f"{i}.png").unlink() for i in range(1, 6)], "and 1 can be used"),
    "two-masks": (lambda d: os.link(d / "masks" / "2.png", d / "masks" / "2_mask.png"), "are masks of the same image"),
}


@pytest.mark.parametrize(("damage", "message"), BAD_MASKS.values(), ids=BAD_MASKS)
def test_bad_masks(tmp_path, capsys, damage, message):
    options = data("unet", tmp_path / "data")
    damage(tmp_path / "data")
    fails(capsys, tiny("unet", options, tmp_path / "run"), message)
    assert not (tmp_path / "run").exists()


def test_an_unknown_class_in_a_mask(tmp_path, capsys):
    options = data("unet", tmp_path / "data")
    Image.fromarray(np.full((48, 40), 7, np.uint8)).save(tmp_path / "data" / "masks" / "2.png")
    message = r"2\.png has the unknown class 7 at column 0, row 0: the classes are 0 to 2"
    for i in (0, 1):
        (tmp_path / "data" / "images" / f"{i}.png").unlink()  # whose masks hold 255
    fails(capsys, tiny("unet", options, tmp_path / "run", "--classes", 3), message)
    Image.new("RGB", (40, 48)).save(tmp_path / "data" / "masks" / "2.png")
    message = r"2\.png is in colour: a mask of 3 classes has one number a pixel"
    fails(capsys, tiny("unet", options, tmp_path / "run", "--classes", 3), message)
    (tmp_path / "data" / "masks" / "2.png").unlink()
    Image.fromarray(np.full((48, 40), 0.5, np.float32)).save(tmp_path / "data" / "masks" / "2.tif")
    fails(capsys, tiny("unet", options, tmp_path / "run", "--classes", 3), r"2\.tif has the unknown class 0\.5 at column 0, row 0: ")


def line(text):
    return lambda d: (d / "labels" / "1.txt").write_text(text)


def annotation(key, value):
    return lambda d: edited(d / "coco.json", lambda c: c["annotations"][3].update({key: value}))


BAD_BOXES = {  # damage, whether it is the COCO file that has it, message
    "no-images": (lambda d: [p.unlink() for p in (d / "images").iterdir()], False, r"images has no images \("),
    "outside": (annotation("bbox", [60, 3, 20, 5]), True, r"s\[3\]: the box from \(60, 3\) to \(80, 8\) is not inside .*1\.png, which"),
    "negative": (annotation("bbox", [-4, 3, 9, 5]), True, r"s\[3\]: the box from \(-4, 3\) to \(5, 8\) is not inside .*1\.png, which"),
    "no-area": (annotation("bbox", [4, 3, 0, 5]), True, r"annotations\[3\]: the box from \(4, 3\) to \(4, 8\) has no area"),
    "three-numbers": (annotation("bbox", [4, 3, 5]), True, r"annotations\[3\]: bbox is \[4, 3, 5\], not four finite numbers"),
    "unknown-class": (annotation("category_id", 8), True, r"annotations\[3\]: category_id 8 is not in "),
    "unknown-image": (annotation("image_id", 88), True, r"annotations\[3\]: image_id 88 is not in "),
    "no-json": (lambda d: truncated(d / "coco.json"), True, r"coco\.json is not JSON, or cut off"),
    "no-categories": (lambda d: edited(d / "coco.json", lambda c: c.pop("categories")), True, r"coco\.json has no list of categories"),
    "missing-image": (lambda d: (d / "images" / "2.png").unlink(), True, r"cannot read .*2\.png: No such file"),
    "corrupt": (lambda d: truncated(d / "images" / "3.png"), False, r"cannot read .*3\.png: .* \(--skip-corrupt leaves such files out\)"),
    "line-outside": (line("0 .9 .5 .4 .1"), False, r"1\.txt, line 1: the box from .* is not inside "),
    "line-class": (line("\n2 .5 .5 .4 .1"), False, r"1\.txt, line 2: the unknown class 2: .* has 2 names"),
    "line-huge-class": (line("99999999999999999999 .5 .5 .4 .1"), False, r"1\.txt, line 1: the unknown class 9+: "),
    "line-beside": (line("0 -.005 .5 .008 .1"), False, r"1\.txt, line 1: nothing of the box is inside "),
    "line-words": (line("0 .5 .5 .4"), False, r"1\.txt, line 1: a class and four numbers .* '0 \.5 \.5 \.4'"),
    "no-boxes": (lambda d: [p.write_text("") for p in (d / "labels").iterdir()], False, "the images to learn have no box"),
}


@pytest.mark.parametrize(("damage", "coco", "message"), BAD_BOXES.values(), ids=BAD_BOXES)
def test_bad_boxes(tmp_path, capsys, damage, coco, message):
    folder = shapes(tmp_path / "data")
    damage(folder)
    options = ("--coco", folder / "coco.json", "--images", folder / "images") if coco else ("--yolo", folder)
    fails(capsys, tiny("yolo", options, tmp_path / "run"), message)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("model", TINY)
def test_a_corrupt_image_is_named_and_left_out_when_asked(model, tmp_path, capsys):
    options = data(model, tmp_path / "data")
    truncated(tmp_path / "data" / "images" / "3.png")
    assert tiny(model, options, tmp_path / "run", "--steps", 1, "--skip-corrupt") == 0
    told = capsys.readouterr()
    assert re.fullmatch(r"skipped: cannot read .*3\.png: damaged, or no image\n", told.err)
    assert re.search(r"\b4 (images|and 1 held-out images) ", told.out)
    command = USES[model], tmp_path / "data" / "images", "--checkpoint", tmp_path / "run", "--out", tmp_path / "found"
    fails(capsys, run(*command), r"cannot read .*3\.png: .* \(--skip-corrupt leaves such files out\)")
    assert not (tmp_path / "found").exists()
    assert run(*command, "--skip-corrupt") == 0 and "skipped: " in capsys.readouterr().err
    assert len(os.listdir(tmp_path / "found")) == (10 if model == "unet" else 6)


@pytest.mark.parametrize("model", TINY)
def test_results_among_the_images_are_no_images(model, tmp_path):
    assert tiny(model, data(model, tmp_path / "data"), tmp_path / "run", "--steps", 1) == 0
    folder = tmp_path / "data" / "images"
    for _ in range(2):
        assert run(USES[model], folder, "--checkpoint", tmp_path / "run", "--out", folder) == 0
    assert len(os.listdir(folder)) == 6 + (12 if model == "unet" else 7)


@pytest.mark.parametrize("model", TINY)
def test_images_that_cannot_be_used(model, tmp_path, capsys):
    assert tiny(model, data(model, tmp_path / "data"), tmp_path / "run", "--steps", 1) == 0
    capsys.readouterr()
    use = [USES[model], "--checkpoint", tmp_path / "run", "--out", tmp_path / "found"]
    (tmp_path / "empty").mkdir()
    one = tmp_path / "data" / "images" / "1.png"
    for args, message in (
        ([tmp_path / "none.png"], r"there is no .*none\.png"),
        ([tmp_path / "empty"], r"empty has no images \("),
        ([one, tmp_path / "data"], "have the same name, and so would what is written of them"),
        ([one, "--device", "nowhere"], "device nowhere cannot be used: "),
    ):
        fails(capsys, run(*use, *args), message)
    other = {"unet": "yolo", "yolo": "unet"}[model]
    fails(capsys, run(USES[other], *use[1:], one), f"is a checkpoint of {model}, not of {other}")
    assert not (tmp_path / "found").exists()
    (tmp_path / "found").write_text("")
    fails(capsys, run(*use, one), "cannot write .*found")


BAD_OPTIONS = {
    "train unet --images .": "error: --images and --masks go together",
    "train unet --depth 5 --crop 32 --images . --masks .": "error: --crop 32 is too small to be halved 5 times: at least 64",
    "train unet --classes 257": "error: --classes 257: a mask has at most 256",
    "train yolo --coco x.json": "error: --coco and --images go together",
    "train yolo --yolo . --images .": "error: --yolo takes a folder of its own, without --coco and --images",
    "train yolo --yolo nowhere": "nowhere/images is no folder",
    "train yolo --coco nowhere.json --images .": "nowhere.json: No such file or directory",
    "train yolo --cells 1 --batch-size 1": "error: --cells 1 --batch-size 1: batch normalisation needs more than one cell",
    "train yolo --boxes 0": "must be a whole number from 1 on, got '0'",
    "segment x.png --checkpoint nowhere --out y": "error: there is no checkpoint at nowhere",
    "detect --checkpoint x --out y": "the following arguments are required: IMAGE",
    "detect x.png --checkpoint x --out y --score nan": "must be a number from 0 on, got 'nan'",
    "detect x.png --checkpoint x --out y --iou 2": "must be a number from 0 to 1, got '2'",
}


@pytest.mark.parametrize(("line", "message"), BAD_OPTIONS.items())
def test_bad_options(line, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run(*line.split()) == 2
    assert message in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_average_precision_that_cannot_be_computed_is_told_before_training(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "minkernels._host", None)
    fails(capsys, run("train", "yolo", "--out", tmp_path / "run"), r"minkernels\._host is not built for this Python: .*")
    assert not (tmp_path / "run").exists()
