"""The IoU family beside torchvision's formulas in plain PyTorch (its wheels are not needed), eager and under torch.compile."""

import math
from functools import cache, partial
from typing import NamedTuple

import pytest
import torch

import minkernels
from bench.timing import compiled, max_error


class Case(NamedTuple):
    N: int
    M: int  # 0: N aligned pairs
    sets: int = 1
    dtype: torch.dtype = torch.float32

    @property
    def pairs(self):
        return self.sets * self.N * (self.M or 1)

    @property
    def bytes(self):
        """Read once: the boxes of both sides."""
        return 4 * self.dtype.itemsize * self.sets * (self.N + (self.M or self.N))

    def __str__(self):
        shape = f"{self.N}x{self.M}" if self.M else f"{self.N}-pairs"
        return f"{f'{self.sets}x' * (self.sets > 1)}{shape}-{str(self.dtype).removeprefix('torch.')}"


def area(boxes):
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


def overlap(a, b):
    lt, rb = torch.max(a[..., :2], b[..., :2]), torch.min(a[..., 2:], b[..., 2:])
    wh = (rb - lt).clamp(min=0)
    inter = wh[..., 0] * wh[..., 1]
    return inter, area(a) + area(b) - inter


def plain_iou(boxes1, boxes2):
    """torchvision.ops.box_iou."""
    inter, union = overlap(boxes1[..., :, None, :], boxes2[..., None, :, :])
    return inter / union


def alpha_v(a, b, iou, eps=1e-7):
    w1, h1, w2, h2 = a[..., 2] - a[..., 0], a[..., 3] - a[..., 1], b[..., 2] - b[..., 0], b[..., 3] - b[..., 1]
    v = 4 / math.pi**2 * (torch.atan(w2 / h2) - torch.atan(w1 / h1)).pow(2)
    with torch.no_grad():
        alpha = v / (1 - iou + v + eps)
    return alpha * v


def centre_distance(a, b, hull, eps=1e-7):
    ex, ey = (a[..., 0] + a[..., 2] - b[..., 0] - b[..., 2]) / 2, (a[..., 1] + a[..., 3] - b[..., 1] - b[..., 3]) / 2
    return (ex.pow(2) + ey.pow(2)) / (hull[..., 0].pow(2) + hull[..., 1].pow(2) + eps)


def plain_ciou(boxes1, boxes2):
    """torchvision.ops.complete_box_iou."""
    a, b = boxes1[..., :, None, :], boxes2[..., None, :, :]
    inter, union = overlap(a, b)
    iou = inter / union
    hull = (torch.max(a[..., 2:], b[..., 2:]) - torch.min(a[..., :2], b[..., :2])).clamp(min=0)
    return iou - centre_distance(a, b, hull) - alpha_v(a, b, iou)


def plain_match(boxes, gts):
    iou = plain_iou(boxes, gts)
    return *iou.max(-1), *iou.max(-2)


def plain_loss(a, b, kind, eps=1e-7):
    """torchvision's losses, but for the boolean indexing, which torch.compile cannot trace."""
    a, b = a.to(torch.promote_types(a.dtype, torch.float32)), b.to(torch.promote_types(b.dtype, torch.float32))
    inter, union = overlap(a, b)
    iou, hull = inter / (union + eps), torch.max(a[..., 2:], b[..., 2:]) - torch.min(a[..., :2], b[..., :2])
    if kind == "giou":
        both = hull[..., 0] * hull[..., 1]
        return (1 - iou + (both - union) / (both + eps)).mean()
    return (1 - iou + centre_distance(a, b, hull) + alpha_v(a, b, iou)).mean()


def torchvision_loss(a, b, kind, eps=1e-7):
    """torchvision.ops.generalized_box_iou_loss and complete_box_iou_loss."""
    a, b = a.to(torch.promote_types(a.dtype, torch.float32)), b.to(torch.promote_types(b.dtype, torch.float32))
    x1, y1, x2, y2 = a.unbind(-1)
    x1g, y1g, x2g, y2g = b.unbind(-1)
    xk1, yk1, xk2, yk2 = torch.max(x1, x1g), torch.max(y1, y1g), torch.min(x2, x2g), torch.min(y2, y2g)
    inter = torch.zeros_like(x1)
    mask = (yk2 > yk1) & (xk2 > xk1)
    inter[mask] = (xk2[mask] - xk1[mask]) * (yk2[mask] - yk1[mask])
    union = (x2 - x1) * (y2 - y1) + (x2g - x1g) * (y2g - y1g) - inter
    iou = inter / (union + eps)
    xc1, yc1, xc2, yc2 = torch.min(x1, x1g), torch.min(y1, y1g), torch.max(x2, x2g), torch.max(y2, y2g)
    if kind == "giou":
        both = (xc2 - xc1) * (yc2 - yc1)
        return (1 - (iou - (both - union) / (both + eps))).mean()
    diagonal = ((xc2 - xc1) ** 2) + ((yc2 - yc1) ** 2) + eps
    distance = (((x2 + x1) / 2 - (x2g + x1g) / 2) ** 2) + (((y2 + y1) / 2 - (y2g + y1g) / 2) ** 2)
    return (1 - iou + (distance / diagonal) + alpha_v(a, b, iou)).mean()


