"""minYOLO: YOLO v1, detection as one regression (Redmon et al. 2016, arXiv:1506.02640), with a small backbone of our own.

Shapes: N images, K x K cells, B boxes a cell, C classes. The output (N, K, K, B*5 + C) holds for each box x and y of its centre in its
cell, from 0 to 1, the square roots of its width and height as parts of the image's, and a confidence; then the classes of the cell.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from minmodels.kernels import yolo_loss


@dataclass(frozen=True)
class YOLOConfig:
    in_channels: int = 3
    classes: int = 20
    cells: int = 7  # K
    boxes: int = 2  # B
    width: int = 32  # channels after the first convolution; each halving of the image doubles them

    def __post_init__(self):
        for name, value in vars(self).items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a positive int, got {value!r}")

    @property
    def side(self) -> int:
        """Of the square images, in pixels."""
        return 16 * self.cells


class Conv(nn.Sequential):
    def __init__(self, inputs: int, outputs: int, stride: int = 1):
        norm = nn.BatchNorm2d(outputs)  # which the paper is without
        super().__init__(nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False), norm, nn.LeakyReLU(0.1))


class YOLO(nn.Module):
    def __init__(self, config: YOLOConfig):
        super().__init__()
        self.config, w = config, config.width
        self.backbone = nn.Sequential(
            Conv(config.in_channels, w, 2),  # side / 2
            Conv(w, 2 * w, 2),
            Conv(2 * w, 2 * w),  # side / 4
            Conv(2 * w, 4 * w, 2),
            Conv(4 * w, 4 * w),  # side / 8
            Conv(4 * w, 8 * w, 2),
            Conv(8 * w, 8 * w),
            Conv(8 * w, 8 * w),  # side / 16: K x K
        )
        self.head = nn.Conv2d(8 * w, 5 * config.boxes + config.classes, 1)

    def forward(self, x: Tensor, boxes: Tensor | None = None, classes: Tensor | None = None) -> Tensor:
        """(N, in_channels, 16 K, 16 K) -> (N, K, K, B*5 + C); with boxes and classes, as encode() gives them, the paper's loss."""
        x = x.to(memory_format=torch.channels_last)  # faster convolutions, on CPUs too
        pred = self.head(self.backbone(x)).permute(0, 2, 3, 1)
        return pred if boxes is None else yolo_loss(pred, boxes, classes, boxes_per_cell=self.config.boxes)


def encode(boxes: Tensor, classes: Tensor, cells: int) -> tuple[Tensor, Tensor]:
    """(G, 4) x1 y1 x2 y2 as parts of the image and (G,) classes -> (K, K, 4) and (K, K), as yolo_loss takes them. Of several centres in
    one cell, the last one counts: the model has one object a cell."""
    at, of = torch.zeros(cells, cells, 4), torch.full((cells, cells), -1)
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2 * cells
    cell = centres.long().clamp(0, cells - 1)
    values = torch.cat((centres - cell, boxes[:, 2:] - boxes[:, :2]), -1)
    for value, label, (column, row) in zip(values, classes, cell.tolist(), strict=True):  # in order, which no indexed store promises
        at[row, column], of[row, column] = value, label
    return at, of
