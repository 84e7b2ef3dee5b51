"""minUNet learns to fill masks."""

from shlex import quote

import torch

from minmodels import UserError, files
from minmodels.data import images, masks
from minmodels.metrics import segmentation_scores
from minmodels.minunet import UNet, UNetConfig
from minmodels.options import UNetOptions
from minmodels.recipes import Recipe, seeded
from minmodels.segment import figure, predicted


class UNetRecipe(Recipe):
    loss_unit, unit = "BCE in nats + Dice", "squares"

    def __init__(self, options: UNetOptions):
        super().__init__(options)
        if bool(options.images) != bool(options.masks):
            raise UserError("--images and --masks go together")
        if options.crop < 2 << options.depth:
            raise UserError(f"--crop {options.crop} is too small to be halved {options.depth} times: at least {2 << options.depth}")
        if options.classes > 256:
            raise UserError(f"--classes {options.classes}: a mask has at most 256, the values of a byte")
        if options.images:
            self.masks = masks.load(options.images, options.masks, options.classes, options.skip_corrupt)
        else:
            self.masks = masks.nuclei(options.classes)
        self.config = UNetConfig(self.masks.channels, options.classes, options.width, options.depth)
        self.sha256, self.model = self.masks.sha256, self.new()
        self.data = f"{self.masks.name}: {_count(self.masks.train)}, {_count(self.masks.heldout)} held out"

    @seeded
    def new(self):
        return UNet(self.config)

    def batch(self, generator):
        x, y = masks.sample(self.masks.train, self.config.in_channels, self.options.batch_size, self.options.crop, generator)
        return x, self._target(y)

    def _target(self, y):
        """(N, H, W) classes -> what the model takes as its target."""
        return y[:, None] if self.config.classes == 1 else y

    def heldout(self, model, move):
        loss, found, classes = 0.0, [], max(2, self.config.classes)  # of one class, 0 is the background
        for example in self.masks.heldout:
            x, y = images.floats(example.image, self.config.in_channels)[None], torch.from_numpy(example.mask)[None]
            loss += model(move(x), move(self._target(y))).item() / len(self.masks.heldout)
            found.append(predicted(model, example.image))
        scores = segmentation_scores(found, [example.mask for example in self.masks.heldout], num_classes=classes)
        if self.config.classes == 1:
            return {"heldout": loss, "Dice": float(scores.dice[1]), "IoU": float(scores.iou[1])}
        return {"heldout": loss, "mean Dice": scores.mean_dice, "mean IoU": scores.mean_iou}

    def finish(self, model, folder):
        shown = self.masks.heldout[:4]
        found = [predicted(model, example.image) for example in shown]
        with files.replacing(folder / "segmentation.png") as part:
            figure(shown, found, self.config.classes).savefig(part)
        return f"to use it: python -m minmodels segment IMAGE --checkpoint {quote(str(folder))} --out DIR"

    @classmethod
    def build(cls, meta):
        return UNet(UNetConfig(**meta["config"]))


def _count(examples):
    pixels = sum(example.mask.size for example in examples)
    return f"{len(examples)} image{'s' if len(examples) > 1 else ''} of {pixels / 1e6:.2f} megapixels"

