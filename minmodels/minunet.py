"""minUNet: U-Net (Ronneberger et al. 2015, arXiv:1505.04597), for images of any size.

Differences from the paper: the convolutions pad, so that the output has the size of the input, and are followed by batch normalisation.
Shapes: N images, C channels, H x W pixels.
"""

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from minmodels.kernels import bce_dice_loss


@dataclass(frozen=True)
class UNetConfig:
    """The defaults are the paper's, 31 M parameters."""

    in_channels: int = 1
    classes: int = 1  # 1: one logit a pixel, foreground or not; more: a logit for each class
    width: int = 64  # channels of the first level; each further one has twice as many
    depth: int = 4  # times that the image is halved

    def __post_init__(self):
        for name, value in vars(self).items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a positive int, got {value!r}")
        if self.classes > 256:
            raise ValueError(f"classes must be at most 256, the values of a byte, got {self.classes}")


class Block(nn.Sequential):
    def __init__(self, inputs: int, outputs: int):  # (N, inputs, H, W) -> (N, outputs, H, W)
        layers = []
        for channels in (inputs, outputs):
            layers += [nn.Conv2d(channels, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
        super().__init__(*layers)


class UNet(nn.Module):
    def __init__(self, config: UNetConfig):
        super().__init__()
        self.config = config
        widths = [config.width << level for level in range(config.depth + 1)]
        self.down = nn.ModuleList(Block(i, o) for i, o in itertools.pairwise([config.in_channels, *widths]))
        pairs = list(itertools.pairwise(widths))[::-1]  # (narrow, wide), from the bottom up
        self.up = nn.ModuleList(nn.ConvTranspose2d(wide, narrow, 2, stride=2) for narrow, wide in pairs)
        self.merge = nn.ModuleList(Block(2 * narrow, narrow) for narrow, _ in pairs)
        self.head = nn.Conv2d(widths[0], config.classes, 1)
        self.pool = nn.MaxPool2d(2, ceil_mode=True)  # rounds up: the way back is never too small, and an odd size is cropped
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")  # section 3: a deviation of sqrt(2 / N)

    def forward(self, x: Tensor, target: Tensor | None = None) -> Tensor:
        """(N, in_channels, H, W) floats -> (N, classes, H, W) logits; with a target, BCE + Dice, a scalar.

        target: for one class (N, 1, H, W), 0 or 1; else (N, H, W), the class of each pixel, 0 to classes - 1.
        """
        x, skips = x.to(memory_format=torch.channels_last), []  # faster convolutions, on CPUs too
        for block in self.down:
            x = block(self.pool(x) if skips else x)
            skips.append(x)
        skips.pop()
        for up, merge in zip(self.up, self.merge, strict=True):
            skip = skips.pop()
            x = merge(torch.cat((skip, up(x)[..., : skip.shape[-2], : skip.shape[-1]]), 1))
        logits = self.head(x)
        return logits if target is None else bce_dice_loss(logits, target)

    @torch.no_grad()
    def segment(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) -> (N, H, W) uint8, the likeliest class of each pixel; for one class, 1 where it is likelier than not."""
        logits = self(x)
        return ((logits > 0)[:, 0] if self.config.classes == 1 else logits.argmax(1)).to(torch.uint8)
