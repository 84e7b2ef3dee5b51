"""Images as they are read: upright, whole or named as damaged, from folders without what is hidden there."""

import json
import os
import warnings

import numpy as np
import pytest

pytest.importorskip("PIL")  # of the extra "models"
from PIL import Image

from minmodels import UserError
from minmodels.data import detection, images, masks
from vision_cases import shapes, squares

TURNED = {  # the EXIF orientation of a picture stored as f(upright)
    1: lambda a: a,
    3: lambda a: np.rot90(a, 2),
    6: lambda a: np.rot90(a, 1),
    8: lambda a: np.rot90(a, -1),
}


def store(path, pixels, orientation=1):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(TURNED[orientation](pixels))).save(path, exif=exif)


@pytest.mark.parametrize("orientation", TURNED)
@pytest.mark.parametrize("kind", ["gray.png", "colour.png", "deep.png", "gray.tif"])
def test_an_image_is_upright(tmp_path, kind, orientation):
    pixels = np.arange(12, dtype=np.uint16 if kind == "deep.png" else np.uint8).reshape(3, 4)
    pixels = np.stack([pixels] * 3, -1) if kind == "colour.png" else pixels
    store(tmp_path / kind, pixels, orientation)
    assert np.array_equal(images.read(tmp_path / kind), pixels)


def test_a_turned_photograph_lies_under_its_mask_and_its_boxes(tmp_path):
    squares(tmp_path / "squares")
    shapes(tmp_path / "shapes")
    find = {
        "squares": lambda d: [e.image for e in masks.load(d / "images", d / "masks", 1).train],
        "shapes": lambda d: [s.image for s in detection.coco(d / "coco.json", d / "images", 64).train],
    }
    for name, load in find.items():
        before, path = load(tmp_path / name), tmp_path / name / "images" / "1.png"
        store(path, np.asarray(Image.open(path)), 6)
        assert all(map(np.array_equal, before, load(tmp_path / name)))


def test_boxes_of_another_size_of_the_image_are_refused(tmp_path):
    folder = shapes(tmp_path)
    path = folder / "images" / "2.png"
    Image.open(path).resize((96, 80)).save(path)
    message = r"coco\.json has boxes for .*2\.png of 64 x 64 pixels, and it has 96 x 80: --images takes the images that were annotated"
    with pytest.raises(UserError, match=message):
        detection.coco(folder / "coco.json", folder / "images", 32)
    content = json.loads((folder / "coco.json").read_text())
    for entry in content["images"]:
        del entry["width"]
    (folder / "coco.json").write_text(json.dumps(content))
    assert len(detection.coco(folder / "coco.json", folder / "images", 32).scenes) == 6  # nothing to compare with


def test_what_is_hidden_in_a_folder_is_no_image(tmp_path):
    folder = tmp_path / ".data"  # the folder itself may be
    squares(folder)
    seen = images.listed(folder / "images")
    (folder / "images" / ".ipynb_checkpoints").mkdir()
    for name in (".ipynb_checkpoints/0.png", "._1.png"):
        os.link(seen[0], folder / "images" / name)
    assert images.listed(folder / "images") == seen and len(seen) == 6


def test_any_damage_is_named(tmp_path):
    path = tmp_path / "x.tif"
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(path)
    data = path.read_bytes()
    for damaged in (data[:-9], data.replace(b"\x11\x01\x04\x00", b"\x11\x01\x02\x00")):  # where its pixels begin becomes a text
        path.write_bytes(damaged)
        with pytest.raises(images.BadImage, match=r"cannot read .*x\.tif: damaged, or no image"):
            images.read(path)


def test_floats_are_read_without_a_warning(tmp_path):
    Image.fromarray(np.linspace(0, 1, 12, dtype=np.float32).reshape(3, 4)).save(tmp_path / "x.tif")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        image = images.read(tmp_path / "x.tif")
        assert images.floats(image, 1).shape == (1, 3, 4) and images.resized(image, 2).dtype == np.float32


def test_an_image_that_is_too_large_for_pillow_is_not_called_damaged(tmp_path, monkeypatch):
    Image.new("L", (3, 4)).save(tmp_path / "x.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5)
    with pytest.raises(images.BadImage, match=r"cannot read .*x\.png: Image size \(12 pixels\) exceeds limit of 10 pixels"):
        images.read(tmp_path / "x.png")
