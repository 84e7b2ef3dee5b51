"""The ops of the models, on either of two roads: "fused", the ops of minkernels, or "torch", the same in plain PyTorch, as written here.

    from minmodels.kernels import attention, using

    out = attention(q, k, v, causal=True)  # minkernels.attention
    with using("torch"):
        same = attention(q, k, v, causal=True)  # F.scaled_dot_product_attention, within rounding

Each function is called as the op of its name in minkernels, and takes those of its options that the models need.
"""

import contextlib
import functools
import threading

import torch
import torch.nn.functional as F
from torch import Tensor

import minkernels
from minkernels import Detections, IoUMatch, TokenLogprobs
from minmodels.options import KERNELS


class _Road(threading.local):  # of each thread its own; torch.compile cannot read a ContextVar, this it guards
    def __init__(self):
        self.kernels = "fused"


_road = _Road()


@contextlib.contextmanager
def using(kernels: str):
    """What this thread calls in here runs on "fused" or "torch"; afterwards on what it ran before. Raises ValueError."""
    if kernels not in KERNELS:
        raise ValueError(f"kernels must be one of {', '.join(KERNELS)}, got {kernels!r}")
    before, _road.kernels = _road.kernels, kernels
    try:
        yield
    finally:
        _road.kernels = before


def _or_fused(plain):
    fused = getattr(minkernels, plain.__name__)

    @functools.wraps(plain)
    def op(*args, **kwargs):
        return (fused if _road.kernels == "fused" else plain)(*args, **kwargs)

    return op


@_or_fused
def attention(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, key_mask: Tensor | None = None) -> Tensor:
    """q (B, H, M, D), k and v (B, H, N, D), key_mask (B, N) bool -> (B, H, M, D). causal: query i sees keys 0 .. i + N - M."""
    M, N = q.shape[2], k.shape[2]
    mask = None if key_mask is None else key_mask[:, None, None]
    if causal and (M != N or mask is not None):  # PyTorch's own is_causal lets query i see keys 0 .. i, and takes no mask besides
        seen = torch.ones(M, N, dtype=torch.bool, device=q.device).tril(N - M)
        mask, causal = seen if mask is None else seen & mask, False
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)


@_or_fused
def cross_entropy(input: Tensor, target: Tensor, *, ignore_index: int = -100, reduction: str = "mean") -> Tensor:
    """input (N, V) logits, target (N,) -> nats."""
    return F.cross_entropy(input, target, ignore_index=ignore_index, reduction=reduction)


@_or_fused
def linear_cross_entropy(
    input: Tensor, linear_weight: Tensor, target: Tensor, *, linear_bias: Tensor | None = None, ignore_index: int = -100
) -> Tensor:
    """input (..., C), linear_weight (V, C), target (...), linear_bias (V,) -> nats, a mean. All (..., V) logits are kept."""
    logits = F.linear(input, linear_weight, linear_bias)
    return F.cross_entropy(logits.flatten(0, -2), target.flatten(), ignore_index=ignore_index)


@_or_fused
def token_logprobs(input: Tensor, target: Tensor, *, ignore_index: int = -100) -> TokenLogprobs:
    """input (..., V) logits, target (...) -> the logprob of the target and the entropy, in nats, and the argmax, each (...)."""
    logprobs, counts = _wide(input).log_softmax(-1), target != ignore_index
    of_target = logprobs.gather(-1, target.where(counts, 0)[..., None])[..., 0]
    entropy = torch.special.entr(logprobs.exp()).sum(-1)
    return TokenLogprobs(of_target.where(counts, 0.0), entropy.where(counts, 0.0), input.argmax(-1).where(counts, -1))


@_or_fused
def linear_token_logprobs(
    input: Tensor, linear_weight: Tensor, target: Tensor, *, linear_bias: Tensor | None = None, ignore_index: int = -100
) -> TokenLogprobs:
    """token_logprobs() of F.linear(input, linear_weight, linear_bias): input (..., H), linear_weight (V, H), target (...)."""
    return token_logprobs(F.linear(input, linear_weight, linear_bias), target, ignore_index=ignore_index)


@_or_fused
def bce_dice_loss(input: Tensor, target: Tensor) -> Tensor:
    """input (N, C, H, W) logits; target of that shape, or (N, H, W) classes -> the mean of BCE, and of 1 - Dice of each image and class."""
    logits = _wide(input)
    if target.dim() < logits.dim():
        target = F.one_hot(target.long(), logits.shape[1]).movedim(-1, 1)
    target, p = target.to(logits.dtype), logits.sigmoid()
    inter, sums = (p * target).sum((-2, -1)), p.sum((-2, -1)) + target.sum((-2, -1))
    return F.binary_cross_entropy_with_logits(logits, target) + (1 - (2 * inter + 1) / (sums + 1)).mean()


@_or_fused
def iou_match(boxes: Tensor, gts: Tensor, *, fmt: str = "xyxy") -> IoUMatch:
    """boxes (..., N, 4), gts (..., G, 4), "xyxy" or "cxcywh" -> best_iou and best_gt (..., N), gt_best_iou and gt_best_box (..., G)."""
    if fmt == "cxcywh":
        boxes, gts = _corners(boxes), _corners(gts)
    iou = _iou(_wide(boxes.detach()), _wide(gts.detach()))
    return IoUMatch(*iou.max(-1), *iou.max(-2))


