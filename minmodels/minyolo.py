"""minYOLO: YOLO v1, detection as one regression (Redmon et al. 2016, arXiv:1506.02640), with a small backbone of our own.

Shapes: N images, K x K cells, B boxes a cell, C classes. The output (N, K, K, B*5 + C) holds for each box x and y of its centre in its
cell, from 0 to 1, the square roots of its width and height as parts of the image's, and a confidence; then the classes of the cell.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from minmodels.kernels import iou_match


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
        """(N, in_channels, 16 K, 16 K) -> (N, K, K, B*5 + C); with boxes and classes, as encode() gives them, the loss, a scalar."""
        x = x.to(memory_format=torch.channels_last)  # faster convolutions, on CPUs too
        pred = self.head(self.backbone(x)).permute(0, 2, 3, 1)
        return pred if boxes is None else yolo_loss(pred, boxes, classes, self.config.boxes)


def yolo_loss(pred: Tensor, boxes: Tensor, classes: Tensor, num_boxes: int, *, coord: float = 5.0, noobj: float = 0.5) -> Tensor:
    """Equation 3 of the paper, a mean over the images: coord times the squared errors of centres and of square roots of sizes, of the
    responsible box alone, which is the one with the highest IoU; of the confidences, against that IoU, or against 0 and noobj times
    where a box is not responsible; and of the classes of cells with an object.

    pred: (N, K, K, B*5 + C). boxes: (N, K, K, 4) x y w h, the centre in its cell and the sizes as parts of the image, where classes
    (N, K, K), 0 to C - 1, is not -1: there a cell has no object.
    """
    pred, cells = pred.to(torch.promote_types(pred.dtype, torch.float32)), pred.shape[1]
    box, conf = pred[..., : 5 * num_boxes].unflatten(-1, (num_boxes, 5)).split((4, 1), -1)  # (N, K, K, B, 4 and 1)
    truth, has, conf = boxes[..., None, :], classes >= 0, conf[..., 0]

    guess = torch.cat((box[..., :2] / cells, box[..., 2:].square()), -1).detach()  # as parts of the image, from the cell's corner
    known = torch.cat((truth[..., :2] / cells, truth[..., 2:]), -1)
    match = iou_match(guess.flatten(0, 2), known.flatten(0, 2), fmt="cxcywh")
    iou, best = (t.view(has.shape) for t in (match.gt_best_iou, match.gt_best_box))
    mine = torch.arange(num_boxes, device=pred.device) == best[..., None]
    mine &= has[..., None]  # (N, K, K, B)

    where = (box - torch.cat((truth[..., :2], truth[..., 2:].sqrt()), -1)).square().sum(-1)
    sure = (conf - iou[..., None] * mine).square() * torch.where(mine, 1.0, noobj)
    one_hot = classes[..., None] == torch.arange(pred.shape[-1] - 5 * num_boxes, device=pred.device)
    kind = (pred[..., 5 * num_boxes :] - one_hot.to(pred.dtype)).square().sum(-1)
    return (coord * (where * mine).sum() + sure.sum() + (kind * has).sum()) / len(pred)


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