IMPLS, COMPILED = ("minkernels", "torch"), ("torch-compile",)


def make(n, case, device, image=640.0):
    """Boxes of 8 to 196 pixels in an image, half of them near one of 20 objects, as a detector makes them."""
    xy = image * torch.rand(case.sets, n, 2, device=device, dtype=torch.float64)
    near = image * torch.rand(case.sets, 20, 2, device=device, dtype=torch.float64)[:, torch.arange(n, device=device) % 20]
    xy = torch.where(torch.rand(case.sets, n, 1, device=device) > 0.5, xy, near + 8 * torch.randn_like(xy))
    wh = torch.exp2(3 + 4.6 * torch.rand_like(xy))
    boxes = torch.cat([xy - wh / 2, xy + wh / 2], -1).to(case.dtype)
    return boxes[0] if case.sets == 1 else boxes


def run(timed, name, case, ours, plain, a, b, *, backward, written, peer=None):
    def build():
        tensors = [a.clone().requires_grad_(backward), b]
        upstream = None if not backward or not case.M else torch.randn(*case_shape(case), device=a.device)

        def step(f, tensors=tensors):
            out = f(*tensors)
            if not backward:
                return out if isinstance(out, tuple) else (out,)
            return out.detach(), *torch.autograd.grad(out, tensors[0], None if upstream is None else upstream.to(out.dtype))

        @cache
        def exact():
            wide = [t.detach().double().requires_grad_(t.requires_grad) for t in tensors]
            return step(plain, wide)

        def judge(outputs):
            return max_error([t for t in outputs if t.is_floating_point()], [t for t in exact() if t.is_floating_point()], case.dtype)

        impls = {"minkernels": ours, "torch": peer or plain, "torch-compile": compiled(plain)}
        return {name: partial(step, f) for name, f in impls.items()}, judge

    timed(name, build, shape=case[:3], dtype=case.dtype, bytes=case.bytes * (1 + backward) + written)


def case_shape(case):
    return (case.N, case.M) if case.sets == 1 else (case.sets, case.N, case.M)


def sets(case, device):
    if device == "cpu" and case.pairs > 1 << 26:
        pytest.skip("the copies that the peers make are too large for this machine")
    return make(case.N, case, device), make(case.M, case, device)


def bench_box_iou(timed, device, case, impl):
    a, b = sets(case, device)
    run(timed, "box_iou", case, minkernels.box_iou, plain_iou, a, b, backward=False, written=4 * case.pairs)


def bench_complete_box_iou(timed, device, case, impl):
    a, b = sets(case, device)
    run(timed, "complete_box_iou", case, minkernels.complete_box_iou, plain_ciou, a, b, backward=False, written=4 * case.pairs)


def bench_complete_box_iou_fwd_grad(timed, device, case, impl):
    a, b = sets(case, device)
    written = 8 * case.pairs + 4 * a.numel()  # and read: the upstream gradient
    run(timed, "complete_box_iou fwd+grad", case, minkernels.complete_box_iou, plain_ciou, a, b, backward=True, written=written)


def bench_iou_match(timed, device, case, impl):
    a, b = sets(case, device)
    run(timed, "iou_match", case, minkernels.iou_match, plain_match, a, b, backward=False, written=12 * case.sets * (case.N + case.M))


def run_loss(timed, device, case, kind):
    a = make(case.N, case, device)
    b = (a + 8 * torch.rand_like(a)).to(case.dtype)
    ours, plain, theirs = (
        partial(minkernels.iou_loss, kind=kind, reduction="mean"), partial(plain_loss, kind=kind), partial(torchvision_loss, kind=kind),
    )  # fmt: skip
    written = a.numel() * a.element_size()
    run(timed, f"{kind} loss fwd+grad", case, ours, plain, a, b, backward=True, written=written, peer=theirs)


def bench_giou_loss_fwd_grad(timed, device, case, impl):
    run_loss(timed, device, case, "giou")


def bench_ciou_loss_fwd_grad(timed, device, case, impl):
    run_loss(timed, device, case, "ciou")


CASES = {
    "cpu": [Case(4000, 4000), Case(300, 1000, 16)],
    "cuda": [Case(4000, 4000), Case(20000, 20000), Case(300, 1000, 64)],
    "tiny": [Case(5, 9), Case(6, 3, 2)],
}
bench_iou_match.cases = {
    "cpu": [Case(100_000, 100), Case(8400, 20, 16)],
    "cuda": [Case(250_000, 100), Case(8400, 20, 64)],
    "tiny": [Case(33, 3), Case(6, 3, 2)],
}
bench_giou_loss_fwd_grad.cases = bench_ciou_loss_fwd_grad.cases = {
    "cpu": [Case(100_000, 0), Case(100_000, 0, 1, torch.bfloat16)],
    "cuda": [Case(100_000, 0), Case(2_000_000, 0), Case(2_000_000, 0, 1, torch.bfloat16)],
    "tiny": [Case(7, 0), Case(5, 0, 1, torch.bfloat16)],
}