@_or_fused
def yolo_loss(
    pred: Tensor, boxes: Tensor, classes: Tensor, *, boxes_per_cell: int, coord: float = 5.0, noobj: float = 0.5
) -> Tensor:
    """pred (N, K, K, B*5 + C), boxes (N, K, K, 4), classes (N, K, K), -1 where there is no object -> the mean over the images."""
    pred, cells = _wide(pred), pred.shape[1]
    box, conf = pred[..., : 5 * boxes_per_cell].unflatten(-1, (boxes_per_cell, 5)).split((4, 1), -1)  # (N, K, K, B, 4 and 1)
    truth, has, conf = boxes[..., None, :], classes >= 0, conf[..., 0]

    guess = torch.cat((box[..., :2] / cells, box[..., 2:].square()), -1).detach()  # as parts of the image, from the cell's corner
    known = torch.cat((truth[..., :2] / cells, truth[..., 2:]), -1)
    iou, best = _iou(_corners(guess), _corners(known))[..., 0].max(-1)
    mine = torch.arange(boxes_per_cell, device=pred.device) == best[..., None]
    mine &= has[..., None]  # (N, K, K, B)

    where = (box - torch.cat((truth[..., :2], truth[..., 2:].sqrt()), -1)).square().sum(-1).where(mine, 0.0)
    sure = (conf - iou[..., None].where(mine, 0.0)).square() * torch.where(mine, 1.0, noobj)
    one_hot = classes[..., None] == torch.arange(pred.shape[-1] - 5 * boxes_per_cell, device=pred.device)
    kind = (pred[..., 5 * boxes_per_cell :] - one_hot.to(pred.dtype)).square().sum(-1).where(has, 0.0)
    return (coord * where.sum() + sure.sum() + kind.sum()) / len(pred)


@_or_fused
def yolo_detect(
    pred: Tensor, *, head: str, boxes_per_cell: int, num_classes: int, image_size: int, score_threshold: float, iou_threshold: float,
    max_output: int, multi_label: bool = False,
) -> Detections:  # fmt: skip
    """pred (N, K, K, B*5 + C), as minmodels.minyolo has it -> boxes (N, max_output, 4) x1 y1 x2 y2 in pixels, scores, classes, counts."""
    if head != "v1":
        raise ValueError(f"head must be v1, got {head!r}")
    pred, S = _wide(pred.detach()), pred.shape[1]
    box, kind = pred[..., : 5 * boxes_per_cell].unflatten(-1, (boxes_per_cell, 5)), pred[..., 5 * boxes_per_cell :]
    rows, columns = torch.meshgrid(torch.arange(S, device=pred.device), torch.arange(S, device=pred.device), indexing="ij")
    centre = (box[..., :2] + torch.stack((columns, rows), -1)[:, :, None]) / S * image_size
    size = box[..., 2:4].square() * image_size
    corners = torch.cat((centre - size / 2, centre + size / 2), -1).flatten(1, 3)  # (N, K K B, 4)
    scores = (box[..., 4:] * kind[..., None, :]).flatten(1, 3)  # (N, K K B, C)

    out = Detections(
        corners.new_zeros(len(pred), max_output, 4), scores.new_zeros(len(pred), max_output),
        torch.full((len(pred), max_output), -1, device=pred.device), torch.zeros(len(pred), dtype=torch.int64, device=pred.device),
    )  # fmt: skip
    for i in range(len(pred)):
        best = scores[i] if multi_label else scores[i].where(F.one_hot(scores[i].argmax(-1), num_classes).bool(), -torch.inf)
        which, classes = (best > score_threshold).nonzero(as_tuple=True)
        order = best[which, classes].argsort(descending=True, stable=True)
        which, classes = which[order], classes[order]
        hides = (_iou(corners[i, which], corners[i, which]) > iou_threshold) & (classes[:, None] == classes)
        alive, kept = torch.ones_like(which, dtype=torch.bool), []
        for j in range(len(which)):
            if alive[j] and len(kept) < max_output:
                kept.append(j)
                alive &= ~hides[j]
        n, which, classes = len(kept), which[kept], classes[kept]
        out.boxes[i, :n], out.scores[i, :n], out.classes[i, :n], out.counts[i] = corners[i, which], best[which, classes], classes, n
    return out


def _corners(boxes: Tensor) -> Tensor:
    """x y w h, of the centre -> x1 y1 x2 y2."""
    return torch.cat((boxes[..., :2] - boxes[..., 2:] / 2, boxes[..., :2] + boxes[..., 2:] / 2), -1)


def _iou(a: Tensor, b: Tensor) -> Tensor:
    """(..., N, 4) and (..., G, 4) x1 y1 x2 y2 -> (..., N, G)."""
    a, b = a[..., :, None, :], b[..., None, :, :]
    w, h = (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp(min=0).unbind(-1)
    areas = ((t[..., 2] - t[..., 0]) * (t[..., 3] - t[..., 1]) for t in (a, b))
    inter = w * h
    return inter / (sum(areas) - inter).clamp(min=1e-12)


def _wide(t: Tensor) -> Tensor:
    return t.to(torch.promote_types(t.dtype, torch.float32))
