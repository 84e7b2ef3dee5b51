"""merge_attention: the reference, the C++ kernel at each level and, interpreted, the Triton kernel against the textbook formula in float64;
the public op's promises. That it joins attention over parts of the keys, test_attention_semantics.py shows."""

import math
import os
import re

import pytest
import torch
from torch.library import opcheck

from judge import assert_close
from minkernels import merge_attention
from minkernels.attention import reference

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
# The C++ kernel works on 64 rows and 512 elements at a time, the Triton kernel on 256 elements.
SHAPES = [(2, 3, 5, 8), (1, 2, 70, 64), (1, 1, 3, 600), (2, 1, 1, 1), (1, 2, 0, 8), (1, 2, 3, 0)]
DTYPES = [(F32, F32), (BF16, BF16), (F16, F16), (F64, F64), (F32, BF16), (BF16, F32)]


def make(shape=(2, 3, 5, 8), dtype1=F32, dtype2=F32):
    """Parts of every share, from none to all; some that saw no key, whose output may be anything, and rows where neither did."""
    wide = torch.promote_types(torch.promote_types(dtype1, dtype2), F32)
    out1, out2 = torch.randn(shape).to(dtype1), torch.randn(shape).to(dtype2)
    lse1, lse2 = (10 * torch.randn(shape[:-1], dtype=wide) for _ in range(2))
    lse1[torch.rand(lse1.shape) < 0.2], lse2[torch.rand(lse2.shape) < 0.2] = -math.inf, -math.inf
    return out1, lse1, out2, lse2


def plain(out1, lse1, out2, lse2):
    lse = torch.stack((lse1, lse2)).logsumexp(0)
    w1, w2 = ((t - lse).exp().masked_fill(t.isneginf(), 0.0) for t in (lse1, lse2))
    return w1[..., None] * out1 + w2[..., None] * out2, lse


def judged(road, tensors, douts):
    """Outputs and gradients of a road, (fwd, bwd), against plain in float64, by the budget that plain in the dtypes themselves leaves."""
    fwd, bwd = road
    found = [*fwd(*tensors), *bwd(*douts, *tensors)]
    results = []
    for exact in (True, False):
        leaves = [(t.double() if exact else t.to(tensors[1].dtype)).requires_grad_() for t in tensors]
        out, lse = plain(*leaves)
        sought = [(t, d) for t, d in zip((out, lse), douts, strict=True) if d is not None]
        some = torch.autograd.grad([t for t, _ in sought], leaves, [d.to(t.dtype) for t, d in sought], allow_unused=True)
        grads = [torch.zeros_like(leaf) if g is None else g for g, leaf in zip(some, leaves, strict=True)]
        results.append([t.detach() for t in (out, lse, *(g.nan_to_num() for g in grads))])  # where neither saw a key autograd has 0 / 0
    none = tensors[1].isneginf() & tensors[3].isneginf()
    names = "out", "lse", "dout1", "dlse1", "dout2", "dlse2"
    dtypes = tensors[0].dtype, tensors[1].dtype, *(t.dtype for t in tensors)
    for name, dtype, a, e, p in zip(names, dtypes, found, *results, strict=True):
        assert a.dtype == dtype
        if name not in ("out", "lse"):
            e, p = (t.masked_fill(none.view(none.shape + (1,) * (t.dim() - none.dim())), 0.0) for t in (e, p))
        size = 1.0 if name.startswith("dlse") and e.numel() else 0.0  # a difference of two sums
        assert_close(a, p.to(dtype), e, dtype, name, size=size)


def roads():
    ops = torch.ops.minkernels
    return {"reference": (reference.merge_fwd, reference.merge_bwd), "kernel": (ops.merge_attention_fwd, ops.merge_attention_bwd)}


def upstream(tensors, which=(True, True)):
    out1, lse1 = tensors[:2]
    dout, dlse = torch.randn(out1.shape).to(out1.dtype), torch.randn_like(lse1)
    return dout if which[0] else torch.zeros((), dtype=dout.dtype).expand(dout.shape), dlse if which[1] else None


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_fwd_bwd(shape, dtypes, levels):
    tensors = make(shape, *dtypes)
    given = [upstream(tensors, which) for which in ((True, True), (True, False), (False, True))]
    for douts in given:
        judged(roads()["reference"], tensors, douts)
    for _level in levels:
        for douts in given:
            judged(roads()["kernel"], tensors, douts)


def distant(dtype):
    """Parts of little share beside others whose lse is 0: what they add to it is lost where it is log(1 + e)."""
    lse2 = torch.linspace(-20, 0, 40, dtype=dtype)[None, None]
    return torch.randn(1, 1, 40, 8, dtype=dtype), torch.zeros_like(lse2), torch.randn(1, 1, 40, 8, dtype=dtype), lse2


def assert_distant(fwd, dtype):
    tensors = distant(dtype)
    exact = tensors[3].double().exp().log1p()
    assert ((fwd(*tensors)[1].double() - exact).abs() <= 20 * torch.finfo(dtype).eps * exact).all()  # the exponential's own error: 10


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_lse_of_distant_parts(dtype, levels):
    for _level in levels:
        for fwd, _ in roads().values():
            assert_distant(fwd, dtype)


