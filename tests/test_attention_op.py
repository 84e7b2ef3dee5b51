"""attention as PyTorch sees it: autograd, compile, export, transforms, autocast, checkpoints; and its errors."""

import re

import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

from attention_cases import SHAPES, gradients, holes, make, move, options, packed
from minkernels import _library, attention, attention_varlen, box_iou
from minkernels.attention import ops, reference


def test_a_tensor_given_twice_compiles(library):
    q, k = (torch.randn(1, 2, 5, 8, requires_grad=True) for _ in range(2))
    boxes = torch.rand(3, 4).cumsum(1).requires_grad_()
    calls = (lambda q, k: attention(q, k, k), (q, k)), (lambda q: attention(q, q, q), (q,)), (lambda b: box_iou(b, b), (boxes,))
    for call, args in calls:
        compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
        expected = torch.autograd.grad(call(*args).square().sum(), args)
        torch.testing.assert_close(torch.autograd.grad(compiled(*args).square().sum(), args), expected)


@pytest.mark.parametrize("name", ["mask", "bias", "sinks", "key_mask"])
def test_nested_arguments_are_refused(name, library):
    q = torch.randn(1, 2, 3, 4)
    nested = torch.nested.nested_tensor([torch.randn(3, 4), torch.randn(2, 4)])
    with pytest.raises(TypeError, match=f"{name} must be a dense tensor, got a nested one"):
        attention(q, q, q, **{name: nested})


def test_the_largest_finite_bias(library):
    q, k, v = (torch.randn(1, 2, 4, 8) for _ in range(3))
    bias = torch.zeros(4, 4)
    bias[:, 1] = torch.finfo(torch.float32).max
    assert torch.equal(attention(q, k, v, bias=bias), v[:, :, 1:2].expand_as(v))


def test_autocast_takes_several_dtypes(library):
    q, v = torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5, 8).bfloat16()
    rows, cu = torch.randn(5, 2, 8), torch.tensor([0, 5])
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(attention(q, q, v), attention(q.bfloat16(), q.bfloat16(), v))
        packed = dict(cu_seqlens_q=cu, cu_seqlens_k=cu, max_seqlen_q=5, max_seqlen_k=5)
        assert attention_varlen(rows, rows, rows.bfloat16(), **packed).dtype == torch.bfloat16


def test_gradcheck(library):
    q, k, v = make(2, 4, 2, 5, 7, 6, 3, torch.float64)
    bias, sinks = torch.randn(4, 1, 7, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    inputs = tuple(t.requires_grad_() for t in (q, k, v, bias, sinks))

    def function(q, k, v, bias, sinks):
        return attention(q, k, v, key_mask=mask, causal=True, bias=bias, sinks=sinks, softcap=3.0, window=(4, None), return_lse=True)

    mask = holes(2, 7)
    assert torch.autograd.gradcheck(function, inputs)


@pytest.mark.parametrize("permuted", [False, True], ids=["contiguous", "permuted"])
@pytest.mark.parametrize("name", ["full", "padded-causal", "combined"])
@pytest.mark.parametrize("shape", ["ragged-tail", "more-keys", "no-keys"])
def test_registration(shape, name, permuted, device):
    q, k, v = make(*SHAPES[shape])
    x = options(name, q, k)
    q, k, v, x = (move(t, device) for t in (q, k, v, x))
    q, k, v = (t if permuted else t.contiguous() for t in (q, k, v))
    opcheck(torch.ops.minkernels.attention_fwd.default, (q, k, v, *x))
    o, lse = torch.ops.minkernels.attention_fwd(q, k, v, *x)
    douts = torch.randn_like(o), torch.randn_like(lse)
    opcheck(torch.ops.minkernels.attention_bwd.default, (*douts, q, k, v, o, lse, *x, x.bias is not None))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile(backend, library):
    def step(q, k, v, key_mask):
        q = q * 2.0  # something to fuse
        more = dict(bias=q.sum(-1, keepdim=True), window=(q.shape[2], None))
        o, lse = attention(q, k, v, key_mask=key_mask, causal=True, **more, return_lse=True)
        return o.sin() + lse[..., None].sigmoid()

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=backend)
    for N in (9, 12):
        (q, k, v), key_mask = make(2, 4, 2, 7, N, 16, 16), holes(2, N)
        do = torch.randn(2, 4, 7, 16)
        for x, y in zip(*(gradients(lambda *t, f=f: f(*t, key_mask), (q, k, v), do) for f in (compiled, step)), strict=True):  # noqa: B023
            torch.testing.assert_close(x, y)


