"""The softmax losses as PyTorch sees them: gradcheck, compile, export, transforms, autocast; and their errors."""

import re

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.library import opcheck

from cross_entropy_cases import OPTIONS, REDUCTIONS, grad_of, grads_of, lay_out, make
from minkernels import cross_entropy, linear_cross_entropy, modules, token_logprobs
from minkernels.cross_entropy import reference
from minkernels.cross_entropy._options import Options

EVERYTHING = dict(label_smoothing=0.1, z_loss=0.01, softcap=5.0, logit_scale=1.2)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("probs", [False, True], ids=["labels", "probs"])
def test_gradcheck(reduction, probs, library):
    x, target = make(5, 9, dtype=torch.float64, probs=probs)
    weight = torch.rand(9, dtype=torch.float64)
    inputs = [t.requires_grad_() for t in ((x, target) if probs else (x,))]
    for options in ({}, dict(weight=weight, **EVERYTHING)):
        assert torch.autograd.gradcheck(lambda *t: cross_entropy(*(t if probs else (*t, target)), reduction=reduction, **options), inputs)  # noqa: B023


def test_a_second_derivative_of_probabilities_raises(library):
    x, target = (t.requires_grad_() for t in make(3, 4, probs=True))
    (dtarget,) = torch.autograd.grad(cross_entropy(x, target), target, create_graph=True)
    with pytest.raises(RuntimeError, match="has no derivative"):
        torch.autograd.grad(dtarget.square().sum(), x)


@pytest.mark.parametrize("upstream", [torch.inf, torch.nan])
def test_ignored_rows_have_no_gradient_whatever_comes_from_above(upstream, library):
    x, target = torch.randn(2, 3, requires_grad=True), torch.tensor([0, -100])
    W = torch.randn(3, 3, requires_grad=True)
    for loss in (cross_entropy(x, target), linear_cross_entropy(x, W, target)):
        for _ in range(2):
            (dx,) = torch.autograd.grad(loss, x, torch.tensor(upstream), retain_graph=True)
            assert (dx[1] == 0).all() and not dx[0].isfinite().all()


@pytest.mark.parametrize("name", ["z_loss", "logit_scale"])
def test_numbers_are_numbers_in_the_usual_call_too(name, library):
    x, target = make(3, 4)
    for value in (torch.tensor(float(name != "z_loss"), requires_grad=True), name != "z_loss", torch.zeros(2)):
        with pytest.raises(TypeError, match=f"{name} must be a number, got"):
            cross_entropy(x, target, **{name: value})


def test_options_of_modules_are_attributes(library):
    x, target = make(3, 4)
    module = modules.CrossEntropyLoss(ignore_index=-100)
    module.reduction = "none"
    assert module.ignore_index == -100 and module(x, target).shape == (3,)


def test_gradcheck_of_logprobs(library):
    x, target = make(5, 9, dtype=torch.float64)

    def floats(x):
        result, lse = token_logprobs(x, target, softcap=5.0, logit_scale=1.2, return_lse=True)
        return *result[:2], lse

    assert torch.autograd.gradcheck(floats, (x.requires_grad_(),))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("layout", ["rows", "columns", "channels-last"])
@pytest.mark.parametrize("name", ["plain", "all", "probs-all"])
def test_registration(reduction, layout, name, device):
    x, target = (t.to(device) for t in make(5, 9, *([4] if layout == "channels-last" else []), probs="probs" in name))
    x, weight = lay_out(x, layout), torch.rand(9, device=device) if OPTIONS[name].get("weight") else None
    options = Options(**{k: v for k, v in OPTIONS[name].items() if k not in ("weight", "probs")})
    ops = torch.ops.minkernels
    opcheck(ops.cross_entropy_fwd.default, (x, target, weight, *options, reduction, True, reduction != "none"))
    opcheck(ops.softmax_grad.default, (x, target, weight, torch.rand(x[:, 0].numel(), 5, device=device), *options))
    if "probs" not in name:
        opcheck(ops.softmax_stats.default, (x, target, weight, *options, False, True))
        opcheck(ops.softmax_stats.default, (x, target, weight, *options, True, False))
    opcheck(ops.scale_.default, (x.clone(), torch.tensor(2.0, device=device)))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_compile(backend, reduction, library):
    def step(x, target):
        return (cross_entropy(x * 2, target, reduction=reduction) * 0.5).sum()

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=backend)
    for N in (6, 9):
        x, target = make(N, 11)
        ours = grad_of(lambda x: compiled(x, target), x, torch.ones(()))  # noqa: B023
        torch.testing.assert_close(ours, grad_of(lambda x: step(x, target), x, torch.ones(())))  # noqa: B023


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_options(backend, library):
    weight = torch.rand(11)

    def step(x, probs, target):
        loss = cross_entropy(x * 2, target, weight, **EVERYTHING)
        loss = loss + cross_entropy(*(t[..., None].expand(-1, -1, 3) for t in (x, probs)))
        return loss + sum(t.sum() for t in token_logprobs(x, target)[:2])

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=backend)
    for N in (6, 9):
        x, target = make(N, 11)
        probs = torch.rand(N, 11)
        ours, theirs = (grads_of(lambda x, p: f(x, p, target), (x, probs), torch.ones(())) for f in (compiled, step))  # noqa: B023
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b)


