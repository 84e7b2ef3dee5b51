"""cross_entropy: the reference against PyTorch, the C++ kernels against the reference at every level, and the public op's promises."""

import re

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.library import opcheck

from judge import assert_close
from minkernels import cross_entropy
from minkernels.cross_entropy import reference

SHAPES = {  # N rows, V classes; the C++ kernel works on blocks of 2048 columns, four registers at a time, and on groups of short rows
    "one-class": (4, 1),
    "two": (3, 2),
    "ragged": (5, 31),  # less than a register's step
    "one-block": (4, 2048),
    "block-and-one": (3, 2049),
    "gpt2": (2, 50257),
    "many-short": (3000, 27),  # rows go in groups: three tasks
    "no-rows": (0, 7),
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
REDUCTIONS = ["none", "mean", "sum"]


def make(N, V, dtype=torch.float32, ignored=True):
    x, target = (3 * torch.randn(N, V)).to(dtype), torch.randint(0, V, (N,))
    if ignored and N > 1:
        target[1] = -100
    return x, target


def grad_of(function, x, dloss):
    x = x.detach().clone().requires_grad_()
    return torch.autograd.grad(function(x), x, dloss)[0]


def check_cpu(levels, x, target, reduction):
    """The C++ kernels' loss and both gradients, the early one and the recomputed one, against fp64."""
    from minkernels.cross_entropy import _cpu

    dtype, wide, N = x.dtype, torch.promote_types(x.dtype, torch.float32), len(x)
    dloss = torch.rand(N if reduction == "none" else ()).to(wide) - 0.3
    exact = F.cross_entropy(x.double(), target.long(), reduction=reduction)
    plain = F.cross_entropy(x.to(wide), target.long(), reduction=reduction)  # the loss of 16-bit logits is judged as fp32
    upstreams = {"recomputed grad": dloss} if reduction == "none" else {"early grad": torch.ones_like(dloss), "recomputed grad": dloss}
    for level in levels:
        loss, stats, early = _cpu.fwd(x, target, -100, reduction, reduction != "none")
        assert_close(loss, plain, exact, wide, f"{level} loss")
        for what, upstream in upstreams.items():
            grad = early if what == "early grad" else _cpu.bwd(upstream, x, target, stats, -100, reduction)
            exact_grad = grad_of(lambda x: F.cross_entropy(x, target.long(), reduction=reduction), x.double(), upstream.double())
            plain_grad = grad_of(lambda x: F.cross_entropy(x, target.long(), reduction=reduction), x, upstream.to(dtype))
            assert_close(grad, plain_grad, exact_grad, dtype, f"{level} {what}")


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_reference(shape, reduction):
    x, target = make(*shape, torch.float64)
    loss, stats, early = reference.fwd(x, target, -100, reduction, True)
    torch.testing.assert_close(loss, F.cross_entropy(x, target, reduction=reduction), equal_nan=True)
    dloss = torch.randn(loss.shape, dtype=torch.float64)
    for grad, upstream in ((early, torch.ones_like(loss)), (reference.bwd(dloss, x, target, stats, -100, reduction), dloss)):
        torch.testing.assert_close(grad, grad_of(lambda x: F.cross_entropy(x, target, reduction=reduction), x, upstream))


@pytest.mark.parametrize("shape", [s for s in SHAPES.values() if s[0]], ids=[name for name, s in SHAPES.items() if s[0]])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cpu(shape, reduction, dtype, levels):
    check_cpu(levels, *make(*shape, dtype), reduction)


@settings(max_examples=200, derandomize=True, deadline=None)
@given(
    N=st.integers(1, 40), V=st.integers(1, 5000), dtype=st.sampled_from(DTYPES), reduction=st.sampled_from(REDUCTIONS),
    layout=st.sampled_from(["rows", "columns", "slice", "expanded"]), index=st.sampled_from([torch.int64, torch.int32]),
    seed=st.integers(0, 2**31),
)  # fmt: skip
def test_cpu_fuzz(library, N, V, dtype, reduction, layout, index, seed):
    torch.manual_seed(seed)
    x, target = make(N, V, dtype)
    if layout == "columns":
        x = x.t().contiguous().t()
    elif layout == "slice":  # a padded vocabulary: the row stride is not V
        x = torch.full((N, V + 13), float("nan"), dtype=dtype)[:, 5 : V + 5].copy_(x)
    elif layout == "expanded":
        x = x[:1].expand(N, V)
    check_cpu(["best"], x, target.to(index), reduction)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cpu_same_bits_for_any_number_of_threads(dtype, library):
    x, target = make(500, 300, dtype)
    threads, results = torch.get_num_threads(), []
    try:
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            leaf = x.clone().requires_grad_()
            loss = cross_entropy(leaf, target)
            results.append((loss, *torch.autograd.grad(loss, leaf)))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


# Semantics


def test_all_ignored_is_nan_like_pytorch_and_the_gradient_zero(library):
    x, target = make(3, 5)
    x.requires_grad_()
    target[:] = -100
    loss = cross_entropy(x, target)
    assert loss.isnan() and (torch.autograd.grad(loss, x)[0] == 0).all()
    assert cross_entropy(x, target, reduction="sum") == 0 and (cross_entropy(x, target, reduction="none") == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_ignored_row_may_hold_anything(dtype, library):
    x, target = make(4, 9, dtype)
    x[1] = torch.tensor([float("nan"), float("inf"), float("-inf")] * 3)
    x.requires_grad_()
    loss = cross_entropy(x, target)
    (dx,) = torch.autograd.grad(loss, x)
    assert loss.isfinite() and (dx[1] == 0).all() and dx.isfinite().all()


@pytest.mark.parametrize("early", [True, False])  # both ways to the gradient
def test_huge_logits(early, library):
    x = torch.tensor([[2.0**24, 2.0**24], [1e30, -1e30], [float("-inf"), 0.0]], requires_grad=True)
    target = torch.tensor([0, 0, 1])
    loss = cross_entropy(x, target, reduction="sum" if early else "none")
    (dx,) = torch.autograd.grad(loss.sum(), x)
    torch.testing.assert_close(loss.sum(), torch.tensor(2.0).log())
    torch.testing.assert_close(dx, torch.tensor([[-0.5, 0.5], [0.0, 0.0], [0.0, 0.0]]))


def test_infinities_as_in_pytorch(library):
    inf = float("inf")
    x, target = torch.tensor([[-inf, 0.0], [inf, 0.0], [-inf, -inf], [0.0, float("nan")]]), torch.tensor([0, 0, 1, 0])
    torch.testing.assert_close(
        cross_entropy(x, target, reduction="none"), F.cross_entropy(x, target, reduction="none"), equal_nan=True
    )


def test_the_true_class_of_a_certain_row(library):
    """bf16 at p >= 0.999: formed in fp32 and rounded once; subtracting 1 from a stored bf16 probability would give 0."""
    x = torch.zeros(1, 8, dtype=torch.bfloat16)
    x[0, 3] = 9.5
    (dx,) = torch.autograd.grad(cross_entropy(x.requires_grad_(), torch.tensor([3])), x)
    p = x.detach().double().softmax(-1)[0, 3]
    assert p > 0.999 and abs(dx[0, 3].double() - (p - 1)) <= 2**-8 * (1 - p)


def test_loss_of_16_bit_logits_is_fp32(library):
    x, target = make(4, 9, torch.bfloat16)
    assert cross_entropy(x, target).dtype == torch.float32


@pytest.mark.parametrize("upstream", ["expanded", "uneven"])
def test_upstream_gradients_of_none(upstream, library):
    x, target = make(6, 11)
    dloss = torch.ones(()).expand(6) if upstream == "expanded" else torch.randn(12)[::2]
    ours = grad_of(lambda x: cross_entropy(x, target, reduction="none"), x, dloss)
    torch.testing.assert_close(ours, grad_of(lambda x: F.cross_entropy(x, target, reduction="none"), x, dloss))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])  # float16 never takes the early gradient
