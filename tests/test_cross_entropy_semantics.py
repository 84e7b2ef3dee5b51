"""What the softmax losses promise: PyTorch's results on every kind of target, and what happens at the edges."""

import math
import sys

import pytest
import torch
import torch.nn.functional as F

from cross_entropy_cases import CANNOT_HOLD, DTYPES, REDUCTIONS, check_samples, formula, grad_of, make
from minkernels import cross_entropy, linear_cross_entropy, token_logprobs
from minkernels.cross_entropy import reference


def test_all_ignored_is_nan_like_pytorch_and_the_gradient_zero(library):
    x, target = make(3, 5)
    x.requires_grad_()
    target[:] = -100
    loss = cross_entropy(x, target)
    assert loss.isnan() and (torch.autograd.grad(loss, x)[0] == 0).all()
    assert cross_entropy(x, target, reduction="sum") == 0 and (cross_entropy(x, target, reduction="none") == 0).all()


def test_a_mean_over_nothing_may_be_zero(library):
    x, target = make(3, 5)
    x.requires_grad_()
    target[:] = -100
    weightless = dict(target=torch.tensor([0, 1, 1]), weight=torch.tensor([0.0, 0.0, 1.0, 1.0, 1.0]))
    for call in (dict(target=target), weightless, dict(weightless, label_smoothing=0.1)):
        assert not cross_entropy(x, **call).isfinite()
        loss = cross_entropy(x, **call, empty="zero")
        (dx,) = torch.autograd.grad(loss, x)
        assert loss == 0 and (dx == 0).all()
        assert (torch.autograd.grad(cross_entropy(x, **call, empty="zero") * 2, x)[0] == 0).all()
    full = torch.tensor([0, 1, 2])
    torch.testing.assert_close(cross_entropy(x, full, empty="zero"), F.cross_entropy(x, full))


@pytest.mark.parametrize("shape", [(4, 9), (2, 9, 30)], ids=["rows", "positions"])
@pytest.mark.parametrize("index", [-100, 3, 255, -1])  # a valid class is ignored too
def test_ignore_index(index, shape, library):
    x, target = make(*shape, ignored=False)
    target.view(-1)[:3] = index
    x.requires_grad_()
    weight = torch.rand(9)
    for kwargs in ({}, dict(weight=weight), dict(label_smoothing=0.2)):
        ours, theirs = (f(x, target, ignore_index=index, **kwargs) for f in (cross_entropy, F.cross_entropy))
        torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(torch.autograd.grad(ours, x)[0], torch.autograd.grad(theirs, x)[0])


@pytest.mark.parametrize("kind, index", CANNOT_HOLD, ids=str)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_an_ignore_index_that_the_labels_cannot_hold(backend, kind, index, library, monkeypatch):
    if backend == "reference":
        for name, road in (("_fwd", reference.fwd), ("softmax_stats", reference.stats), ("softmax_grad", reference.grad)):
            monkeypatch.setattr(sys.modules[cross_entropy.__module__], name, road)
    x, h, w, target = torch.randn(6, 300), torch.randn(6, 8), torch.randn(300, 8), torch.tensor([156, 3, 255, 156, 0, 9])
    for reduction in REDUCTIONS:  # "none" recomputes its gradient
        results = []
        for labels, ignore_index in ((target, -100), (target.to(kind), index)):
            leaf = x.clone().requires_grad_()
            loss = cross_entropy(leaf, labels, ignore_index=ignore_index, label_smoothing=0.1, reduction=reduction)
            results.append((loss, *torch.autograd.grad(loss.sum(), leaf), *token_logprobs(x, labels, ignore_index=ignore_index)))
            results[-1] += (linear_cross_entropy(h, w, labels, ignore_index=ignore_index, reduction=reduction),)
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("shape", [(2, 5, 4, 4), (9, 5), (9, 200)], ids=["positions", "turned", "rows"])
@pytest.mark.parametrize("options", [dict(label_smoothing=0.1), dict(weight=torch.zeros(200))], ids=["smoothing", "weights-of-zero"])
def test_where_nothing_counts_the_gradient_is_zero(options, shape, levels):
    target = torch.randint(0, 5, (shape[0], *shape[2:])) if "weight" in options else torch.full((shape[0], *shape[2:]), -100)
    target.view(-1)[0] = -100
    options = {name: value[: shape[1]] if name == "weight" else value for name, value in options.items()}
    for level in levels:
        x = torch.randn(shape).requires_grad_()
        grads = torch.autograd.grad(cross_entropy(x, target, **options), x)[0].movedim(1, -1).reshape(-1, shape[1])
        assert (grads[target.reshape(-1) == -100] == 0).all(), level