def test_a_backward_may_be_traced(library):
    """No value of an upstream gradient is asked for where there is none."""

    def step(x, target):
        x = x.detach().requires_grad_()
        return torch.autograd.grad(cross_entropy(x, target), x)[0]

    x, target = make(6, 11)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert step(mode.from_tensor(x), mode.from_tensor(target)).shape == x.shape
    torch.testing.assert_close(make_fx(step)(x, target)(x * 2, target), step(x * 2, target))


def test_export(library):
    class Loss(torch.nn.Module):
        def forward(self, x, target):
            return cross_entropy(x, target, label_smoothing=0.1), *token_logprobs(x, target)

    x, target = make(6, 11)
    exported = torch.export.export(Loss(), (x, target), dynamic_shapes=({0: torch.export.Dim.AUTO}, {0: torch.export.Dim.AUTO}))
    for N in (6, 9):
        args = make(N, 11)
        for a, b in zip(exported.module()(*args), Loss()(*args), strict=True):
            torch.testing.assert_close(a, b)


def test_autocast_does_not_cast(library):
    x, target = make(4, 9)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(cross_entropy(x, target), cross_entropy(x.clone(), target))
        assert cross_entropy(x, target).dtype == torch.float32


def test_functional_transforms(library):
    x, target = make(4, 9)
    expected = grad_of(lambda x: F.cross_entropy(x, target), x, torch.ones(()))
    torch.testing.assert_close(torch.func.grad(lambda x: cross_entropy(x, target))(x), expected)
    rows = torch.func.vmap(torch.func.grad(lambda x, t: cross_entropy(x[None], t[None])))(x, target)
    torch.testing.assert_close(rows[0], grad_of(lambda x: F.cross_entropy(x, target[:1]), x[:1], torch.ones(()))[0])


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_second_derivative_raises(reduction, library):
    x, target = make(3, 5)
    x.requires_grad_()
    (dx,) = torch.autograd.grad(cross_entropy(x, target, reduction=reduction).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives are not implemented"):
        (dx.sum() + x.sum()).backward()


def test_vmap_inside_autograd(library):
    (x, target), layer = make(6, 9), torch.nn.Linear(9, 9)
    for loss in (cross_entropy, lambda x, t: linear_cross_entropy(x, torch.eye(9), t)):
        ours = torch.func.vmap(loss)(layer(x).view(3, 2, 9), target.view(3, 2)).sum()
        theirs = torch.func.vmap(F.cross_entropy)(layer(x).view(3, 2, 9), target.view(3, 2)).sum()
        for a, b in zip(*(torch.autograd.grad(loss, layer.weight) for loss in (ours, theirs)), strict=True):
            torch.testing.assert_close(a, b)


def test_batched_upstream_gradients(library):
    x, target = make(4, 9)
    x.requires_grad_()
    losses = (f(x, target) for f in (cross_entropy, F.cross_entropy))
    ours, theirs = (torch.autograd.grad(loss, x, torch.arange(3.0), is_grads_batched=True)[0] for loss in losses)
    torch.testing.assert_close(ours, theirs)


X, Y = torch.zeros(4, 7), torch.zeros(4, dtype=torch.int64)
P = torch.zeros(4, 7)
BAD = {
    "not a tensor": (dict(input=[1.0]), TypeError, "input must be a tensor, got list"),
    "nested": (dict(input=torch.nested.as_nested_tensor([X])), TypeError, "input must be a dense tensor, got a nested one"),
    "sparse": (dict(input=X.to_sparse()), TypeError, "input must be a dense tensor, got one of layout torch.sparse_coo"),
    "rank": (dict(input=X[0, 0]), ValueError, "input must have a dimension of classes, got a scalar"),
    "dtype": (dict(input=X.int()), TypeError, "input must be float16, bfloat16, float32 or float64, got torch.int32"),
    "no classes": (dict(input=X[:, :0]), ValueError, "input must have at least one class, got shape (4, 0)"),
    "target dtype": (dict(target=Y.short()), TypeError, "int64, int32 or uint8 labels, or probabilities of a float dtype, got torch.int16"),
    "target bool": (dict(target=Y.bool()), TypeError, "int64, int32 or uint8 labels, or probabilities of a float dtype, got torch.bool"),
    "target shape": (dict(target=Y[:3]), ValueError, "target must be (4,) labels to fit input (4, 7), got (3,)"),
    "float labels": (dict(target=Y.float()), ValueError, "target must be (4, 7) probabilities to fit input (4, 7), got (4,)"),
    "int probabilities": (dict(target=P.long()), ValueError, "target must be (4,) labels to fit input (4, 7), got (4, 7)"),
    "device": (dict(target=Y.to("meta")), TypeError, "target is on meta, but input is on cpu"),
    "large ignore_index": (dict(ignore_index=2**63), ValueError, "ignore_index must fit 64 bits, got an int of 65"),
    "ignore_index": (dict(ignore_index=0.5), TypeError, "ignore_index must be an int, got 0.5"),
    "ignored probabilities": (
        dict(target=P, ignore_index=3),
        ValueError,
        "ignore_index is for labels, and target is torch.float32 probabilities: got ignore_index=3",
    ),
    "reduction": (dict(reduction="avg"), ValueError, "reduction must be one of none, mean, sum, got 'avg'"),
    "empty": (dict(empty="0"), ValueError, "empty must be one of nan, zero, got '0'"),
    "weight": (dict(weight=torch.ones(6)), ValueError, "weight must be (V=7,), got (6,)"),
    "sparse weight": (dict(weight=torch.ones(7).to_sparse()), TypeError, "weight must be a dense tensor, got one of layout"),
    "weight dtype": (dict(weight=torch.ones(7).int()), TypeError, "weight must be float16, bfloat16, float32 or float64, got torch.int32"),
    "weight grad": (dict(weight=torch.ones(7, requires_grad=True)), ValueError, "weight requires a gradient, and there is none for it"),
    "weight device": (dict(weight=torch.ones(7, device="meta")), TypeError, "weight is on meta, but input is on cpu"),
    "smoothing": (dict(label_smoothing=1.5), ValueError, "label_smoothing must be 0 to 1, got 1.5"),
    "softcap": (dict(softcap=0.0), ValueError, "softcap must be positive, got 0.0"),
    "scale": (dict(logit_scale=float("nan")), ValueError, "logit_scale must be finite, got nan"),
    "z_loss": (dict(z_loss="1"), TypeError, "z_loss must be a number, got '1'"),
    "label too large": (dict(target=Y + torch.tensor([0, 0, 7, 9])), IndexError, "target[2] is 7, out of range for 7 classes (0 to 6)"),
    "negative label": (dict(target=Y - torch.tensor([0, 3, 0, 0])), IndexError, "target[1] is -3, out of range for 7 classes (0 to 6)"),
    "one label": (dict(input=X[0], target=Y[0] + 8), IndexError, "target is 8, out of range for 7 classes (0 to 6)"),
    "label in an image": (
        dict(input=torch.zeros(1, 7, 2, 3), target=torch.tensor([[[0, 0, 0], [0, 9, 0]]])),
        IndexError,
        "target[0, 1, 1] is 9, out of range for 7 classes (0 to 6)",
    ),
}


@pytest.mark.parametrize("change, error, message", BAD.values(), ids=BAD)
@pytest.mark.parametrize("grad", [False, True])
def test_bad_input(change, error, message, grad, library):
    good = dict(input=X.clone().requires_grad_(grad), target=Y)
    cross_entropy(**good)
    with pytest.raises(error, match=re.escape(message)):
        cross_entropy(**good | change)
    if error is IndexError and "input" not in change:
        with pytest.raises(error, match=re.escape(message)):
            reference.fwd(X, change["target"], None, *Options(), "mean", False, False)


def test_a_weight_may_require_a_gradient_where_nothing_has_one(library):
    x, weight = torch.randn(4, 7), torch.rand(7, requires_grad=True)
    with torch.no_grad():
        torch.testing.assert_close(cross_entropy(x, Y, weight), F.cross_entropy(x, Y, weight))


@pytest.mark.parametrize(
    "args, error, message",
    [
        ((X, Y[:3]), ValueError, "target must be (4,) labels to fit input (4, 7), got (3,)"),
        ((X, P), TypeError, "target must be int64, int32 or uint8 labels, got torch.float32"),
        ((X, Y + 7), IndexError, "target[0] is 7, out of range for 7 classes (0 to 6)"),
        ((X[0, 0], Y), ValueError, "input must have at least one class in its last dimension, got shape ()"),
    ],
)
def test_bad_input_of_logprobs(args, error, message, library):
    with pytest.raises(error, match=re.escape(message)):
        token_logprobs(*args)