def test_a_second_backward_changes_nothing_given_before(dtype, library):
    x, target = make(6, 11, dtype)
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


# The public op under PyTorch's machinery.


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradcheck(reduction, library):
    x, target = make(5, 9, torch.float64)
    assert torch.autograd.gradcheck(lambda x: cross_entropy(x, target, reduction=reduction), (x.requires_grad_(),))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("permuted", [False, True], ids=["contiguous", "permuted"])
def test_registration(reduction, permuted, device):
    x, target = (t.to(device) for t in make(5, 9))
    x = x.t().contiguous().t() if permuted else x
    ops = torch.ops.minkernels
    opcheck(ops.cross_entropy_fwd.default, (x, target, -100, reduction, reduction != "none"))
    loss, stats, _ = ops.cross_entropy_fwd(x, target, -100, reduction, False)
    opcheck(ops.cross_entropy_bwd.default, (torch.randn_like(loss), x, target, stats, -100, reduction))
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


def test_functional_transforms(library):
    x, target = make(4, 9)
    expected = grad_of(lambda x: F.cross_entropy(x, target), x, torch.ones(()))
    torch.testing.assert_close(torch.func.grad(lambda x: cross_entropy(x, target))(x), expected)
    rows = torch.func.vmap(torch.func.grad(lambda x, t: cross_entropy(x[None], t[None])))(x, target)
    torch.testing.assert_close(rows[0], grad_of(lambda x: F.cross_entropy(x, target[:1]), x[:1], torch.ones(()))[0])


