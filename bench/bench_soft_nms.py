"""Soft-NMS and Matrix NMS beside their formulas in plain PyTorch, on the boxes of tests/nms_cases.py."""

import sys
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import torch

import minkernels
from bench.timing import max_error

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))
from nms_cases import DATA

IOU, SIGMA = 0.3, {"soft": 0.5, "matrix": 2.0}


class Case(NamedTuple):
    B: int
    N: int
    classes: int
    method: str
    K: int
    data: str = "clusters"

    def __str__(self):
        return f"{self.data}-{self.B}x{self.N}-{self.classes}-classes-{self.method}-{self.K}"


def cases(matrix):
    both = "gaussian", "linear"
    large = [Case(8, 1000, 80, method, 300) for method in both] + [Case(1, 1000, 1, method, 1000) for method in both]
    large += [Case(1, 10_000, 1, "gaussian", 300)] if not matrix else [Case(8, 500, 80, "gaussian", 100), Case(1, 5000, 1, "gaussian", 300)]
    return {"cpu": large, "cuda": large, "tiny": [Case(2, 70, 3, method, 20) for method in both]}


def make(case, device):
    images = [DATA[case.data](case.N, case.classes) for _ in range(case.B)]
    boxes, scores, ids = (torch.stack(tensors).to(device) for tensors in zip(*images, strict=True))
    return boxes, scores, ids if case.classes > 1 else None


def box_iou(a, b):
    sides = (torch.minimum(a[:, None, 2:], b[:, 2:]) - torch.maximum(a[:, None, :2], b[:, :2])).clamp(min=0)
    area_a, area_b, both = (a[:, 2:] - a[:, :2]).prod(1), (b[:, 2:] - b[:, :2]).prod(1), sides.prod(2)
    return both / (area_a[:, None] + area_b - both)


def plain_soft_nms(case, boxes, scores, ids):
    """Image by image: the highest score, one row of IoUs, the decay, and again."""
    results = []
    for b in range(case.B):
        x, s, kept, values = boxes[b], scores[b].clone(), [], []
        while len(kept) < case.K:
            top, i = s.max(0)
            if top <= 1e-3:
                break
            kept.append(i), values.append(top)
            iou = box_iou(x[i][None], x)[0]
            weight = torch.where(iou > IOU, 1 - iou, 1.0) if case.method == "linear" else torch.exp(-(iou**2) / SIGMA["soft"])
            s = s * (weight if ids is None else torch.where(ids[b] == ids[b, i], weight, 1.0))
            s[i] = 0
        results.append(torch.stack(values))
    return results


def plain_matrix_nms(case, boxes, scores, ids):
    """As SOLO's repository has it, N x N tensors, with boxes for masks."""
    results = []
    for b in range(case.B):
        s, order = scores[b].sort(descending=True)
        iou = box_iou(boxes[b, order], boxes[b, order]).triu(1)
        if ids is not None:
            iou = iou * (ids[b, order, None] == ids[b, order])
        c = iou.amax(0)[:, None].expand_as(iou)
        if case.method == "gaussian":
            decay = (torch.exp(-SIGMA["matrix"] * iou**2) / torch.exp(-SIGMA["matrix"] * c**2)).amin(0)
        else:
            decay = ((1 - iou) / (1 - c)).amin(0)
        s = s * decay
        results.append(s[s > 0.05].sort(descending=True).values[: case.K])
    return results


def ours_soft(case, boxes, scores, ids):
    return minkernels.soft_nms(boxes, scores, class_ids=ids, method=case.method, iou_threshold=IOU, max_output=case.K)


def ours_matrix(case, boxes, scores, ids):
    return minkernels.matrix_nms(boxes, scores, class_ids=ids, method=case.method, min_score=0.05, max_output=case.K)


IMPLS = "minkernels", "torch"


def run(timed, device, case, name, ours, plain):
    def build():
        args = make(case, device)

        @cache
        def exact():
            from minkernels.soft_nms import reference

            numbers = (case.method, IOU, SIGMA["soft"], 1e-3) if name == "soft_nms" else (case.method, SIGMA["matrix"], 0.05)
            return getattr(reference, name)(*(t if t is None else t.cpu() for t in args), *numbers, case.K)[1].double()

        def judge(result):
            if isinstance(result, minkernels.RescoredNMS):
                return max_error([result.scores.cpu()], [exact()], torch.float32)
            padded = [torch.nn.functional.pad(s, (0, case.K - len(s))) for s in result]
            return max_error([torch.stack(padded).cpu()], [exact()], torch.float32)

        return {impl: partial(f, case, *args) for impl, f in (("minkernels", ours), ("torch", plain))}, judge

    timed(name, build, shape=(case.B, case.N), dtype=torch.float32, bytes=case.B * case.N * 20)


def bench_soft_nms(timed, device, case, impl):
    run(timed, device, case, "soft_nms", ours_soft, plain_soft_nms)


def bench_matrix_nms(timed, device, case, impl):
    run(timed, device, case, "matrix_nms", ours_matrix, plain_matrix_nms)


CASES = cases(matrix=False)
bench_matrix_nms.cases = cases(matrix=True)
