"""minUNet learns to fill masks."""

import torch

from minmodels import UserError
from minmodels.data import images, masks
from minmodels.minunet import UNet, UNetConfig
from minmodels.options import UNetOptions
from minmodels.recipes import Recipe, seeded


class UNetRecipe(Recipe):
    loss_unit, unit = "BCE in nats + Dice", "squares"

    def __init__(self, options: UNetOptions):
        super().__init__(options)
        if bool(options.images) != bool(options.masks):
            raise UserError("--images and --masks go together")
        if options.images:
            self.masks = masks.load(options.images, options.masks, options.classes, options.skip_corrupt)
        else:
            self.masks = masks.nuclei(options.classes)
        if options.crop < 2 << options.depth:
            raise UserError(f"--crop {options.crop} is too small to be halved {options.depth} times: at least {2 << options.depth}")
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
        loss, found = 0.0, []
        for example in self.masks.heldout:
            x, y = images.floats(example.image, self.config.in_channels)[None], torch.from_numpy(example.mask)[None]
            loss += model(move(x), move(self._target(y))).item() / len(self.masks.heldout)
            found.append(model.segment(move(x))[0].cpu().numpy())
        return {"heldout": loss, **scores(found, [example.mask for example in self.masks.heldout], self.config.classes)}

    def extras(self):
        return {}

    def finish(self, model, folder):
        from minmodels.segment import figure

        x = [images.floats(example.image, self.config.in_channels)[None] for example in self.masks.heldout[:4]]
        device = next(model.parameters()).device
        found = [model.segment(image.to(device))[0].cpu().numpy() for image in x]
        figure(self.masks.heldout[:4], found, self.config.classes).savefig(folder / "segmentation.png")
        return f"to use it: python -m minmodels segment IMAGE --checkpoint {folder} --out DIR"

    @classmethod
    def build(cls, meta):
        return UNet(UNetConfig(**meta["config"]))


def _count(examples):
    pixels = sum(example.mask.size for example in examples)
    return f"{len(examples)} image{'s' if len(examples) > 1 else ''} of {pixels / 1e6:.2f} megapixels"


def scores(found, truth, classes):
    counts = []
    for c in [1] if classes == 1 else range(classes):
        pairs = [(f == c, t == c) for f, t in zip(found, truth, strict=True)]
        counts.append((sum((f & t).sum() for f, t in pairs), sum((f).sum() + (t).sum() for f, t in pairs)))
    dice = sum(2 * i / s for i, s in counts if s) / sum(s > 0 for _, s in counts)
    iou = sum(i / (s - i) for i, s in counts if s) / sum(s > 0 for _, s in counts)
    return {"dice": float(dice), "iou": float(iou)}
