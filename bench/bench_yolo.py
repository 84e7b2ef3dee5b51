"""yolo_detect beside what a user of PyTorch writes: a vectorised filter and decode, then NMS image by image, by a loop in PyTorch or by
torchvision's loop in C++ (plain_nms.cpp)."""

from functools import cache, partial
from typing import NamedTuple

import pytest
import torch

import minkernels
from bench import plain_nms

SIZE, CLASSES = 640, {"v8": 80, "v1": 20}


class Case(NamedTuple):
    head: str
    B: int
    cells: int  # anchors of a v8 head, cells in a row of a v1 head
    score: float
    iou: float
    multi: bool = False
    dtype: torch.dtype = torch.float32

    @property
    def shape(self):
        C = CLASSES[self.head]
        return (self.B, 4 + C, self.cells) if self.head == "v8" else (self.B, self.cells, self.cells, 10 + C)

    @property
    def bytes(self):
        """The scores, read once; the rest is small."""
        return self.B * (self.cells if self.head == "v8" else self.cells**2) * CLASSES[self.head] * self.dtype.itemsize

    def __str__(self):
        what = f"{self.head}-{'x'.join(map(str, self.shape))}-{self.score}-{self.iou}{'-multi' * self.multi}"
        return what + ("" if self.dtype == torch.float32 else f"-{str(self.dtype).removeprefix('torch.')}")


CASES = {
    "cpu": [
        Case("v8", 1, 8400, 0.25, 0.45), Case("v8", 32, 8400, 0.25, 0.45), Case("v8", 32, 8400, 0.25, 0.45, dtype=torch.bfloat16),
        Case("v8", 32, 8400, 0.001, 0.7, True), Case("v1", 64, 7, 0.2, 0.5),
    ],
    "cuda": [
        Case("v8", 1, 8400, 0.25, 0.45), Case("v8", 32, 8400, 0.25, 0.45), Case("v8", 32, 8400, 0.25, 0.45, dtype=torch.float16),
        Case("v8", 32, 8400, 0.001, 0.7, True), Case("v1", 64, 7, 0.2, 0.5),
    ],
    "tiny": [Case("v8", 2, 100, 0.25, 0.45), Case("v8", 2, 100, 0.001, 0.7, True), Case("v1", 2, 3, 0.2, 0.5)],
}  # fmt: skip
K = 300


def make(case, device):
    """v8: a trained head's output, more or less: background at a logit of -10, and about 15 anchors on each of 20 objects. v1: uniform."""
    if case.head == "v1":
        pred = torch.rand(case.shape)
        pred[..., [4, 9]] **= 4  # few confident boxes
        return pred.to(device, case.dtype)
    B, A, C = case.B, case.cells, CLASSES["v8"]
    logits = 1.2 * torch.randn(B, C, A) - 10
    centre, sides = torch.rand(B, 20, 2) * SIZE, 8 * 24 ** torch.rand(B, 20, 2)
    of, classes = torch.randint(20, (B, A)), torch.randint(C, (B, 20))
    near = torch.rand(B, 1, A) < 300 / 8400
    logits.scatter_add_(1, classes.gather(1, of)[:, None], torch.where(near, 10 + torch.randn(B, 1, A), 0.0))
    boxes = torch.cat([centre, sides], 2).mT.gather(2, of[:, None].expand(-1, 4, -1))
    boxes += 0.1 * boxes[:, [2, 3, 2, 3]] * torch.randn(B, 4, A)
    return torch.cat([boxes, logits], 1).to(device, case.dtype)


def ours(case, pred):
    options = dict(score_threshold=case.score, iou_threshold=case.iou, max_output=K, multi_label=case.multi)
    return minkernels.yolo_detect(pred, head=case.head, num_classes=CLASSES[case.head], image_size=SIZE, **options)