@pytest.mark.parametrize("shape", [(1,), (9,), (4, 9), (2, 9, 3), (2, 9, 3, 5), (2, 9, 2, 3, 4), (2, 9, 0), (0, 9, 2)], ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("probs", [False, True], ids=["labels", "probs"])
def test_shapes(shape, reduction, probs, library):
    x, rows = torch.randn(shape, requires_grad=True), shape[:0] if len(shape) == 1 else (shape[0], *shape[2:])
    target = torch.rand(shape, requires_grad=True) if probs else torch.randint(0, shape[min(1, len(shape) - 1)], rows)
    ours, theirs = (f(x, target, reduction=reduction) for f in (cross_entropy, F.cross_entropy))
    torch.testing.assert_close(ours, theirs, equal_nan=True)
    leaves = [x, target] if probs else [x]
    dloss = torch.randn(theirs.shape)
    for a, b in zip(torch.autograd.grad(ours, leaves, dloss), torch.autograd.grad(theirs, leaves, dloss), strict=True):
        torch.testing.assert_close(a, b)


def test_layouts_are_not_copied(library, monkeypatch):
    """An image's logits, as they come from a convolution in either memory format, reach the kernel where they lie."""
    ops = sys.modules[cross_entropy.__module__]
    seen, kernel = [], ops._fwd
    monkeypatch.setattr(ops, "_fwd", lambda x, *args: seen.append(x.data_ptr()) or kernel(x, *args))
    x, target = torch.randn(2, 9, 8, 8), torch.randint(0, 9, (2, 8, 8))
    for image in (x, x.to(memory_format=torch.channels_last), torch.randn(2, 8, 8, 9).movedim(-1, 1)):
        torch.testing.assert_close(cross_entropy(image, target), F.cross_entropy(image, target))
        assert seen.pop() == image.data_ptr()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_probabilities_of_another_dtype(dtype, library):
    x = make(6, 11, dtype=dtype)[0]
    for kind in DTYPES:
        target = torch.rand(6, 11).to(kind)
        actual = cross_entropy(x, target)
        torch.testing.assert_close(actual, F.cross_entropy(x.float(), target.float()))


def test_the_gradient_of_probabilities(library):
    x, target = make(6, 11, probs=True)
    weight, inputs = torch.rand(11) + 0.5, [t.requires_grad_() for t in (x, target)]
    options = dict(label_smoothing=0.1, softcap=5.0, logit_scale=1.3, z_loss=0.01)
    loss = formula(*inputs, weight=weight, **options)
    expected = torch.autograd.grad(loss * 3, inputs)
    for a, b in zip(torch.autograd.grad(cross_entropy(*inputs, weight, **options) * 3, inputs), expected, strict=True):
        torch.testing.assert_close(a, b)
    (alone,) = torch.autograd.grad(cross_entropy(x.detach(), target, weight, **options) * 3, target)
    torch.testing.assert_close(alone, expected[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_pytorchs_own_samples(dtype, library):
    assert check_samples(cross_entropy, F.cross_entropy, dtype) > 15


@pytest.mark.parametrize("shape", [(4, 9), (2, 9, 37)], ids=["rows", "positions"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_ignored_row_may_hold_anything(dtype, shape, levels):
    x, target = make(*shape, dtype=dtype)
    rows = x if x.dim() == 2 else x[0].T
    rows[1] = torch.tensor([float("nan"), float("inf"), float("-inf")] * 3)
    x.requires_grad_()
    for level in levels:
        loss = cross_entropy(x, target)
        (dx,) = torch.autograd.grad(loss, x)
        assert loss.isfinite() and ((dx if dx.dim() == 2 else dx[0].T)[1] == 0).all() and dx.isfinite().all(), level


@pytest.mark.parametrize("early", [True, False])  # both ways to the gradient
def test_huge_logits(early, library):
    x = torch.tensor([[2.0**24, 2.0**24], [1e30, -1e30], [float("-inf"), 0.0]], requires_grad=True)
    target = torch.tensor([0, 0, 1])
    loss = cross_entropy(x, target, reduction="sum" if early else "none")
    (dx,) = torch.autograd.grad(loss.sum(), x)
    torch.testing.assert_close(loss.sum(), torch.tensor(2.0).log())
    torch.testing.assert_close(dx, torch.tensor([[-0.5, 0.5], [0.0, 0.0], [0.0, 0.0]]))


@pytest.mark.parametrize("layout", ["rows", "positions"])
def test_infinities_as_in_pytorch(layout, levels):
    inf, nan = float("inf"), float("nan")
    x, target = torch.tensor([[-inf, 0.0], [inf, 0.0], [-inf, -inf], [0.0, nan], [nan, 0.0]]), torch.tensor([0, 0, 1, 0, 1])
    if layout == "positions":
        x, target = x.T.repeat(1, 7)[None], target.repeat(7)[None]
    for level in levels:
        ours, theirs = (f(x, target, reduction="none") for f in (cross_entropy, F.cross_entropy))
        torch.testing.assert_close(ours, theirs, equal_nan=True, msg=lambda text, level=level: f"{level}: {text}")


def test_the_true_class_of_a_certain_row(library):
    """bf16 at p >= 0.999: formed in fp32 and rounded once; subtracting 1 from a stored bf16 probability would give 0."""
    x = torch.zeros(1, 8, dtype=torch.bfloat16)
    x[0, 3] = 9.5
    (dx,) = torch.autograd.grad(cross_entropy(x.requires_grad_(), torch.tensor([3])), x)
    p = x.detach().double().softmax(-1)[0, 3]
    assert p > 0.999 and abs(dx[0, 3].double() - (p - 1)) <= 2**-8 * (1 - p)


def test_loss_of_16_bit_logits_is_fp32(library):
    x, target = make(4, 9, dtype=torch.bfloat16)
    assert cross_entropy(x, target).dtype == torch.float32


@pytest.mark.parametrize("upstream", ["expanded", "uneven"])
def test_upstream_gradients_of_none(upstream, library):
    x, target = make(6, 11)
    dloss = torch.ones(()).expand(6) if upstream == "expanded" else torch.randn(12)[::2]
    ours = grad_of(lambda x: cross_entropy(x, target, reduction="none"), x, dloss)
    torch.testing.assert_close(ours, grad_of(lambda x: F.cross_entropy(x, target, reduction="none"), x, dloss))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])  # float16 never takes the early gradient
def test_a_second_backward_changes_nothing_given_before(dtype, library):
    x, target = make(6, 11, dtype=dtype)
    x.requires_grad_()
    loss = cross_entropy(x, target)
    (first,) = torch.autograd.grad(loss, x, retain_graph=True)
    kept = first.clone()
    (second,) = torch.autograd.grad(loss * 3, x)
    torch.testing.assert_close(second, kept * 3)
    assert torch.equal(first, kept) and second.data_ptr() != first.data_ptr()


def test_float16_under_a_loss_scale(library):
    """A gradient of 1 / 20000 times p is lost to float16 before the scale comes, unless the scale comes first."""
    x, target = torch.zeros(20000, 100, dtype=torch.float16, requires_grad=True), torch.zeros(20000, dtype=torch.int64)
    (dx,) = torch.autograd.grad(cross_entropy(x, target) * 65536.0, x)
    torch.testing.assert_close(dx[:, 1:].double(), torch.full((20000, 99), 65536 / 20000 / 100).double(), rtol=1e-3, atol=0)


def test_input_is_not_changed(library):
    x, target = make(6, 11)
    before = x.clone()
    grad_of(lambda x: cross_entropy(x, target), x, torch.tensor(2.0))
    leaf = x.requires_grad_()
    cross_entropy(leaf, target).backward()
    assert torch.equal(x.detach(), before)


# token_logprobs


@pytest.mark.parametrize("shape", [(7,), (5, 7), (2, 3, 7), (0, 7), (70, 7)], ids=str)
def test_token_logprobs(shape, library):
    x, target = torch.randn(shape, requires_grad=True), torch.randint(0, 7, shape[:-1])
    (logprob, entropy, argmax), lse = token_logprobs(x, target, return_lse=True)
    ours, logp = (logprob, entropy, lse), x.log_softmax(-1)
    expected = logp.gather(-1, target[..., None])[..., 0], -(logp.exp() * logp).sum(-1), x.logsumexp(-1)
    assert torch.equal(argmax, x.argmax(-1))
    upstream = torch.randn(3, *shape[:-1])
    for which in ([0], [1], [2], [0, 1, 2]):  # each gradient alone, and all
        dloss = [upstream[i] for i in which]
        grads = [torch.autograd.grad([results[i] for i in which], x, dloss, retain_graph=True)[0] for results in (ours, expected)]
        torch.testing.assert_close(*grads)
    torch.testing.assert_close(ours, expected)
    for a, b in zip(token_logprobs(x, target), (logprob, entropy, argmax), strict=True):
        assert torch.equal(a, b)


def test_token_logprobs_of_rows_that_are_ignored_or_masked(library):
    x, target = make(4, 9)
    x[1] = math.nan
    x[2, 1:] = -math.inf  # one class is sure
    target[2] = 0
    x.requires_grad_()
    result, lse = token_logprobs(x, target, return_lse=True)
    (dx,) = torch.autograd.grad(result.logprob.sum() + result.entropy.sum() + lse.sum(), x)
    assert result.logprob[1] == 0 and result.entropy[1] == 0 and lse[1] == 0 and result.argmax[1] == -1 and (dx[1] == 0).all()
    assert result.logprob[2] == 0 and result.entropy[2] == 0 and lse[2] == x[2, 0] and dx[2].tolist() == [1] + [0] * 8


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("classes", [1, 2, 16, 17, 128, 129])
def test_token_logprobs_of_few_classes(classes, dtype, levels):
    """Rows that are taken many at a time, and the first that are not: equals, masked classes, and ignored rows, which hold NaN."""
    x = torch.randn(75, classes).mul_(4).round_()  # the first of equals is the most probable
    x[:, 1:][torch.rand(75, classes - 1) < 0.3] = -math.inf
    x, target = x.to(dtype), torch.randint(classes, (75,))
    exact = x.double().log_softmax(-1)
    logprob, entropy = exact.gather(-1, target[:, None])[:, 0], -(exact.exp() * exact).nan_to_num().sum(-1)
    ignored = torch.rand(75) < 0.2
    x[ignored], target[ignored] = math.nan, -100
    for _ in levels:
        found = token_logprobs(x, target)
        assert torch.equal(found.argmax, torch.where(ignored, -1, exact.argmax(-1)))
        torch.testing.assert_close(found.logprob.double(), logprob.masked_fill(ignored, 0), rtol=5e-7, atol=5e-7)
        torch.testing.assert_close(found.entropy.double(), entropy.masked_fill(ignored, 0), rtol=5e-7, atol=5e-7)


def test_entropy_where_the_maximum_jumps_by_more_than_a_float_holds(library):
    x = torch.full((1, 5000), -3e38)
    x[0, 4000] = 3e38
    assert token_logprobs(x, torch.tensor([4000]))[:2] == (0, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_maximum_that_rises_along_the_row(dtype, levels):
    """By less, or more, than a block's may stand above those before it: the loss, the entropy and the gradient of fp64."""
    steps = torch.cat([torch.linspace(0, 48, 97), torch.tensor([-1e4, -30.0, 1e4])])
    x = torch.randn(len(steps), 9000).sub_(20)
    for k, column in enumerate((100, 2500, 5000, 8999)):  # each in a block of its own, the last in what is left of one
        x[:, column] = k * steps
    x, target = x.to(dtype), torch.full((len(steps),), 8999)
    exact = x.double().requires_grad_()
    losses = F.cross_entropy(exact, target, reduction="none")
    losses.sum().backward()
    logp = exact.detach().log_softmax(1)
    entropy = -(logp.exp() * logp).nan_to_num().sum(1)
    for _ in levels:
        leaf = x.clone().requires_grad_()
        found = cross_entropy(leaf, target, reduction="none")
        found.sum().backward()
        assert (found >= 0).all()
        torch.testing.assert_close(found.double(), losses.detach(), rtol=1e-6, atol=2e-7)  # d is 1 and more
        tolerance = dict(rtol=4e-6, atol=1.2e-7) if dtype == torch.float32 else dict(rtol=2**-8, atol=1.2e-7)
        torch.testing.assert_close(leaf.grad.double(), exact.grad, **tolerance)
        torch.testing.assert_close(cross_entropy(leaf, target, reduction="sum").double(), losses.sum().detach())
        torch.testing.assert_close(token_logprobs(x, target).entropy.double(), entropy, rtol=1e-5, atol=1e-6)


def test_the_argmax_where_subnormals_count_as_0(levels):
    """Of float16, whose subnormals are normal as floats."""
    x = torch.zeros(2, 100, dtype=torch.float16)
    x[0, 3] = x[1, 99] = 1e-6
    torch.set_flush_denormal(True)
    try:
        for _ in levels:
            assert token_logprobs(x, torch.zeros(2, dtype=torch.int64)).argmax.tolist() == [3, 99]
    finally:
        torch.set_flush_denormal(False)


def test_the_first_of_equal_classes_is_the_argmax(library):
    x = torch.zeros(3, 5000)
    x[1, [4000, 4999]] = 1
    assert token_logprobs(x, torch.zeros(3, dtype=torch.int64)).argmax.tolist() == [0, 4000, 0]
