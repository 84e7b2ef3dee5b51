"""Folders of small images that the tests of the vision models learn from: bright squares and discs on dark ground."""

import json

import numpy as np
from PIL import Image


def squares(folder, count=6, size=(40, 48), classes=1):
    """folder/images/I.png and folder/masks/I.png: a bright square each; of two classes, its right half is class 2."""
    rng = np.random.default_rng(0)
    for part in ("images", "masks"):
        (folder / part).mkdir(parents=True)
    for i in range(count):
        h, w = size if i % 2 else size[::-1]
        top, left = rng.integers(0, (h - 16, w - 16))
        mask = np.zeros((h, w), np.uint8)
        mask[top : top + 16, left : left + 16] = 1
        if classes > 1:
            mask[top : top + 16, left + 8 : left + 16] = 2
        image = (mask * (200 // max(1, classes)) + rng.integers(0, 30, (h, w))).astype(np.uint8)
        Image.fromarray(image).save(folder / "images" / f"{i}.png")
        Image.fromarray(mask * (255 if classes == 1 else 1)).save(folder / "masks" / f"{i}.png")
    return folder


def shapes(folder, count=6, side=64):
    """A data set in both formats: images/I.png, labels/I.txt and classes.txt; coco.json. Two objects an image, a square and a frame."""
    rng = np.random.default_rng(0)
    (folder / "images").mkdir(parents=True)
    (folder / "labels").mkdir()
    (folder / "classes.txt").write_text("square\nframe\n")
    coco = {"images": [], "annotations": [], "categories": [{"id": 3, "name": "square"}, {"id": 7, "name": "frame"}]}
    for i in range(count):
        image = rng.integers(0, 30, (side, side, 3)).astype(np.uint8)
        lines = []
        for kind, (x0, y0) in enumerate(((0, 0), (side // 2, side // 2))):
            x, y = (start + int(rng.integers(side // 2 - 20)) for start in (x0, y0))
            image[y : y + 16, x : x + 20] = 230
            if kind:
                image[y + 4 : y + 12, x + 4 : x + 16] = 10
            lines.append(f"{kind} {(x + 10) / side} {(y + 8) / side} {20 / side} {16 / side}\n")
            box = [x, y, 20, 16]
            coco["annotations"].append(
                {"id": len(coco["annotations"]), "image_id": i, "category_id": (3, 7)[kind], "bbox": box, "area": 320, "iscrowd": 0}
            )
        Image.fromarray(image).save(folder / "images" / f"{i}.png")
        (folder / "labels" / f"{i}.txt").write_text("".join(lines))
        coco["images"].append({"id": i, "file_name": f"{i}.png", "width": side, "height": side})
    (folder / "coco.json").write_text(json.dumps(coco))
    return folder