def loop(boxes, scores, iou_threshold):
    """The greedy loop in PyTorch: boxes is in its order. Stops at K."""
    area, kept, left = (boxes[:, 2:] - boxes[:, :2]).prod(1), [], torch.arange(len(boxes), device=boxes.device)
    while len(left) and len(kept) < K:
        i, left = left[0], left[1:]
        kept.append(i)
        sides = (torch.minimum(boxes[i, 2:], boxes[left, 2:]) - torch.maximum(boxes[i, :2], boxes[left, :2])).clamp(min=0)
        both = sides.prod(1)
        left = left[both / (area[i] + area[left] - both) <= iou_threshold]
    return torch.stack(kept) if kept else left


def plain(case, nms, pred):
    """[(boxes, scores, classes) of each image]"""
    pred = pred.float()
    if case.head == "v8":
        centre, sides, scores = pred[:, :2].mT, pred[:, 2:4].mT, pred[:, 4:].sigmoid().mT
    else:
        box = pred[..., :10].unflatten(3, (2, 5)).flatten(1, 2)
        cells = torch.arange(case.cells, device=pred.device)
        corner = torch.stack(torch.meshgrid(cells, cells, indexing="xy"), -1).view(1, -1, 1, 2)
        centre, sides = ((box[..., :2] + corner) / case.cells * SIZE).flatten(1, 2), (box[..., 2:4] ** 2 * SIZE).flatten(1, 2)
        scores = (box[..., 4:] * pred[..., 10:].flatten(1, 2)[:, :, None]).flatten(1, 2)
    boxes = torch.cat([centre - sides / 2, centre + sides / 2], 2)
    results = []
    for boxes_of, scores_of in zip(boxes, scores, strict=True):
        if case.multi:
            place, classes = (scores_of > case.score).nonzero().unbind(1)
            values = scores_of[place, classes]
        else:
            values, classes = scores_of.max(1)
            place = (values > case.score).nonzero()[:, 0]
            values, classes = values[place], classes[place]
        values, order = values.sort(descending=True, stable=True)
        order, values = order[:30000], values[:30000]
        boxes_here, classes = boxes_of[place[order]], classes[order]
        apart = boxes_here + (classes * 7680.0)[:, None]  # so that classes do not meet
        kept = nms(apart, values, case.iou)[:K]
        results.append((boxes_here[kept], values[kept], classes[kept]))
    return results


def tv_loop(boxes, scores, iou_threshold):
    if boxes.is_cuda:
        pytest.skip("runs on the CPU")
    return plain_nms.nms(boxes, scores, iou_threshold)


IMPLS = {
    "minkernels": ours,
    "torch-greedy-loop": lambda case, pred: plain(case, loop, pred),
    "torch-cpp-loop": lambda case, pred: plain(case, tv_loop, pred),
}


def different(case, result, exact):
    """Detections of the first images whose score and class differ from the reference's, a part of the whole: a sigmoid in float32 and
    offsets between the classes cost a peer some."""
    if isinstance(result, minkernels.Detections):
        result = [(None, result.scores[b, :n], result.classes[b, :n]) for b, n in enumerate(result.counts.tolist())]
    wrong = total = 0
    for (_, scores, classes), expected_scores, expected_classes, n in zip(result, *exact[1:], strict=False):
        expected = {(round(s, 4), c) for s, c in zip(expected_scores[:n].tolist(), expected_classes[:n].tolist(), strict=True)}
        wrong += len(expected ^ {(round(s, 4), c) for s, c in zip(scores.tolist(), classes.tolist(), strict=True)})
        total += len(expected)
    if wrong > 0.05 * total:
        raise AssertionError(f"wrong result: {wrong} of {total} detections differ")
    return wrong / max(1, total)


def bench_yolo_detect(timed, device, case, impl):
    def build():
        pred = make(case, device)

        @cache
        def exact():
            from minkernels.yolo import reference
            from minkernels.yolo._options import Options

            numbers = 2, CLASSES[case.head], float(SIZE), float(SIZE), True, case.score, case.iou, K, False, case.multi, 30000
            return reference.detect(pred[:2], *Options(case.head, *numbers))

        table = {name: partial(f, case, pred) for name, f in IMPLS.items()}
        return table, lambda result: different(case, result, exact())

    timed("yolo_detect", build, shape=case.shape, dtype=case.dtype, bytes=case.bytes)
