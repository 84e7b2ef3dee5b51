"""linear_cross_entropy: every road against fp64, the sums over chunks, and the public op's promises."""

import math
import re

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

from bench.timing import _second_call
from cross_entropy_cases import OPTIONS, REDUCTIONS, check_samples, formula, grads_of
from judge import assert_close
from minkernels import cross_entropy, linear_cross_entropy, linear_token_logprobs, modules, token_logprobs
from minkernels.cross_entropy._options import Options, coefficients
from minkernels.linear_cross_entropy import reference

SHAPES = {  # N rows, H features, V classes, positions, rows of a chunk
    "one-chunk": (9, 8, 31, (), 9),
    "chunks": (23, 16, 50, (), 5),  # the last is ragged
    "row-by-row": (7, 16, 33, (), 1),
    "many-classes": (6, 8, 5000, (), 2),  # the gradient of the weight is summed in two parts
    "positions": (6, 8, 9, (10,), 2),
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def make(N, H, V, positions, dtype=torch.float32, probs=False, ignored=True):
    tensors = torch.randn(N, H), torch.randn(V, *positions, H) * H**-0.5, torch.randn(V, *positions)
    target = torch.rand(N, V, *positions).to(dtype) if probs else torch.randint(0, V, (N, *positions))
    if ignored and not probs:
        target.view(-1)[1::3] = -100
        target[1:2] = -100  # at every position
    return [t.to(dtype) for t in tensors], target


def textbook(input, linear_weight, bias, target, wide=None, rounded_twice=True, **options):
    """wide: the dtype of what comes after the logits, where it is another; rounded_twice: before the bias is added too."""
    W, b = linear_weight.flatten(0, -2), bias.flatten()
    logits = (input @ W.T + b if rounded_twice else F.linear(input, W, b)).view(len(input), *linear_weight.shape[:-1])
    return formula(logits.to(wide or logits.dtype), target, **options)


def check(backend, shape, dtype, options, reduction, what):
    """Loss, and the gradients that the forward forms and that the backward does, with NaN in every ignored row of the input."""
    *sizes, rows = shape
    options, wide = dict(options), torch.promote_types(dtype, torch.float32)
    probs = options.pop("probs", False)
    (input, weight, bias), target = make(*sizes, dtype=dtype, probs=probs)
    class_weight = torch.rand(len(weight), dtype=wide) + 0.5 if options.pop("weight", False) else None
    x = Options(**options)
    spoilt = input if probs else input.masked_fill((target == -100).view(len(input), -1).all(1, keepdim=True), math.nan)
    dloss = (torch.rand(input[:, :0].shape[:1] + weight.shape[1:-1] if reduction == "none" else ()) - 0.3).to(wide)
    budget = rows * weight.shape[:-1].numel() * input.element_size()

    def loss(*leaves, **more):
        return textbook(*leaves, target, weight=class_weight, reduction=reduction, **x._asdict(), **more)

    early = reduction != "none"
    actual, stats, *grads = backend.fwd(spoilt, weight, target, bias, class_weight, *x, reduction, False, budget, early, early, early)
    leaves = input, weight, bias
    plain = [loss(*leaves, wide=wide, rounded_twice=twice) for twice in (True, False)]
    exact = loss(*(t.double() for t in leaves))
    assert_close(actual, plain, exact, wide, f"{what} loss", draws=2)
    k = coefficients(dloss, len(weight), target, class_weight, stats, x, reduction, False)
    both = {"early": (torch.ones_like(dloss), grads)} if early else {}
    both["recomputed"] = dloss, backend.grad(spoilt, weight, target, bias, class_weight, k, None, *x, budget, True, True, True)[:3]
    for name, (upstream, grads) in both.items():
        exact = grads_of(loss, [t.double() for t in leaves], upstream.double())
        plain = grads_of(loss, leaves, upstream.to(dtype))
        for leaf, g, p, e in zip(("input", "linear_weight", "linear_bias"), grads, plain, exact, strict=True):
            assert_close(g, p, e, dtype, f"{what} {name} gradient of {leaf}", draws=2)


@pytest.mark.parametrize("name", ["plain", "all", "probs-all"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_reference(shape, reduction, name):
    check(reference, shape, torch.float64, OPTIONS[name], reduction, "reference")
    check(reference, shape, torch.float32, OPTIONS[name], reduction, "reference")


@pytest.mark.parametrize("name", ["plain", "weighted-smoothing", "all", "probs-all"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cpu(shape, reduction, name, dtype, library, monkeypatch):
    """In 16 bits with both kinds of products, that of this CPU's instructions and that without any."""
    from minkernels.linear_cross_entropy import _cpu

    for product in {dtype, torch.promote_types(dtype, torch.float32)}:
        monkeypatch.setattr(_cpu, "multiplied", lambda _, product=product: product)
        check(_cpu, shape, dtype, OPTIONS[name], reduction, f"{dtype} multiplied in {product}")


@pytest.mark.parametrize("dtype", DTYPES[1:3], ids=str)
def test_no_product_in_16_bits_without_instructions_for_it(dtype, library, monkeypatch):
    """PyTorch would take minutes for what float32 does in a second."""
    from minkernels.linear_cross_entropy import _cpu

    class Products(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            if op.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
                seen.append(args[-1].dtype)
            return op(*args, **(kwargs or {}))

    (input, weight, bias), target = make(24, 8, 31, (), dtype=dtype, ignored=False)
    monkeypatch.setattr(_cpu, "multiplied", _cpu.multiplied.__wrapped__)  # without what it knows already
    for product, budget in ((dtype, 0), (torch.float32, 0), (torch.float32, 5 * 31 * 2)):  # one chunk, and several
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda native=product == dtype: native)
        for known in ("_is_mkldnn_bf16_supported", "_is_mkldnn_fp16_supported"):
            monkeypatch.setattr(torch.ops.mkldnn, known, lambda: True)
        seen = []
        with Products():
            _cpu.fwd(input, weight, target, bias, None, *Options(), "mean", False, budget, True, True, True)
        assert {*seen} == {product}


def test_products_of_bfloat16_are_summed_in_float32(library):
    """64 chunks whose products are all alike: bfloat16 sums would stop growing at 256 times the addend."""
    N, H, V = 512, 8, 4
    input, weight = torch.ones(N, H, dtype=torch.bfloat16), torch.zeros(V, H, dtype=torch.bfloat16, requires_grad=True)
    target = torch.zeros(N, dtype=torch.int64)
    loss = linear_cross_entropy(input, weight, target, reduction="sum", memory_budget=V * 2)  # a row a chunk
    (dweight,) = torch.autograd.grad(loss, weight)
    expected = torch.tensor([-0.75, 0.25, 0.25, 0.25])[:, None].expand(V, H) * N
    torch.testing.assert_close(dweight.float(), expected, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_bfloat16_sums_round_as_float32_does(dtype, library):
    """The sum kept in two halves is that of float32, bit for bit, infinities and NaN too."""
    parts = torch.randn(5, 40000, dtype=dtype) * torch.logspace(-3, 3, 5, dtype=dtype)[:, None]
    parts[1, :3] = torch.tensor([math.nan, math.inf, -math.inf])
    parts[2, 1] = -math.inf
    hi, lo = torch.empty(2, 40000, dtype=torch.bfloat16)
    for i, part in enumerate(parts):
        library._add_bfloat16(hi, lo, part, i == 0, i == 4)
    expected = torch.zeros(40000)
    for part in parts:
        expected += part
    torch.testing.assert_close(hi, expected.bfloat16(), rtol=0, atol=0, equal_nan=True)


def test_ignored_rows_are_not_multiplied(library):
    """Time cannot be tested, so the products' operands are: none has more rows than count."""
    from minkernels.linear_cross_entropy import _cpu

    (input, weight, _), target = make(50, 8, 31, ())
    target[10:] = -100
    seen = []

    class Rows(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            if op.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
                seen.append(max(args[-2].shape[0], 0))
            return op(*args, **(kwargs or {}))

    with Rows():
        _cpu.fwd(input, weight, target, None, None, *Options(), "mean", False, 0, True, False, False)
    assert seen and all(rows <= int((target != -100).sum()) for rows in seen)


def test_a_frozen_operand_costs_no_product(library):
    (input, weight, _), target = make(24, 8, 31, (), ignored=False)
    product = 2 * 24 * 8 * 31
    for grads, count in (((True, True), 3), ((True, False), 2), ((False, True), 2), ((False, False), 1)):
        leaves = [t.requires_grad_(wanted) for t, wanted in zip((input.clone(), weight.clone()), grads, strict=True)]
        with FlopCounterMode(display=False) as counter:
            linear_cross_entropy(*leaves, target)
        assert counter.get_total_flops() == count * product
        loss = linear_cross_entropy(*leaves, target)
        if any(grads):
            loss.backward()
        assert [t.grad is not None for t in leaves] == list(grads)


def test_the_logits_never_exist_whole(library):
    N, H, V = 4096, 8, 8192
    (input, weight, _), target = make(N, H, V, ())
    leaves = input.requires_grad_(), weight.requires_grad_()

    def peak(loss):
        return _second_call(lambda: torch.autograd.grad(loss(), leaves), "cpu")[1]

    if peak(lambda: (input @ weight.T).sum()) is None:
        pytest.skip("this system does not tell a process's peak memory")
    logits = N * V * 4
    assert peak(lambda: linear_cross_entropy(*leaves, target, memory_budget=logits // 16)) < logits // 4
    assert peak(lambda: F.cross_entropy(input @ weight.T, target)) > logits


# The public ops.


@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="torch 2.13 has it")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_pytorchs_own_samples(dtype, library):
    assert check_samples(linear_cross_entropy, F.linear_cross_entropy, dtype) > 50


@pytest.mark.parametrize("shape", [(8,), (5, 8), (2, 3, 8)], ids=str)
@pytest.mark.parametrize("probs", [False, True], ids=["labels", "probs"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_shapes(shape, probs, reduction, library):
    input, weight, V = torch.randn(shape), torch.randn(9, 8), 9
    target = torch.rand(*shape[:-1], V) if probs else torch.randint(0, V, shape[:-1])
    logits = (input @ weight.T).reshape(-1, V)
    expected = F.cross_entropy(logits, target.reshape(-1, V) if probs else target.reshape(-1), reduction=reduction)
    actual = linear_cross_entropy(input, weight, target, reduction=reduction)
    torch.testing.assert_close(actual, expected.reshape(shape[:-1]) if reduction == "none" else expected)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_all_ignored_and_no_rows(reduction, library):
    for N in (4, 0):
        (input, weight, _), target = make(N, 8, 9, ())
        target[:] = -100
        leaves = input.requires_grad_(), weight.requires_grad_()
        loss = linear_cross_entropy(*leaves, target, reduction=reduction)
        torch.testing.assert_close(loss, F.cross_entropy(input @ weight.T, target, reduction=reduction), equal_nan=True)
        for grad in torch.autograd.grad(loss, leaves, torch.ones_like(loss)):  # F.linear_cross_entropy in chunks gives NaN here
            assert (grad == 0).all()
    assert linear_cross_entropy(*leaves, target, empty="zero") == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_second_backward_changes_nothing_given_before(dtype, library):
    (input, weight, bias), target = make(6, 8, 9, (), dtype=dtype)
    leaves = [t.requires_grad_() for t in (input, weight, bias)]
    loss = linear_cross_entropy(input, weight, target, linear_bias=bias)
    first = torch.autograd.grad(loss * 2, leaves, retain_graph=True)
    kept = [t.clone() for t in first]
    second = torch.autograd.grad(loss * 6, leaves)
    for a, b, c in zip(first, kept, second, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(c, b * 3, rtol=1e-3, atol=1e-6 if dtype == torch.float32 else 1e-3)


def test_gradcheck(library):
    for probs, reduction in ((False, "mean"), (True, "mean"), (False, "none"), (True, "none")):
        (input, weight, bias), target = make(5, 4, 7, (), dtype=torch.float64, probs=probs)
        leaves = [t.requires_grad_() for t in (input, weight, bias, *([target] if probs else []))]

        def loss(input, weight, bias, target=target, reduction=reduction):
            options = dict(label_smoothing=0.1, z_loss=0.01, softcap=5.0, logit_scale=1.2, memory_budget=2 * 7 * 8)
            return linear_cross_entropy(input, weight, target, linear_bias=bias, reduction=reduction, **options)

        assert torch.autograd.gradcheck(loss, leaves)


def test_token_logprobs(library):
    (input, weight, bias), target = make(23, 8, 31, ())
    leaves = [t.requires_grad_() for t in (input, weight, bias)]
    options = dict(softcap=5.0, return_lse=True)
    ours, lse = linear_token_logprobs(input, weight, target, linear_bias=bias, memory_budget=4 * 31 * 5, **options)
    theirs, their_lse = token_logprobs(F.linear(input, weight, bias), target, **options)
    assert torch.equal(ours.argmax, theirs.argmax)
    upstream, ours, theirs = torch.randn(3, 23), (*ours[:2], lse), (*theirs[:2], their_lse)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)
    grads = (torch.autograd.grad(result, leaves, list(upstream)) for result in (ours, theirs))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_same_bits_every_time(dtype, library):
    (input, weight, _), target = make(100, 32, 500, (), dtype=dtype)
    leaves, results = [input.requires_grad_(), weight.requires_grad_()], []
    for _ in range(3):
        loss = linear_cross_entropy(*leaves, target, memory_budget=10 * 500 * dtype.itemsize)
        results.append((loss, *torch.autograd.grad(loss, leaves)))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_autocast_casts_the_product_and_not_the_loss(library):
    (input, weight, bias), target = make(9, 8, 31, ())
    leaves = [t.requires_grad_() for t in (input, weight, bias)]
    with torch.autocast("cpu", torch.bfloat16):
        ours = linear_cross_entropy(input, weight, target, linear_bias=bias)
        theirs = cross_entropy(F.linear(input, weight, bias), target)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, theirs)
    for a, b, t in zip(torch.autograd.grad(ours, leaves), torch.autograd.grad(theirs, leaves), leaves, strict=True):
        assert a.dtype == t.dtype
        torch.testing.assert_close(a, b, rtol=0.02, atol=1e-3)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile(backend, library):
    def step(input, weight, bias, target):
        loss = linear_cross_entropy(input * 2, weight, target, linear_bias=bias, label_smoothing=0.1)
        return loss + linear_token_logprobs(input, weight, target).entropy.sum()

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=backend)
    for N in (6, 9):
        leaves, target = make(N, 8, 11, ())
        ours, theirs = (grads_of(lambda *t: f(*t, target), leaves, torch.ones(())) for f in (compiled, step))  # noqa: B023
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b)


def test_export_of_a_module(library):
    module, args = modules.LinearCrossEntropyLoss(8, 9, bias=True), (torch.randn(6, 8), torch.randint(0, 9, (6,)))
    torch.testing.assert_close(torch.export.export(module, args).module()(*args), module(*args))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_export(reduction, library):
    class Loss(torch.nn.Module):
        def forward(self, input, weight, target):
            loss = linear_cross_entropy(input, weight, target, reduction=reduction)
            return loss, linear_token_logprobs(input, weight, target).entropy

    n, counter = torch.export.Dim("n"), torch._dynamo.testing.CompileCounter()
    (input, weight, _), target = make(6, 8, 11, ())
    exported = torch.export.export(Loss(), (input, weight, target), dynamic_shapes=({0: n}, None, {0: n})).module()
    compiled = torch.compile(Loss(), fullgraph=True, dynamic=True, backend=counter)
    for N in (6, 9, 12):
        (input, weight, _), target = make(N, 8, 11, ())
        for found in (exported(input, weight, target), compiled(input, weight, target)):
            torch.testing.assert_close(found, Loss()(input, weight, target))
    assert counter.frame_count == 1


def test_meta_tensors():
    """No autocast knows their device."""
    input, weight, target = torch.zeros(6, 8, device="meta", requires_grad=True), torch.zeros(9, 8), torch.zeros(6, dtype=torch.int64)
    loss = linear_cross_entropy(input, weight.to("meta"), target.to("meta"))
    assert loss.shape == () and torch.autograd.grad(loss, input)[0].shape == (6, 8)


def test_functional_transforms(library):
    (input, weight, _), target = make(6, 8, 9, ())
    expected = grads_of(lambda w: F.cross_entropy(input @ w.T, target), [weight], torch.ones(()))[0]
    torch.testing.assert_close(torch.func.grad(lambda w: linear_cross_entropy(input, w, target))(weight), expected)


@pytest.mark.parametrize("name", ["plain", "all", "probs-all"])
@pytest.mark.parametrize("positions", [(), (3,)], ids=["rows", "positions"])
def test_registration(name, positions, library):
    (input, weight, bias), target = make(5, 8, 9, positions, probs="probs" in name)
    class_weight = torch.rand(9) if OPTIONS[name].get("weight") else None
    x = Options(**{k: v for k, v in OPTIONS[name].items() if k not in ("weight", "probs")})
    tensors = input, weight, target, bias, class_weight
    rows, probs = 5 * math.prod(positions), "probs" in name
    opcheck(library.linear_cross_entropy_fwd.default, (*tensors, *x, "mean", True, 0, True, True, True))
    opcheck(library.linear_cross_entropy_fwd.default, (*tensors, *x, "none", False, 0, False, False, False))
    stats = torch.rand(rows, 3) if probs else None
    opcheck(library.linear_softmax_grad.default, (*tensors, torch.rand(rows, 5), stats, *x, 0, True, True, False))
    if not probs:
        opcheck(library.linear_softmax_stats.default, (*tensors, *x, False, True, 0))
        opcheck(library.linear_softmax_stats.default, (*tensors, *x, True, False, 0))


def test_second_derivative_raises(library):
    (input, weight, _), target = make(3, 8, 5, ())
    weight.requires_grad_()
    (dw,) = torch.autograd.grad(linear_cross_entropy(input, weight, target, reduction="none").sum(), weight, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives are not implemented"):
        (dw.sum() + weight.sum()).backward()


X, W, Y = torch.zeros(4, 8), torch.zeros(7, 8), torch.zeros(4, dtype=torch.int64)
BAD = {
    "not a tensor": (dict(linear_weight=[1.0]), TypeError, "linear_weight must be a tensor, got list"),
    "features": (dict(input=X[:, :5]), ValueError, "input must be (..., H=8) to fit linear_weight (7, 8), got (4, 5)"),
    "no classes": (dict(linear_weight=W[:0]), ValueError, "(V, H) or (V, d1, ..., H) with at least one class, got (0, 8)"),
    "positions": (
        dict(input=X[None], linear_weight=W.view(7, 1, 8)), ValueError, "input must be (N, H) for linear_weight (7, 1, 8), got (1, 4, 8)",
    ),
    "dtypes": (dict(linear_weight=W.bfloat16()), TypeError, "linear_weight is torch.bfloat16 on cpu, but input is torch.float32 on cpu"),
    "bias": (dict(linear_bias=torch.zeros(8)), ValueError, "linear_bias must be (7,), got (8,)"),
    "target": (dict(target=Y[:3]), ValueError, "target must be (4,) labels to fit input (4, 8) and linear_weight (7, 8), got (3,)"),
    "weight": (dict(weight=torch.ones(6)), ValueError, "weight must be (V=7,), got (6,)"),
    "reduction": (dict(reduction="avg"), ValueError, "reduction must be one of none, mean, sum, got 'avg'"),
    "budget": (dict(memory_budget=27), ValueError, "memory_budget must hold one row of logits, 28 bytes, got 27"),
    "budget type": (dict(memory_budget=1e9), TypeError, "memory_budget must be an int, got 1000000000.0"),
    "label": (dict(target=Y + torch.tensor([0, 0, -100, 9])), IndexError, "target[3] is 9, out of range for 7 classes (0 to 6)"),
    "label in a batch": (
        dict(input=X.view(2, 2, 8), target=torch.tensor([[0, 0], [8, 0]])), IndexError, "target[1, 0] is 8, out of range for 7 classes",
    ),
}  # fmt: skip


@pytest.mark.parametrize("change, error, message", BAD.values(), ids=BAD)
@pytest.mark.parametrize("grad", [False, True])
def test_bad_input(change, error, message, grad, library):
    good = dict(input=X.clone().requires_grad_(grad), linear_weight=W, target=Y)
    linear_cross_entropy(**good)
    with pytest.raises(error, match=re.escape(message)):
        linear_cross_entropy(**good | change)
