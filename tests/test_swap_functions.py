"""PyTorch's functions inside swapped(): the same results on our kernels, and PyTorch's own where we lack something."""

import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import minkernels
from minkernels.swap import functional, mode
from swap_cases import Graphs, Ops, judged, ours, run

pytestmark = pytest.mark.usefixtures("library")
sdpa = F.scaled_dot_product_attention
FUNCTIONS = ["scaled_dot_product_attention", "multi_head_attention_forward", "cross_entropy", "binary_cross_entropy_with_logits"]


def tensor(*shape, dtype=torch.float32):
    return torch.randn(*shape).to(dtype).requires_grad_()


# query, key, value shapes, mask and options. 2-D masks stand for all heads, (B, 1, 1, S) is one of keys
CALLS = {
    "plain": ((2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 4), None, {}),
    "causal": ((2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 8), None, {"is_causal": True}),
    "causal-more-queries": ((1, 2, 9, 8), (1, 2, 4, 8), (1, 2, 4, 8), None, {"is_causal": True, "scale": 0.7}),
    "keys-hidden": ((2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 8), (2, 1, 1, 7), {}),
    "mask": ((2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 8), (5, 7), {}),
    "mask-of-heads": ((2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 8), (3, 1, 7), {}),
    "bias": ((2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 8), (1, 3, 5, 7, float), {}),
    "gqa": ((2, 6, 5, 8), (2, 2, 7, 8), (2, 2, 7, 8), None, {"enable_gqa": True}),
    "one-key-head": ((2, 3, 5, 8), (2, 1, 7, 8), (2, 1, 7, 4), (2, 1, 5, 7), {}),
    "3d-one-key-head": ((3, 5, 8), (1, 7, 8), (1, 7, 4), None, {}),
    "3d": ((3, 5, 8), (3, 7, 8), (3, 7, 8), (3, 5, 7), {}),
    "3d-gqa": ((6, 5, 8), (2, 7, 8), (2, 7, 8), None, {"enable_gqa": True, "is_causal": True}),
    "5d": ((2, 3, 2, 5, 8), (2, 3, 2, 7, 8), (2, 3, 2, 7, 4), (2, 1, 2, 5, 7), {}),
    "5d-bias": ((2, 3, 2, 5, 8), (2, 3, 2, 7, 8), (2, 3, 2, 7, 8), (3, 1, 1, 7, float), {}),
    "no-keys": ((2, 3, 5, 8), (2, 3, 0, 8), (2, 3, 0, 8), None, {}),
    "no-batch": ((0, 3, 5, 8), (0, 3, 7, 8), (0, 3, 7, 8), None, {}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("case", CALLS.values(), ids=CALLS)
def test_sdpa(case, dtype):
    *shapes, mask, options = case
    inputs = [tensor(*shape, dtype=dtype) for shape in shapes]
    if mask is not None and mask[-1] is float:
        inputs.append(tensor(*mask[:-1], dtype=dtype))
    elif mask is not None:
        mask = torch.rand(mask) < 0.7
        mask[..., 0] = True  # PyTorch has no one answer for a query that sees nothing
        inputs.append(mask)

    def call(*args):
        return sdpa(*args, **options)

    with minkernels.swapped():
        actual, names = ours(run, call, inputs)
    assert names[0] == "attention_fwd"
    exact = run(call, [t.detach().double().requires_grad_() if t.is_floating_point() else t for t in inputs])
    judged(actual, run(call, inputs), exact, dtype)


def test_sdpa_dropout_and_layout():
    q = torch.randn(2, 50, 4, 8).transpose(1, 2)
    with minkernels.swapped():
        torch.manual_seed(1)
        a = sdpa(q, q, q, dropout_p=0.5)
        torch.manual_seed(1)
        b = sdpa(q, q, q, dropout_p=0.5)
        c = sdpa(q, q, q, dropout_p=0.5)
        assert a.transpose(1, 2).is_contiguous()  # what callers do next copies nothing
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_sdpa_of_two_dtypes_on_meta():
    """Theirs, whose error it is: no autocast knows that device."""
    q = torch.randn(1, 2, 5, 8, device="meta")
    with minkernels.swapped(), torch.autocast("cpu"), pytest.raises(RuntimeError, match="to have the same dtype"):
        sdpa(q, q.bfloat16(), q)


def test_keys_hidden_from_all_are_a_key_mask():
    q, mask = torch.randn(2, 3, 5, 8), torch.tensor([[True, True, False, False, False], [False] * 5])[:, None, None]
    with Ops() as ops, minkernels.swapped():
        out = sdpa(q, q, q, mask)
    names = minkernels.attention.__globals__["Options"]._fields
    options = dict(zip(names, ops.args[0][3:], strict=False))
    assert options["mask"] is None and torch.equal(options["key_mask"], mask[:, 0, 0])
    assert out[1].eq(0).all()  # an entry without keys: zeros, on every backend


def samples(function, dtype):
    pytest.importorskip("expecttest")
    from torch.testing._internal.common_methods_invocations import op_db  # takes seconds

    (info,) = (info for info in op_db if info.name == f"nn.functional.{function}" and not info.variant_test_name)
    for sample in info.sample_inputs("cpu", dtype, requires_grad=False):
        if function == "multi_head_attention_forward":
            sample.kwargs["need_weights"] = False
            if sample.kwargs["training"]:
                continue
        if not sample.kwargs.get("dropout_p"):
            yield info.op, (sample.input, *sample.args), sample.kwargs


@pytest.mark.parametrize("function", FUNCTIONS)
def test_pytorch_samples(function):
    served = count = 0
    for op, args, kwargs in samples(function, torch.float64):
        theirs = op(*args, **kwargs)
        with minkernels.swapped():
            result, names = ours(op, *args, **kwargs)
        torch.testing.assert_close(result, theirs, check_stride=False)
        served, count = served + bool(names), count + 1
    broadcast = 4 if function == "scaled_dot_product_attention" else 0  # queries of three dimensions with keys of four
    assert count > 10 and served == count - broadcast, f"{served} of {count}"


LOSSES = {
    "labels": (F.cross_entropy, (6, 9), lambda: torch.randint(9, (6,)), {}),
    "ignored": (F.cross_entropy, (6, 9), lambda: torch.tensor([0, -1, 2, -1, 8, 1]), {"ignore_index": -1, "label_smoothing": 0.1}),
    "image": (F.cross_entropy, (2, 9, 3, 4), lambda: torch.randint(9, (2, 3, 4)), {"reduction": "sum"}),
    "one-row": (F.cross_entropy, (9,), lambda: torch.tensor(3), {"reduction": "none"}),
    "probabilities": (F.cross_entropy, (6, 9), lambda: torch.rand(6, 9), {}),
    "bce": (F.binary_cross_entropy_with_logits, (6, 9), lambda: torch.rand(6, 9), {}),
    "bce-none": (F.binary_cross_entropy_with_logits, (6, 9), lambda: torch.rand(6, 9), {"reduction": "none"}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
@pytest.mark.parametrize("case", LOSSES.values(), ids=LOSSES)
def test_losses(case, weighted, dtype):
    function, shape, target, options = case
    x, target = tensor(*shape, dtype=dtype), target()
    target = target.to(dtype) if target.is_floating_point() else target
    weight = torch.rand(9).to(dtype) if weighted else None

    def call(x, target):
        if function is F.cross_entropy:
            return function(x, target, None if weight is None else weight.to(x.dtype), **options)
        return function(x, target, pos_weight=None if weight is None else weight.to(x.dtype), **options)

    with minkernels.swapped():
        actual, names = ours(run, call, [x, target])
    assert names[0] in ("cross_entropy_fwd", "sigmoid_loss_fwd")
    assert actual[0].dtype == torch.promote_types(dtype, torch.float32)
    double = target.double() if target.is_floating_point() else target
    judged(actual, run(call, [x, target]), run(call, [x.detach().double().requires_grad_(), double]), dtype)


class Tagged(torch.Tensor):
    pass


def forward_mode(function, x, *rest):
    with torch.autograd.forward_ad.dual_level():
        return torch.autograd.forward_ad.unpack_dual(function(torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)), *rest)).tangent


q4, x2, t2, y2 = torch.randn(2, 3, 5, 8), torch.randn(4, 6), torch.tensor([0, 1, 2, 5]), torch.rand(4, 6)
LACKED = {  # a call, of which PyTorch's own is to be run
    "subclass": lambda: sdpa(q4.as_subclass(Tagged), q4, q4),
    "nested": lambda: sdpa(*[torch.nested.nested_tensor([torch.ones(3, 5, 8), torch.ones(3, 2, 8)])] * 3).to_padded_tensor(0),
    "jagged": lambda: sdpa(
        *[torch.nested.nested_tensor([torch.ones(5, 3, 8), torch.ones(2, 3, 8)], layout=torch.jagged).transpose(1, 2)] * 3
    ).values(),
    "meta": lambda: torch.zeros(sdpa(q4.to("meta"), q4.to("meta"), q4.to("meta")).shape),
    "batch-broadcast": lambda: sdpa(q4, q4[:1], q4[:1]),
    "head-broadcast": lambda: sdpa(q4, q4[:, :1], q4),
    "two-dimensions": lambda: sdpa(q4[0, 0], q4[0, 0], q4[0, 0]),
    "no-dimensions": lambda: sdpa(q4.sum(), q4.sum(), q4.sum()),
    "wide-heads": lambda: sdpa(torch.ones(1, 1, 2, 257), torch.ones(1, 1, 2, 257), torch.ones(1, 1, 2, 257)),
    "all-dropped": lambda: sdpa(q4, q4, q4, dropout_p=1.0),
    "mask-and-causal": lambda: sdpa(q4, q4, q4, torch.ones(5, 5).bool(), is_causal=True),
    "mask-too-small": lambda: sdpa(q4, q4, q4, torch.ones(5, 4).bool()),
    "heads-do-not-fit": lambda: sdpa(torch.randn(2, 4, 5, 8), torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 8)),
    "mask-of-another-dtype": lambda: sdpa(q4, q4, q4, torch.ones(5, 5, dtype=torch.float64)),
    "forward-mode-attention": lambda: forward_mode(lambda q: sdpa(q, q, q), q4),
    "forward-mode-loss": lambda: forward_mode(lambda x: F.cross_entropy(x, t2), x2),
    "size-average": lambda: F.cross_entropy(x2, t2, size_average=False),
    "reduce": lambda: F.binary_cross_entropy_with_logits(x2, y2, reduce=False),
    "bad-reduction": lambda: F.cross_entropy(x2, t2, reduction="median"),
    "labels-int32": lambda: F.cross_entropy(x2, t2.int()),
    "labels-too-many": lambda: F.cross_entropy(x2, torch.zeros(5, dtype=torch.int64)),
    "probabilities-ignored": lambda: F.cross_entropy(x2, y2, ignore_index=1),
    "probabilities-wider": lambda: F.cross_entropy(x2, y2.double()),
    "weight-with-gradient": lambda: F.cross_entropy(x2, y2, torch.rand(6, requires_grad=True).mul(0).add(1)),
    "smoothing-too-large": lambda: F.cross_entropy(x2, t2, label_smoothing=1.5),
    "no-classes": lambda: F.cross_entropy(x2[:, :0], t2),
    "loss-subclass": lambda: F.cross_entropy(x2.as_subclass(Tagged), t2),
    "bce-target-with-gradient": lambda: F.binary_cross_entropy_with_logits(x2, y2.clone().requires_grad_()),
    "bce-target-other-dtype": lambda: F.binary_cross_entropy_with_logits(x2, y2.double()),
    "bce-shapes": lambda: F.binary_cross_entropy_with_logits(x2, y2[:1]),
    "bce-weight-larger": lambda: F.binary_cross_entropy_with_logits(x2, y2, torch.ones(2, 4, 6), reduction="none"),
    "bce-int": lambda: F.binary_cross_entropy_with_logits(x2, t2[:, None].expand(4, 6)),
}


@pytest.mark.filterwarnings("ignore:.*nested tensors:UserWarning", "ignore:size_average:UserWarning", "ignore:An output with:UserWarning")
@pytest.mark.parametrize("call", LACKED.values(), ids=LACKED)
def test_what_we_lack_is_pytorchs(call):
    try:
        theirs = call()
    except Exception as error:
        with minkernels.swapped(), pytest.raises(type(error)) as raised:
            call()
        assert str(raised.value) == str(error)
        return
    with minkernels.swapped():
        result, names = ours(call)
    assert not names and type(result) is type(theirs)
    torch.testing.assert_close(result, theirs, rtol=0, atol=0, equal_nan=True)


def test_infinite_logits():
    """Two of these PyTorch makes NaN, by 0 * inf."""
    x, target = torch.tensor([torch.inf, -torch.inf, -torch.inf]), torch.tensor([0.0, 1.0, 0.5])
    with minkernels.swapped():
        assert F.binary_cross_entropy_with_logits(x, target, reduction="none").isposinf().all()


def test_subclasses_hear_of_the_method_that_was_called():
    heard = []

    class Listening(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            heard.append(func)
            return super().__torch_function__(func, types, args, kwargs)

    x = torch.randn(2, 6).as_subclass(Listening)
    with minkernels.swapped():
        x.unflatten(1, (2, 3))
    assert heard[0] is torch.Tensor.unflatten


def test_labels_out_of_range():
    with minkernels.swapped(), pytest.raises(IndexError, match=r"target\[1\] is 6"):
        F.cross_entropy(x2, torch.tensor([0, 6, 1, 2]))


def test_autocast():
    q, k, v = (torch.randn(1, 2, 5, 8) for _ in range(3))
    with torch.autocast("cpu", torch.bfloat16), minkernels.swapped():
        out, names = ours(sdpa, q, k, v.bfloat16())  # of rotated queries and keys, say
        assert names == ["attention_fwd"] and out.dtype == torch.bfloat16
        loss, names = ours(F.cross_entropy, torch.randn(3, 5).bfloat16(), torch.tensor([1, 2, 3]))
        assert names == ["cross_entropy_fwd"] and loss.dtype == torch.float32


def test_scope():
    q = torch.randn(1, 2, 5, 8)
    fast = torch.backends.mha.get_fastpath_enabled()
    with pytest.raises(KeyError), minkernels.swapped():
        with minkernels.swapped() as inner:  # again inside
            assert inner is None
            assert ours(sdpa, q, q, q)[1] == ["attention_fwd"]
        assert ours(sdpa, q, q, q)[1] == ["attention_fwd"]
        elsewhere = []
        thread = threading.Thread(target=lambda: elsewhere.append(ours(sdpa, q, q, q)[1]))
        thread.start()
        thread.join()
        assert elsewhere == [[]]
        raise KeyError
    assert ours(sdpa, q, q, q)[1] == []
    assert torch._C._len_torch_function_stack() == 0 and torch.backends.mha.get_fastpath_enabled() == fast
    with pytest.raises(TypeError, match="takes no options, got strict"):
        minkernels.swapped(strict=True).__enter__()


def test_every_function_has_its_name():
    assert [getattr(functional, name).__name__ for name in mode.NAMES] == [*mode.NAMES]
    assert set(FUNCTIONS) < set(mode.NAMES)


class Block(nn.Module):
    """As many a model: heads by unflatten, a residual, a loss."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 5)

    def forward(self, x, target):
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        x = x + sdpa(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        return F.cross_entropy(self.out(x).flatten(0, 1), target.flatten())


@pytest.mark.parametrize("where", ["inside", "around"])
def test_compile(where):
    torch._dynamo.reset()
    block, x, target = Block(), torch.randn(2, 6, 16), torch.randint(5, (2, 6))

    def inside(x, target):
        with minkernels.swapped():
            return block(x, target)

    graphs = Graphs()
    compiled = torch.compile(inside if where == "inside" else block, fullgraph=True, dynamic=True, backend=graphs)
    expected = block(x, target)
    expected.backward()
    grads = [p.grad for p in block.parameters()]
    block.zero_grad()
    with minkernels.swapped() if where == "around" else torch.enable_grad():
        loss = compiled(x, target)
        compiled(torch.randn(3, 9, 16), torch.randint(5, (3, 9)))
    assert {"attention_fwd", "cross_entropy_fwd"} <= graphs.names and graphs.count == 1  # for both lengths
    loss.backward()
    torch.testing.assert_close(loss, expected)
    for p, grad in zip(block.parameters(), grads, strict=True):
        torch.testing.assert_close(p.grad, grad)
    if where == "around":  # and outside, the compiled model is PyTorch's again
        graphs.names.clear()
        compiled(x, target)
        assert graphs.count == 2 and not graphs.names


@pytest.mark.filterwarnings("ignore:.*nested tensors:UserWarning")
def test_fast_paths_come_to_us():
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0)
    encoder, x = nn.TransformerEncoder(layer, 2).eval(), torch.randn(2, 5, 16)
    padding = torch.tensor([[False] * 5, [False, False, False, True, True]])
    with torch.no_grad():
        theirs = encoder(x, src_key_padding_mask=padding)
        with minkernels.swapped():
            result, names = ours(encoder, x, src_key_padding_mask=padding)
    assert names == ["attention_fwd"] * 2
    torch.testing.assert_close(result[~padding], theirs[~padding])


@pytest.mark.parametrize("name", ["cross_entropy", "binary_cross_entropy_with_logits"])
def test_a_loss_of_what_is_no_tensor_fails_as_before(name):
    loss, target = getattr(F, name), torch.rand(2, 4)
    for args in ([1.0], target), (None, target), (target, None), (target.to_sparse(), target):
        with pytest.raises(Exception) as theirs:
            print(loss(*args))
        with minkernels.swapped(), pytest.raises(theirs.type) as found:
            print(loss(*args))
        assert str(found.value) == str(theirs.value)