def test_compile_packed(library):
    compiled = torch.compile(attention_varlen, fullgraph=True, dynamic=True, backend="aot_eager")
    for lengths in ([4, 7], [9, 1], [3, 3]):
        q, k, v = (t[0].transpose(0, 1) for t in make(1, 2, 2, sum(lengths), sum(lengths), 8, 8))
        args = q, k, v, packed(lengths), packed(lengths)
        longest = dict(max_seqlen_q=max(lengths), max_seqlen_k=max(lengths))
        torch.testing.assert_close(compiled(*args, **longest, causal=True), attention_varlen(*args, **longest, causal=True))


def test_export():
    class Model(torch.nn.Module):
        def forward(self, q, k, v):
            return attention(q, k, v, causal=True)

    q, k, v = make(2, 2, 2, 5, 5, 8, 8)
    length = torch.export.Dim("length", min=2, max=100)
    program = torch.export.export(Model(), (q, k, v), dynamic_shapes=[{2: length}] * 3)
    q, k, v = make(2, 2, 2, 9, 9, 8, 8)
    torch.testing.assert_close(program.module()(q, k, v), attention(q, k, v, causal=True))


def test_functional_transforms(library):
    q, k, v = make(3, 2, 2, 5, 7, 8, 8, torch.float64)

    def loss(q, k, v):
        return attention(q[None], k[None], v[None], causal=True).square().sum()

    one_by_one = torch.stack([attention(q[i : i + 1], k[i : i + 1], v[i : i + 1], causal=True)[0] for i in range(3)])
    torch.testing.assert_close(torch.func.vmap(lambda *t: attention(*(x[None] for x in t), causal=True)[0])(q, k, v), one_by_one)
    each = torch.func.vmap(torch.func.grad(loss, argnums=(0, 1, 2)))(q, k, v)
    together = gradients(lambda *t: attention(*t, causal=True).square().sum(), (q, k, v), torch.ones((), dtype=torch.float64))
    for x, y in zip(each, together, strict=True):
        torch.testing.assert_close(x, y)


