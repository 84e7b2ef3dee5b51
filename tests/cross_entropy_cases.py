"""What the cross-entropy tests share: shapes, options, layouts, and the check of one backend's kernels against fp64."""

import math

import pytest
import torch
import torch.nn.functional as F

from judge import assert_close
from minkernels.cross_entropy._options import Options, coefficients, is_labels

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
REDUCTIONS = ["none", "mean", "sum"]
OPTIONS = {  # what goes beside "labels": every option alone, and all together
    "plain": {},
    "weight": dict(weight=True),
    "smoothing": dict(label_smoothing=0.1),
    "weighted-smoothing": dict(weight=True, label_smoothing=0.3),
    "z-loss": dict(z_loss=1e-2),
    "softcap": dict(softcap=5.0),
    "scale": dict(logit_scale=0.7),
    "negative-scale": dict(logit_scale=-1.5),
    "all": dict(weight=True, label_smoothing=0.1, z_loss=1e-2, softcap=8.0, logit_scale=1.3),
    "probs": dict(probs=True),
    "probs-all": dict(probs=True, weight=True, label_smoothing=0.1, z_loss=1e-2, softcap=8.0, logit_scale=1.3),
}
CANNOT_HOLD = [(torch.uint8, -100), (torch.uint8, 412), (torch.int32, 156 + 2**32)]  # an ignore_index; a comparison would wrap it to 156
LAYOUTS = ["rows", "columns", "slice", "expanded"]


def make(*shape, dtype=torch.float32, ignored=True, probs=False, labels=torch.int64):
    """Logits of (N, V) or (N, V, D), and a target for them; the second row of labels is ignored."""
    N, V = shape[:2]
    x, rows = (3 * torch.randn(shape)).to(dtype), (N, *shape[2:])
    if probs:
        return x, torch.rand(shape).to(dtype)
    target = torch.randint(0, V, rows).to(labels)
    if ignored and target.numel() > 1:
        target.view(-1)[1] = ignore_index(labels)
    return x, target


def ignore_index(labels):
    return 255 if labels == torch.uint8 else -100


def lay_out(t, layout):
    """The same values in another order of memory."""
    if layout == "columns":
        return t.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "channels-last":
        return t.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout == "slice":  # a padded vocabulary: the row stride is not V
        return t.new_full((len(t), t.shape[1] + 13, *t.shape[2:]), float("nan"))[:, 5 : t.shape[1] + 5].copy_(t)
    return t[:1].expand(t.shape) if layout == "expanded" else t


def formula(x, target, *, weight=None, ignore_index=-100, reduction="mean", label_smoothing=0.0, z_loss=0.0, softcap=0.0, logit_scale=1.0):
    """The textbook: F.cross_entropy of what the options make of the logits."""
    z = softcap * (x * logit_scale / softcap).tanh() if softcap else x * logit_scale
    weight = weight if weight is None else weight.to(x.dtype)
    labels = is_labels(target)
    target = target.long() if labels else target.to(x.dtype)
    kwargs = dict(ignore_index=ignore_index) if labels else {}
    loss = F.cross_entropy(z, target, weight, reduction=reduction, label_smoothing=label_smoothing, **kwargs)
    if z_loss:
        w = torch.ones_like(z[:, 0])
        if labels:
            counts = target != ignore_index
            w = counts.to(x.dtype) if weight is None else counts * weight[target.masked_fill(~counts, 0)]
        extra = z_loss * w * z.logsumexp(1) ** 2
        loss = loss + {"none": extra, "sum": extra.sum(), "mean": extra.sum() / w.sum()}[reduction]
    return loss


def grads_of(function, inputs, dloss):
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    return torch.autograd.grad(function(*leaves), leaves, dloss)


def check(backend, x, target, options, reduction, layout="rows", device="cpu", draws=1, what=""):
    """Loss, early gradient and recomputed gradient against fp64; NaN is planted in every ignored row."""
    dtype, wide, V = x.dtype, torch.promote_types(x.dtype, torch.float32), x.shape[1]
    options = dict(options)
    probs = options.pop("probs", False)
    weight = torch.rand(V, dtype=wide) + 0.5 if options.pop("weight", False) else None
    lowered = Options(ignore_index=ignore_index(target.dtype), **options)
    if layout == "expanded":
        x = x[:1].expand(x.shape)
    ignored = torch.zeros_like(x, dtype=torch.bool) if probs else (target == lowered.ignore_index).unsqueeze(1).expand(x.shape)
    spoilt = x if layout == "expanded" else x.masked_fill(ignored, math.nan)
    spoilt, placed = lay_out(spoilt.to(device), layout), target.to(device)
    placed, w = lay_out(placed, layout) if probs else placed, None if weight is None else weight.to(device)
    if layout == "expanded" and probs:
        target = target[:1].expand(target.shape)
    dloss = (torch.rand(x[:, 0].shape if reduction == "none" else ()) - 0.3).to(wide)

    def loss(x, target):
        return formula(x, target, weight=weight, reduction=reduction, **lowered._asdict())

    z = 0.0  # the size of the logits, where the options round them
    if "softcap" in options or "logit_scale" in options:
        z = lowered.softcap or (lowered.logit_scale * x.double()).abs().max()
    w_most = 1.0 if weight is None else weight.max().item()
    actual, stats, early = backend.fwd(spoilt, placed, w, *lowered, reduction, False, reduction != "none")
    wide_target, exact_target = (target, target) if not probs else (target.to(wide), target.double())
    plain, exact = loss(x.to(wide), wide_target), loss(x.double(), exact_target)
    assert_close(actual.cpu(), plain, exact, wide, f"{what} loss", draws=draws, size=float(z))
    upstreams = {"recomputed": dloss} if reduction == "none" else {"early": torch.ones_like(dloss), "recomputed": dloss}
    for name, upstream in upstreams.items():
        inputs = (x, target) if probs else (x,)
        f = loss if probs else lambda x: loss(x, target)
        exact = grads_of(f, [t.double() for t in inputs], upstream.double())
        plain = grads_of(f, inputs, upstream.to(dtype))
        if name == "early":
            grad = early
        else:
            k = coefficients(upstream.to(device), V, placed, w, stats, lowered, reduction, False)
            grad = backend.grad(spoilt, placed, w, k, *lowered)
        rows = x[:, 0].numel() if reduction == "mean" else 1
        size = abs(lowered.logit_scale) * w_most * upstream.abs().max().item() / rows  # of p and of the one hot
        assert grad.dtype == dtype and grad.stride() == torch.empty_like(spoilt).stride(), f"{what} {name}: not what the fake promises"
        assert_close(grad.cpu(), plain[0], exact[0], dtype, f"{what} {name} gradient", draws=draws, size=size)


