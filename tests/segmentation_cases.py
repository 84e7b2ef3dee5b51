"""What the tests of the segmentation losses share: PyTorch's and torchvision's formulas, and how cases are drawn."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st

from minkernels import bce_dice_loss, bce_with_logits, sigmoid_focal_loss

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
REDUCTIONS = ["none", "mean", "sum"]
TARGETS = ["float", "hard", "float64", "float16", "bool", "uint8", "int32", "int64"]
LAYOUTS = ["contiguous", "permuted", "slice", "expanded"]
LOSSES = {
    "bce": lambda x, t, **options: bce_with_logits(x, t, **options),
    "focal": lambda x, t, **options: sigmoid_focal_loss(x, t, **{"reduction": "mean", **options}),
    "dice": lambda x, t, **options: bce_dice_loss(x, t, **options),
}
losses = pytest.mark.parametrize("loss_of", LOSSES.values(), ids=LOSSES)


def pointwise(x, t, weight=None, pos_weight=None, mask=None, alpha=-1.0, gamma=0.0, reduction="mean"):
    """The plain formulas, on tensors that hold nothing strange where mask is False."""
    loss = F.binary_cross_entropy_with_logits(x, t, weight, pos_weight=pos_weight, reduction="none")
    if gamma > 0:
        p = x.sigmoid()
        loss = loss * (1 - (p * t + (1 - p) * (1 - t))) ** gamma
    if alpha >= 0:
        loss = loss * (alpha * t + (1 - alpha) * (1 - t))
    loss = loss if mask is None else loss.masked_fill(~mask, 0.0)
    if reduction == "mean":
        return loss.sum() / (x.numel() if mask is None else mask.expand(x.shape).sum())
    return loss.sum() if reduction == "sum" else loss


def bce_dice(
    x, t, pos_weight=None, mask=None, bce_weight=1.0, dice_weight=1.0, smooth=1.0, squared=False, per_image=True, reduction="mean"
):
    """The same for dense targets; where nothing is masked, BCE is F.binary_cross_entropy_with_logits."""
    channels = (-1, *[1] * (x.dim() - 2))
    bce = F.binary_cross_entropy_with_logits(x, t, pos_weight=None if pos_weight is None else pos_weight.view(channels), reduction="none")
    mask = torch.ones_like(x, dtype=torch.bool) if mask is None else mask
    p, t, bce = (v.masked_fill(~mask, 0.0) for v in (x.sigmoid(), t, bce))

    def entries(v):
        v = v.reshape(*v.shape[:2], -1).sum(2)
        return v if per_image else v.sum(0)

    sizes = entries(p * p) + entries(t * t) if squared else entries(p) + entries(t)
    dice, count = 1 - (2 * entries(p * t) + smooth) / (sizes + smooth), entries(mask.to(x.dtype))
    if reduction == "mean":
        counted = entries(mask.double()) > 0
        return bce_weight * (bce.sum() / mask.sum()) + dice_weight * (dice.masked_fill(~counted, 0.0).sum() / counted.sum())
    own = bce_weight * (entries(bce) / count.clamp(min=1)) + dice_weight * dice
    own = own.masked_fill(entries(mask.double()) == 0, 0.0)
    return own.sum() if reduction == "sum" else own


def grad_of(function, x, dloss):
    x = x.detach().clone().requires_grad_()
    return torch.autograd.grad(function(x), x, dloss)[0]


def make_target(kind, shape):
    t = torch.rand(shape)
    dtypes = {"bool": torch.bool, "uint8": torch.uint8, "int32": torch.int32, "int64": torch.int64}
    floats = {"float": torch.float32, "float64": torch.float64, "float16": torch.float16}
    return t.to(floats[kind]) if kind in floats else (t > 0.6).to(dtypes.get(kind, torch.float32))


def lay_out(t, layout):
    """t with the same values in another layout; "expanded" repeats its first entry."""
    if layout == "expanded":
        return t[:1].expand(t.shape) if t.dim() and t.shape[0] else t
    if layout == "permuted" and t.dim() > 1:
        return t.transpose(1, -1).contiguous().transpose(1, -1)
    if layout == "slice" and t.dim():
        wide = torch.full((*t.shape[:-1], 2 * t.shape[-1] + 3), 1 if not t.is_floating_point() else float("nan"), dtype=t.dtype)
        return wide[..., 2 : 2 + 2 * t.shape[-1] : 2].copy_(t)
    return t.contiguous()


shapes = st.one_of(
    st.lists(st.integers(1, 12), min_size=0, max_size=4),
    st.tuples(st.integers(1, 3), st.integers(1, 20000)),  # more than a task
    st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 70), st.integers(1, 70)),
).map(tuple)
image_shapes = st.one_of(
    st.tuples(st.integers(1, 4), st.integers(2, 5)),  # no pixels: (N, C)
    st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 60), st.integers(1, 60)),
    st.tuples(st.integers(1, 2), st.integers(1, 2), st.integers(1, 20000)),
    st.tuples(st.integers(1, 2), st.integers(1, 2), st.integers(1, 5), st.integers(1, 9), st.integers(1, 7)),
)


def make(shape, dtype=torch.float32, target="float"):
    return (3 * torch.randn(shape)).to(dtype), make_target(target, shape)