def test_second_derivative_raises(library):
    x, target = make(3, 5)
    x.requires_grad_()
    (dx,) = torch.autograd.grad(cross_entropy(x, target, reduction="none").sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives are not implemented"):
        (dx.sum() + x.sum()).backward()


X, Y = torch.zeros(4, 7), torch.zeros(4, dtype=torch.int64)
BAD = {
    "not a tensor": (dict(input=[1.0]), TypeError, "input must be a tensor, got list"),
    "rank": (dict(input=X[0]), ValueError, "input must have 2 dimensions (rows, classes), got shape (7,)"),
    "dtype": (dict(input=X.int()), TypeError, "input must be float16, bfloat16, float32 or float64, got torch.int32"),
    "no classes": (dict(input=X[:, :0]), ValueError, "input must have at least one class, got shape (4, 0)"),
    "target dtype": (dict(target=Y.float()), TypeError, "target must be int64 or int32, got torch.float32"),
    "target shape": (dict(target=Y[:3]), ValueError, "target must be (N=4,) to fit input (4, 7), got (3,)"),
    "device": (dict(target=Y.to("meta")), TypeError, "target is on meta, but input is on cpu"),
    "ignore_index": (dict(ignore_index=0.5), TypeError, "ignore_index must be an int, got 0.5"),
    "reduction": (dict(reduction="avg"), ValueError, "reduction must be one of none, mean, sum, got 'avg'"),
    "label too large": (dict(target=Y + torch.tensor([0, 0, 7, 9])), IndexError, "target[2] is 7, out of range for 7 classes (0 to 6)"),
    "negative label": (dict(target=Y - torch.tensor([0, 3, 0, 0])), IndexError, "target[1] is -3, out of range for 7 classes (0 to 6)"),
}


@pytest.mark.parametrize("change, error, message", BAD.values(), ids=BAD)
@pytest.mark.parametrize("grad", [False, True])
def test_bad_input(change, error, message, grad, library):
    good = dict(input=X.clone().requires_grad_(grad), target=Y)
    cross_entropy(**good)
    with pytest.raises(error, match=re.escape(message)):
        cross_entropy(**good | change)
    if error is IndexError:
        with pytest.raises(error, match=re.escape(message)):
            reference.fwd(X, change["target"], -100, "mean", False)
