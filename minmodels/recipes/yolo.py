"""minYOLO learns to find and name objects."""

import itertools
from shlex import quote

import torch

from minmodels import UserError, files
from minmodels.data import detection, digits, images
from minmodels.detect import figure, find
from minmodels.metrics import coco_ap, host, voc_ap
from minmodels.minyolo import YOLO, YOLOConfig, encode
from minmodels.options import YOLOOptions
from minmodels.plot import precision_recall_figure
from minmodels.recipes import Recipe, seeded


class YOLORecipe(Recipe):
    loss_unit, unit = "squared errors per image", "images"

    def __init__(self, options: YOLOOptions):
        super().__init__(options)
        try:
            host()  # which average precision needs
        except ImportError as error:
            raise UserError(str(error)) from error
        if options.cells == options.batch_size == 1:
            raise UserError("--cells 1 --batch-size 1: batch normalisation needs more than one cell, ask for more of either")
        self.scenes = scenes = _scenes(options, 16 * options.cells)
        self.config = YOLOConfig(scenes.channels, len(scenes.names), options.cells, options.boxes, options.width)
        self.sha256, self.data, self.model = scenes.sha256, scenes.about, self.new()

    @seeded
    def new(self):
        return YOLO(self.config)

    def batch(self, generator):
        return self._tensors(self.scenes.batch(self.options.batch_size, generator))

    def _tensors(self, scenes):
        x = torch.stack([images.floats(scene.image, self.config.in_channels) for scene in scenes])
        targets = [encode(scene.boxes / self.config.side, scene.classes, self.config.cells) for scene in scenes]
        return x, *(torch.stack(t) for t in zip(*targets, strict=True))

    def heldout(self, model, move):
        loss, found, truth = 0.0, [], []
        for i in range(0, len(self.scenes.heldout), 64):
            part = self.scenes.heldout[i : i + 64]
            x, boxes, classes = (move(t) for t in self._tensors(part))
            loss += model(x, boxes, classes).item() * len(part) / len(self.scenes.heldout)
            found += find(model, x, score_threshold=0.005, multi_label=True)
            truth += [{"boxes": scene.boxes, "classes": scene.classes} for scene in part]
        self.ap = coco_ap(truth, found)
        voc = voc_ap(truth, found, inclusive=False).mean
        return {"heldout": loss, "AP50": self.ap.stats["ap50"], "AP": self.ap.ap, "VOC AP": voc}

    def finish(self, model, folder):
        there = [c for c, ap in zip(self.ap.classes, self.ap.ap_per_class, strict=True) if ap >= 0]  # -1: found, but nowhere true
        curves = {self.scenes.names[c]: self.ap.curve(c) for c in there}
        title = f"IoU 0.5, mean AP {self.ap.stats['ap50']:.3f}"
        with files.replacing(folder / "precision_recall.png") as part:
            precision_recall_figure(dict(itertools.islice(curves.items(), 12)), title).savefig(part)
        with files.replacing(folder / "detections.png") as part:
            figure(model, self.scenes.heldout[:6], self.scenes.names).savefig(part)
        return f"to use it: python -m minmodels detect IMAGE --checkpoint {quote(str(folder))} --out DIR"

    def extras(self):
        return {"names": list(self.scenes.names)}

    @classmethod
    def build(cls, meta):
        return YOLO(YOLOConfig(**meta["config"]))


def _scenes(options, side):
    if options.yolo:
        if options.coco or options.images:
            raise UserError("--yolo takes a folder of its own, without --coco and --images")
        return detection.yolo(options.yolo, side, options.skip_corrupt)
    if bool(options.coco) != bool(options.images):
        raise UserError("--coco and --images go together")
    return detection.coco(options.coco, options.images, side, options.skip_corrupt) if options.coco else digits.load(side)