def check_stats(backend, x, target, options, layout="rows", device="cpu", draws=1, what=""):
    """token_logprobs' numbers from the statistics, and the gradient of both, against fp64."""
    dtype, wide = x.dtype, torch.promote_types(x.dtype, torch.float32)
    lowered, counts = Options(**options), target != -100
    spoilt = lay_out(x.masked_fill(~counts[:, None], math.nan).to(device), layout)
    stats, argmax = backend.stats(spoilt, target.to(device), None, *lowered, False, True)
    stats = stats[counts.to(device)]
    m, d, _, rel, _, E = (t.double() for t in stats.cpu().unbind(-1))
    label = target[counts].long()

    def both(x):
        z = lowered.softcap * (x * lowered.logit_scale / lowered.softcap).tanh() if lowered.softcap else x * lowered.logit_scale
        logp = z[counts].log_softmax(-1)
        return logp.gather(-1, label[:, None])[:, 0], -(logp.exp() * logp).sum(-1)

    for name, actual, plain, exact in zip(
        ("logprob", "entropy"), (-rel - d.log(), d.log() + E / d), both(x.to(wide)), both(x.double()), strict=True
    ):
        assert_close(actual.to(wide), plain, exact, wide, f"{what} {name}", draws=draws, cancelled=x.shape[1] > 1, size=lowered.softcap)
    assert (argmax[~counts] == -1).all()
    chosen = x.double()[counts].gather(-1, argmax.cpu()[counts][:, None])[:, 0] * (1 if lowered.logit_scale > 0 else -1)
    best = (x.double()[counts] * (1 if lowered.logit_scale > 0 else -1)).amax(-1)
    assert torch.equal(chosen, best) or lowered.softcap, f"{what} argmax"
    dlogprob, dentropy = torch.randn(2, len(x)).to(wide)
    k = torch.zeros(len(x), 5, dtype=wide)
    m, d, E = (t.to(wide) for t in (m, d, E))
    g, h = dlogprob[counts], dentropy[counts]
    k[counts] = torch.stack([m, (-g - h * (E / d)) / d, h / d, -g, torch.zeros_like(g)], -1)
    grad = backend.grad(spoilt, target.to(device), None, k.to(device), *lowered).cpu()
    total = lambda x, g=g, h=h: sum((a * b.to(a.dtype)).sum() for a, b in zip(both(x), (g, h), strict=True))  # noqa: E731
    one = torch.ones((), dtype=dtype)
    exact, plain = grads_of(total, [x.double()], one.double())[0], grads_of(total, [x], one)[0]
    assert_close(grad, plain, exact, dtype, f"{what} gradient of both", draws=draws, size=abs(lowered.logit_scale))


def grad_of(function, x, dloss):
    return grads_of(function, [x], dloss)[0]


def check_samples(ours, theirs, dtype):
    """Every sample that PyTorch tests its own function with, forward and backward; returns how many there are."""
    pytest.importorskip("expecttest")
    from torch.testing._internal.common_methods_invocations import op_db

    (info,) = (info for info in op_db if info.name == f"nn.functional.{theirs.__name__}" and not info.variant_test_name)
    count = 0
    for sample in info.sample_inputs("cpu", dtype, requires_grad=True):
        given = sample.input, *sample.args, *sample.kwargs.values()
        leaves = [t for t in given if isinstance(t, torch.Tensor) and t.requires_grad]
        a, b = (f(sample.input, *sample.args, **sample.kwargs) for f in (ours, theirs))
        torch.testing.assert_close(a, b)
        dloss = torch.randn_like(b)
        for da, db in zip(torch.autograd.grad(a, leaves, dloss), torch.autograd.grad(b, leaves, dloss), strict=True):
            torch.testing.assert_close(da, db)
        count += 1
    return count