triton_road = pytest.mark.skipif(not (INTERPRETED or torch.cuda.is_available()), reason="needs a GPU, or the interpreter in its process")


@pytest.mark.interpret
@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")  # NumPy on inf - inf
@triton_road
@pytest.mark.parametrize("dtypes", [d for d in DTYPES if F64 not in d], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_triton(shape, dtypes):
    from minkernels.attention import _triton_merge

    device = "cpu" if INTERPRETED else "cuda"

    def on_device(kernel):
        return lambda *args: [t.cpu() for t in kernel(*(t if t is None else t.to(device) for t in args))]

    tensors = make(shape, *dtypes)
    road = on_device(_triton_merge.fwd), on_device(_triton_merge.bwd)
    for which in ((True, True), (True, False), (False, True)):
        judged(road, tensors, upstream(tensors, which))
    assert_distant(road[0], F32)
    permuted = [t.transpose(1, 2).contiguous().transpose(1, 2).to(device) for t in tensors]
    for a, e in zip(_triton_merge.fwd(*permuted), road[0](*tensors), strict=True):
        assert torch.equal(a.cpu(), e)
    douts = upstream(tensors)
    for a, e in zip(_triton_merge.bwd(*(d.to(device) for d in douts), *permuted), road[1](*douts, *tensors), strict=True):
        assert torch.equal(a.cpu(), e)
    nan_in_no_share(lambda *t: road[0](*t), lambda *t: road[1](*t))


def nan_in_no_share(fwd, bwd):
    out1, lse1, out2, lse2 = make()
    lse1[0], lse2[1] = -math.inf, -math.inf
    clean = [*fwd(out1, lse1, out2, lse2), *bwd(torch.ones(2, 3, 5, 8), None, out1, lse1, out2, lse2)]
    out1[lse1.isneginf()], out2[lse2.isneginf()] = math.nan, math.inf
    for a, e in zip([*fwd(out1, lse1, out2, lse2), *bwd(torch.ones(2, 3, 5, 8), None, out1, lse1, out2, lse2)], clean, strict=True):
        assert torch.equal(a, e) and not a.isnan().any()


@pytest.mark.parametrize("road", ["reference", "kernel"])
def test_what_has_no_share_reaches_nothing(road, library):
    nan_in_no_share(*roads()[road])


@pytest.mark.parametrize("road", ["reference", "kernel"])
def test_far_apart(road, library):
    """The smaller part's share underflows; equal parts; a NaN stays one; the other row is as it was."""
    fwd, bwd = roads()[road]
    out1, out2 = torch.ones(1, 1, 6, 2), torch.full((1, 1, 6, 2), 3.0)
    lse1 = torch.tensor([0.0, 1e30, -1e30, 5.0, math.nan, 2.0])[None, None]
    lse2 = torch.tensor([0.0, -1e30, 1e30, -math.inf, 0.0, 2.0 - math.log(3)])[None, None]
    out, lse = fwd(out1, lse1, out2, lse2)
    torch.testing.assert_close(out[0, 0, :, 0], torch.tensor([2.0, 1, 3, 1, math.nan, 1.5]), equal_nan=True)
    torch.testing.assert_close(lse[0, 0], torch.tensor([math.log(2), 1e30, 1e30, 5, math.nan, 2 + math.log(4 / 3)]), equal_nan=True)
    dout1, dlse1, dout2, dlse2 = (t[0, 0] for t in bwd(torch.ones_like(out), None, out1, lse1, out2, lse2))
    torch.testing.assert_close(dout1[:, 0] + dout2[:, 0], torch.tensor([1.0, 1, 1, 1, math.nan, 1]), equal_nan=True)
    torch.testing.assert_close(dlse1 + dlse2, torch.tensor([0.0, 0, 0, 0, math.nan, 0]), equal_nan=True)
    torch.testing.assert_close(dlse1, torch.tensor([-1.0, 0, 0, 0, math.nan, -0.75]), equal_nan=True)  # w1 w2 (2 - 6)


def test_layouts(library):
    """(B, M, H, D) behind a transpose; slices; broadcast; fewer and more dimensions than four."""
    tensors = make((2, 3, 5, 8))
    expected, lse = merge_attention(*tensors)
    permuted = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in tensors]
    out, same = merge_attention(*permuted)
    assert out.stride() == permuted[0].stride() and torch.equal(out, expected) and torch.equal(same, lse)
    sliced = [torch.stack((t, t), -1)[..., 0] for t in tensors]
    assert torch.equal(merge_attention(*sliced)[0], expected)
    one = merge_attention(*(t[:1].expand(t.shape) for t in tensors))[0]
    assert torch.equal(one[0], expected[0]) and torch.equal(one[1], expected[0])
    for lead in ((), (5,), (2, 3), (2, 3, 5), (2, 2, 3, 5), (1, 2, 2, 3, 5)):
        few = make((*lead, 8))
        out, lse = merge_attention(*few)
        e_out, e_lse = plain(*few)
        assert out.shape == (*lead, 8) and lse.shape == lead
        torch.testing.assert_close(out, e_out.masked_fill(e_lse.isneginf()[..., None], 0.0))
        torch.testing.assert_close(lse, e_lse)
        deep = [t.transpose(0, -2).contiguous().transpose(0, -2) if t.dim() > 5 else t for t in few]
        assert torch.equal(merge_attention(*deep)[0], out)