def test_autocast():
    q, k, v = make(1, 2, 2, 5, 5, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert attention(q, k, v).dtype == F.scaled_dot_product_attention(q, k, v).dtype == torch.bfloat16
        assert attention(q.double(), k.double(), v.double()).dtype == torch.float64
        assert attention(*(t.to("meta") for t in (q, k, v))).dtype == torch.float32, "no autocast knows the device of meta tensors"


def test_saved_tensors_come_back_with_other_strides(library):
    """What a hook moved away and back, say."""

    def turned(t):
        return t.mT.contiguous().mT if t.dim() > 1 else t

    q, k, v = make(2, 4, 2, 20, 30, 8, 8)
    q.requires_grad_()
    expected = torch.autograd.grad(attention(q, k, v).sin().sum(), q)[0]
    with torch.autograd.graph.saved_tensors_hooks(turned, turned):
        loss = attention(q, k, v).sin().sum()
    torch.testing.assert_close(torch.autograd.grad(loss, q)[0], expected)


def test_selective_checkpoint(library):
    """The op can be named in a policy: saved, it is not run a second time."""
    calls, original = [], torch.ops.minkernels.attention_fwd.default

    def policy(ctx, op, *args, **kwargs):
        calls.append(op)
        return CheckpointPolicy.MUST_SAVE if op == original else CheckpointPolicy.PREFER_RECOMPUTE

    q, k, v = make(1, 2, 2, 6, 6, 8, 8)
    q.requires_grad_()
    saved = checkpoint(
        lambda q: attention(q * 2, k, v), q, use_reentrant=False, context_fn=lambda: create_selective_checkpoint_contexts(policy)
    )
    (dq,) = torch.autograd.grad(saved.sum(), q)
    torch.testing.assert_close(dq, torch.autograd.grad(attention(q * 2, k, v).sum(), q)[0])
    assert original in calls


def test_flops_are_counted():
    q, k, v = make(2, 4, 2, 5, 7, 8, 3)
    with FlopCounterMode(display=False) as counter:
        attention(q.requires_grad_(), k, v).sum().backward()
    assert counter.get_total_flops() == 2 * (2 * 4 * 5 * 7) * ((8 + 3) + (3 * 8 + 2 * 3))


def test_second_derivative_raises(library):
    q, k, v = make(1, 1, 1, 3, 3, 4, 4)
    q.requires_grad_()
    (dq,) = torch.autograd.grad(attention(q, k, v).sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives are not implemented"):
        (dq.sum() + q.sum()).backward()


def test_forward_mode_raises():
    q, k, v = make(1, 1, 1, 3, 3, 4, 4)
    with pytest.raises(RuntimeError, match="jvp"):
        torch.func.jvp(lambda q: attention(q, k, v), (q,), (q,))


def test_bypass_is_only_for_calls_without_gradient():
    q = torch.zeros(1, requires_grad=True)
    assert _library.needs_grad(q) and not _library.needs_grad(q.detach())
    with torch.no_grad():
        assert not _library.needs_grad(q)


T = torch.zeros
BAD = {
    "not a tensor": (dict(q=[1.0]), TypeError, "q must be a tensor, got list"),
    "nested": (dict(v=torch.nested.as_nested_tensor([T(3, 6, 8)] * 2)), TypeError, "v must be a dense tensor, got a nested one"),
    "sparse": (dict(k=T(2, 3, 6, 8).to_sparse()), TypeError, "k must be a dense tensor, got one of layout torch.sparse_coo"),
    "sparse mask": (dict(mask=T(5, 6).bool().to_sparse()), TypeError, "mask must be a dense tensor, got one of layout torch.sparse_coo"),
    "rank": (dict(k=T(2, 3, 8)), ValueError, "k must have 4 dimensions .* got shape (2, 3, 8)"),
    "dtype": (dict(q=T(2, 3, 5, 8, dtype=torch.int64)), TypeError, "q must be float16, .* got torch.int64"),
    "mixed dtypes": (dict(k=T(2, 3, 6, 8, dtype=torch.bfloat16)), TypeError, "k is torch.bfloat16 on cpu, but q is torch.float32"),
    "mixed devices": (dict(k=T(2, 3, 6, 8, device="meta")), TypeError, "k is torch.float32 on meta, but q is torch.float32 on cpu"),
    "batch": (dict(k=T(1, 3, 6, 8)), ValueError, "k must be (B=2, heads, length, D=8) .* got (1, 3, 6, 8)"),
    "head dim": (dict(k=T(2, 3, 6, 4)), ValueError, "k must be .* got (2, 3, 6, 4)"),
    "lengths": (dict(v=T(2, 3, 5, 8)), ValueError, "v must share .* k (2, 3, 6, 8), got (2, 3, 5, 8)"),
    "heads": (dict(k=T(2, 2, 6, 8), v=T(2, 2, 6, 8)), ValueError, "q has 3 heads, no multiple of the 2 heads of k; q"),
    "too wide": (dict(q=T(2, 3, 5, 257), k=T(2, 3, 6, 257)), ValueError, "head dims of q and v must be 1 to 256, got 257 and 8"),
    "too narrow": (dict(v=T(2, 3, 6, 0)), ValueError, "head dims of q and v must be 1 to 256, got 8 and 0"),
    "causal": (dict(causal="yes"), ValueError, "causal must be True, False or \"top-left\", got 'yes'"),
    "key_mask type": (dict(key_mask=T(2, 6)), TypeError, "key_mask must be a tensor of bool, got torch.float32"),
    "key_mask shape": (dict(key_mask=T(2, 5, dtype=torch.bool)), ValueError, "key_mask must be (B=2, N=6), got (2, 5)"),
    "key_mask device": (dict(key_mask=T(2, 6, dtype=torch.bool, device="meta")), TypeError, "key_mask is on meta, but q is on cpu"),
    "kv_lens type": (dict(kv_lens=T(2)), TypeError, "kv_lens must be a tensor of int32 or int64, got torch.float32"),
    "kv_lens shape": (dict(kv_lens=T(3, dtype=torch.int32)), ValueError, "kv_lens must be (B=2,), got (3,)"),
    "kv_lens high": (dict(kv_lens=torch.tensor([3, 7])), ValueError, "kv_lens must be 0 to N=6, got 7"),
    "kv_lens of 2**32 + 2": (dict(kv_lens=torch.tensor([3, 2**32 + 2])), ValueError, "kv_lens must be 0 to N=6, got 2147483647"),
    "kv_lens low": (dict(kv_lens=torch.tensor([-1, 2])), ValueError, "kv_lens must be 0 to N=6, got -1"),
    "mask type": (dict(mask=T(5, 6)), TypeError, "mask must be a tensor of bool, got torch.float32"),
    "mask shape": (dict(mask=T(4, 6, dtype=torch.bool)), ValueError, "mask must broadcast to (B, H, M, N) = (2, 3, 5, 6), got (4, 6)"),
    "bias type": (dict(bias=T(5, 6, dtype=torch.bool)), TypeError, "bias must be a tensor of float16 or bfloat16 or .* got torch.bool"),
    "bias shape": (dict(bias=T(1, 2, 3, 5, 6)), ValueError, "bias must broadcast to (B, H, M, N) = (2, 3, 5, 6), got (1, 2, 3, 5, 6)"),
    "window": (dict(window=3), TypeError, "window must be two ints or None, (left, right), got 3"),
    "window of floats": (dict(window=(1.0, 2)), TypeError, "window must be two ints or None, (left, right), got (1.0, 2)"),
    "softcap": (dict(softcap=0), ValueError, "softcap must be positive, got 0"),
    "sinks": (dict(sinks=T(2)), ValueError, "sinks must be (H=3,), got (2,)"),
    "dropout": (dict(dropout_p=1.0), ValueError, "dropout_p must be at least 0 and under 1, got 1.0"),
    "dropout type": (dict(dropout_p="half"), TypeError, "dropout_p must be a number, got 'half'"),
    "scale type": (dict(scale="big"), TypeError, "scale must be a number, got 'big'"),
    "scale value": (dict(scale=float("nan")), ValueError, "scale must be finite, got nan"),
}


def test_numbers_of_numpy():
    """As PyTorch takes them."""
    np = pytest.importorskip("numpy")
    q = torch.randn(1, 2, 5, 8)
    out = attention(q, q, q, scale=np.float32(0.25), softcap=np.int64(3), dropout_p=np.float64(0), window=(np.int32(2), np.int64(2**40)))
    assert torch.equal(out, attention(q, q, q, scale=0.25, softcap=3.0, window=(2, None)))
    packed, cu = q[0].transpose(0, 1), torch.tensor([0, 2, 5])
    outs = [attention_varlen(*[packed] * 3, cu, cu, max_seqlen_q=n, max_seqlen_k=n) for n in (3, np.array([2, 3]).max())]
    assert torch.equal(*outs)


@pytest.mark.parametrize("change, error, message", BAD.values(), ids=BAD)
def test_bad_input(change, error, message):
    good = dict(q=T(2, 3, 5, 8), k=T(2, 3, 6, 8), v=T(2, 3, 6, 8))
    attention(**good)
    pattern = re.escape(message).replace(r"\.\*", ".*").replace(r"\ ", " ")
    with pytest.raises(error, match=pattern):
        attention(**good | change)


CU = torch.tensor([0, 2, 5], dtype=torch.int32)
BAD_PACKED = {
    "rank": (dict(q=T(1, 5, 3, 8)), ValueError, "q must have 3 dimensions (length, heads, head dim), got shape (1, 5, 3, 8)"),
    "falls": (dict(cu_seqlens_q=torch.tensor([0, 7, 5])), ValueError, "cu_seqlens_q must rise from 0 to 5, the length of q, got [0, 7, 5]"),
    "start": (dict(cu_seqlens_k=torch.tensor([1, 2, 5])), ValueError, "cu_seqlens_k must rise from 0 to 5, the length of k, got [1, 2, 5]"),
    "end": (dict(cu_seqlens_k=torch.tensor([0, 2, 4])), ValueError, "cu_seqlens_k must rise from 0 to 5, the length of k, got [0, 2, 4]"),
    "count": (dict(cu_seqlens_k=torch.tensor([0, 5])), ValueError, "cu_seqlens_k must be (3,), at least one, got (2,)"),
    "type": (dict(cu_seqlens_q=[0, 2, 5]), TypeError, "cu_seqlens_q must be a tensor of int32 or int64, got list"),
    "longest": (dict(max_seqlen_k=2), ValueError, "max_seqlen_k is 2, but cu_seqlens_k holds a sequence of 3"),
    "2**32 + 2": (dict(cu_seqlens_q=torch.tensor([0, 2 + 2**32, 5])), ValueError, "cu_seqlens_q must rise from 0 to 5, the length of q"),
    "longest of 2**63": (dict(max_seqlen_q=2**63), ValueError, "max_seqlen_q must fit 64 bits"),
    "longest type": (dict(max_seqlen_q=3.0), TypeError, "max_seqlen_q must be an int, got 3.0"),
}


@pytest.mark.parametrize("with_library", [True, False], ids=["cpp", "reference"])
@pytest.mark.parametrize("change, error, message", BAD_PACKED.values(), ids=BAD_PACKED)
def test_bad_packed_input(change, error, message, with_library, monkeypatch, library):
    if not with_library:
        monkeypatch.setattr(ops, "_fwd", reference.fwd)
    good = dict(q=T(5, 3, 8), k=T(5, 3, 8), v=T(5, 3, 8), cu_seqlens_q=CU, cu_seqlens_k=CU, max_seqlen_q=3, max_seqlen_k=3)
    attention_varlen(**good)
    with pytest.raises(error, match=re.escape(message)):
        attention_varlen(**good | change)


def test_lengths_are_named_in_compiled_graphs(library):
    q, kv_lens = torch.randn(2, 3, 6, 8), torch.tensor([3, 7])
    with pytest.raises(ValueError, match="kv_lens must be 0 to N=6, got 7"):
        torch.compile(lambda q, n: attention(q, q, q, kv_lens=n) * 2, fullgraph=True, backend="aot_eager")(q, kv_lens)
    q, cu = torch.randn(5, 3, 8), torch.tensor([0, 7, 5])
    with pytest.raises(ValueError, match=re.escape("cu_seqlens_q must rise from 0 to 5, the length of q, got [0, 7, 5]")):
        packed = torch.compile(lambda q, cu: attention_varlen(q, q, q, cu, cu, max_seqlen_q=5, max_seqlen_k=5), fullgraph=True)
        packed(q, cu)
