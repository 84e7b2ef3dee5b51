"""One training step of minUNet and of minYOLO on our ops, beside the same models on plain PyTorch, and the loss of each alone."""

from functools import cache, partial
from typing import NamedTuple

import torch

from bench.model_step import IMPLS, training_step
from bench.timing import max_error
from minmodels.kernels import bce_dice_loss, using, yolo_loss
from minmodels.minunet import UNet, UNetConfig
from minmodels.minyolo import YOLO, YOLOConfig, encode


class Case(NamedTuple):
    name: str
    config: UNetConfig | YOLOConfig
    batch: int
    side: int  # of the images, in pixels
    dtype: torch.dtype  # float32, or the dtype of autocast

    def __str__(self):
        return f"{self.name}-{str(self.dtype).removeprefix('torch.')}"


UNET = UNetConfig(1, 1, width=16, depth=3)  # the defaults of the command line
CLASSES = UNetConfig(3, 8, width=16, depth=3)
DIGITS = YOLOConfig(1, 10, width=24)
CASES = {
    "cpu": [
        Case("unet", UNET, 8, 128, torch.float32),
        Case("unet", UNET, 8, 128, torch.bfloat16),
        Case("unet-8-classes", CLASSES, 8, 128, torch.bfloat16),
        Case("yolo", DIGITS, 32, 112, torch.float32),
        Case("yolo", DIGITS, 32, 112, torch.bfloat16),
    ],
    "cuda": [
        Case("unet-paper", UNetConfig(), 8, 512, torch.bfloat16),
        Case("yolo", YOLOConfig(cells=28), 64, 448, torch.bfloat16),
    ],
    "tiny": [
        Case("unet", UNetConfig(1, 3, width=4, depth=2), 2, 16, torch.float32),
        Case("yolo", YOLOConfig(1, 3, cells=2, width=4), 2, 32, torch.float32),
    ],
}


def make(case, device):
    """A model, and a batch for it."""
    config = case.config
    x = torch.randn(case.batch, config.in_channels, case.side, case.side)
    if isinstance(config, UNetConfig):
        shape = (case.batch, case.side, case.side) if config.classes > 1 else (case.batch, 1, case.side, case.side)
        targets = (torch.randint(max(2, config.classes), shape, dtype=torch.uint8),)
        model = UNet(config)
    else:
        centres, sizes = torch.rand(case.batch, 4, 2), 0.1 + 0.3 * torch.rand(case.batch, 4, 2)
        boxes = torch.cat((centres - sizes / 2, centres + sizes / 2), -1)
        scenes = [encode(b, torch.randint(config.classes, (4,)), config.cells) for b in boxes]
        targets = tuple(torch.stack(t) for t in zip(*scenes, strict=True))
        model = YOLO(config)
    return model.to(device), [t.to(device) for t in (x, *targets)]


def bench_step(timed, device, case, impl):
    def build():
        return training_step(*make(case, device), case.dtype)

    shape = case.batch, case.config.in_channels, case.side, case.side
    timed("vision step", build, shape=shape, dtype=case.dtype, min_rounds=25)  # convolutions are nearly all of it: the ratio is near 1


def bench_loss(timed, device, case, impl):
    """The loss and its gradient, of the model's output."""

    def build():
        model, (x, *targets) = make(case, device)
        with torch.no_grad():
            out = model.eval()(x).to(case.dtype).requires_grad_()
        loss = bce_dice_loss if isinstance(model, UNet) else partial(yolo_loss, boxes_per_cell=case.config.boxes)

        def call(kernels):
            with using(kernels):
                value = loss(out, *targets)
            return value.detach(), *torch.autograd.grad(value, out)

        @cache
        def exact():
            wide = out.detach().double().requires_grad_()
            args = [t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in targets]
            with using("torch"):
                value = loss(wide, *args)
            return value.detach(), *torch.autograd.grad(value, wide)

        return {name: partial(call, kernels) for name, kernels in IMPLS.items()}, lambda outputs: max_error(outputs, exact(), case.dtype)

    timed("vision loss", build, shape=(case.batch, case.config.in_channels, case.side, case.side), dtype=case.dtype)