def test_dtypes(library):
    for dtype1, dtype2 in DTYPES:
        out1, lse1, out2, lse2 = make((2, 3, 5, 8), dtype1, dtype2)
        out, lse = merge_attention(out1, lse1.double(), out2, lse2)
        assert out.dtype == dtype1 and lse.dtype == lse1.dtype


def test_threads_change_nothing(library):
    tensors, threads, found = make((2, 8, 300, 64)), torch.get_num_threads(), []
    douts = upstream(tensors)
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            found.append([*roads()["kernel"][0](*tensors), *roads()["kernel"][1](*douts, *tensors)])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(*found, strict=True))


def test_registration(device):
    ops = torch.ops.minkernels
    for tensors in (make(), make((2, 3, 5, 8), BF16, F32), [t.transpose(1, 2) for t in make()]):
        tensors = [t.to(device) for t in tensors]
        opcheck(ops.merge_attention_fwd.default, tuple(tensors))
        for which in ((True, True), (False, True), (True, False)):
            douts = [t if t is None else t.to(device) for t in upstream([t.cpu() for t in tensors], which)]
            opcheck(ops.merge_attention_bwd.default, (*douts, *tensors))


def leaves(*args, **kwargs):
    return [t.requires_grad_() for t in make(*args, **kwargs)]


def test_autograd(library):
    """gradcheck; either output alone; second derivatives raise."""
    tensors = [t.masked_fill(t.isneginf(), 0.0).double().requires_grad_() for t in make((2, 3, 4))]
    torch.autograd.gradcheck(merge_attention, tensors)
    for i in (0, 1):
        torch.autograd.gradcheck(lambda *t: merge_attention(*t)[i], tensors)  # noqa: B023
    (grad,) = torch.autograd.grad(merge_attention(*tensors)[0].sum(), tensors[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives are not implemented"):
        grad.sum().backward()


def step(*tensors):
    out, lse = merge_attention(*tensors)
    return out * 1.0, lse


def test_compile_and_export(library):
    class Model(torch.nn.Module):
        def forward(self, *tensors):
            return step(*tensors)

    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    M = torch.export.Dim("M", min=2, max=100)
    program = torch.export.export(Model(), tuple(make()), dynamic_shapes=[({2: M},) * 4]).module()
    for m in (5, 9):
        tensors = leaves((2, 3, m, 8))
        expected, found = step(*tensors), compiled(*tensors)
        for a, b, c in zip(found, expected, program(*(t.detach() for t in tensors)), strict=True):
            assert torch.equal(a, b) and torch.equal(b, c)
        grads = [torch.autograd.grad(out[0].sum() + out[1].nan_to_num(neginf=0).sum(), tensors) for out in (found, expected)]
        torch.testing.assert_close(*grads)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_transforms(library):
    tensors = make((3, 2, 4, 8))
    torch.testing.assert_close(torch.func.vmap(merge_attention)(*tensors), merge_attention(*tensors))
    grads = torch.func.vmap(torch.func.grad(lambda *t: merge_attention(*t)[0].sum(), argnums=(0, 1, 2, 3)))(*tensors)
    own = [t.clone().requires_grad_() for t in tensors]
    torch.testing.assert_close(grads, torch.autograd.grad(merge_attention(*own)[0].sum(), own))


GOOD = make((3, 4))
BAD = {
    "list": (0, [1.0], TypeError, "out1 must be a tensor, got list"),
    "scalar": (0, torch.tensor(1.0), ValueError, "out1 must be (..., Dv), got a scalar"),
    "integers": (2, GOOD[2].int(), TypeError, "out2 must be float16, bfloat16, float32 or float64, got torch.int32"),
    "lse1": (1, torch.zeros(4), ValueError, "lse1 must be (3,) to fit out1 (3, 4), got (4,)"),
    "out2": (2, torch.zeros(3, 5), ValueError, "out2 must be (3, 4) to fit out1 (3, 4), got (3, 5)"),
    "lse2": (3, torch.zeros(3, 1), ValueError, "lse2 must be (3,) to fit out1 (3, 4), got (3, 1)"),
    "lse2 dtype": (3, torch.zeros(3).bool(), TypeError, "lse2 must be float16, bfloat16, float32 or float64, got torch.bool"),
    "device": (2, GOOD[2].to("meta"), TypeError, "out2 is on meta, but out1 is on cpu"),
}


@pytest.mark.parametrize("at, value, error, message", BAD.values(), ids=BAD)
def test_bad_input(at, value, error, message, library):
    tensors = list(GOOD)
    merge_attention(*tensors)
    tensors[at] = value
    with pytest.raises(error, match=re.escape(message)):
        merge_attention(*tensors)
