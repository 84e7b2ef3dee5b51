"""swap, unswap and swapped of models made of torch.nn and of code that calls its functions."""

import copy
import functools
import subprocess
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import minkernels
from minkernels import SwapReport, swap, swapped, unswap
from swap_cases import Attention, Graphs, Model, batch, module_judged, ours

pytestmark = [
    pytest.mark.usefixtures("library"),
    pytest.mark.filterwarnings("ignore:.*nested tensors:UserWarning", "ignore:enable_nested_tensor:UserWarning", "ignore:Support for mis"),
]


class Processor:
    def __call__(self, module, x):
        return F.scaled_dot_product_attention(x, x, x, scale=module.scale)


class Processed(nn.Module):
    """As diffusers': a plain object does the work."""

    def __init__(self):
        super().__init__()
        self.processor, self.scale = Processor(), 0.5

    def forward(self, x):
        return self.processor(self, x)


class Inherited(nn.CrossEntropyLoss):
    def forward(self, input, target):
        return 2 * super().forward(input, target)


class Overridden(nn.CrossEntropyLoss):
    def forward(self, input, target):
        return (input.softmax(1) - F.one_hot(target, input.shape[1])).square().mean()


class Static(nn.Module):
    @staticmethod
    def forward(input, target):
        return F.cross_entropy(input, target)


class OfClass(nn.Module):
    scale = 3

    @classmethod
    def forward(cls, input, target):
        return cls.scale * F.cross_entropy(input, target)


class decorated:
    """As those of wrapt: an object that binds itself, and called by its class takes the module first."""

    def __init__(self, function):
        functools.update_wrapper(self, function)

    def __get__(self, module, cls):
        return self if module is None else types.MethodType(self.__wrapped__, module)

    def __call__(self, module, *args):
        return self.__wrapped__(module, *args)


class Decorated(nn.Module):
    @decorated
    @torch.enable_grad()
    def forward(self, input, target):
        return F.cross_entropy(input, target)


class Trainer(nn.Module):
    """Its loss is not in forward; nms is a function of its own."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return self.nms(self.linear(x))

    def nms(self, x):
        return x.relu()

    def training_step(self, x, target):
        return F.cross_entropy(self(x), target)


def state_of(model):
    """Everything that a swap may not change: attributes, parameters, buffers, hooks, and what the classes and torch hold."""
    modules = {name: {k: v if isinstance(v, nn.Module | torch.Tensor) else copy.copy(v) for k, v in vars(m).items()}
               for name, m in model.named_modules()}  # fmt: skip
    classes = {cls: dict(vars(cls)) for m in model.modules() for cls in type(m).__mro__}
    functions = {name: getattr(F, name) for name in dir(F)}
    kernels = [torch._C._dispatch_get_registrations_for_dispatch_key(key) for key in ("CPU", "CUDA", "Autograd")]
    switches = torch.backends.mha.get_fastpath_enabled(), torch._C._len_torch_function_stack(), sorted(vars(torch.ops))
    return modules, classes, functions, kernels, switches


def same(a, b):
    if isinstance(a, torch.Tensor):
        return a is b
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(v, b[k]) for k, v in a.items())
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a is b or a == b


def test_report():
    model = nn.ModuleDict(
        {"model": Model(), "processed": Processed(), "inherited": Inherited(), "overridden": Overridden(), "trainer": Trainer()}
    )
    report = swap(model)
    assert {(r.where, r.what, r.by) for r in report.replaced} == {
        ("model.encoder", "nn.TransformerEncoder", "no nested tensors: padded places hold values, not zeros"),
        *((f"model.encoder.layers.{i}", "nn.TransformerEncoderLayer", "its own modules one by one, also in eval") for i in range(2)),
        ("model.encoder.layers.0.self_attn", "nn.MultiheadAttention", "attention, in calls with need_weights=False"),
        ("model.encoder.layers.1.self_attn", "nn.MultiheadAttention", "attention, in calls with need_weights=False"),
        ("model.attn", "sdpa", "attention, in its forward"),
        ("model.loss", "nn.CrossEntropyLoss", "cross_entropy (of 16-bit logits: float32)"),
        ("processed", "F.scaled_dot_product_attention", "attention, in its forward"),
        ("inherited", "F.cross_entropy", "cross_entropy, in its forward"),
    }
    assert {(x.where, x.what, x.why) for x in report.left} == {
        ("overridden", "a subclass of nn.CrossEntropyLoss", "it has a forward of its own"),
        ("trainer", "F.cross_entropy", "not called by forward: run what calls it inside swapped()"),
    }
    assert "model.encoder.layers.0.self_attn and 1 more" in str(report)
    again = swap(model)
    assert again.replaced == () and set(again.already) == set(report.replaced) and again.left == report.left
    with pytest.raises(ValueError, match=r"not all of it can be swapped(.|\n)*overridden"):
        swap(model, strict=True)
    assert set(unswap(model)) == set(report.replaced) and unswap(model) == ()


def test_nothing_to_swap():
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    assert swap(model) == SwapReport((), ()) and str(swap(model)) == "nothing to swap in this model"
    with pytest.raises(ValueError, match="nothing to swap"):
        swap(model, strict=True)
    for function in (swap, unswap):
        with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got int"):
            function(3)


def test_taken_back_bit_for_bit():
    model, (x, target, padding) = Model(), batch()
    model.head.register_forward_hook(lambda *_: None)
    ours(model, x, target, padding)  # PyTorch imports some of itself at the first call
    before, expected = state_of(model), model(x, target, padding)
    with swapped(model) as report:
        assert len(report.replaced) == 7
        out, names = ours(model, x, target, padding)
        assert names == ["attention_fwd"] * 3 + ["cross_entropy_fwd"]
        assert all(a is b for a, b in zip(model.state_dict(keep_vars=True).values(), model.parameters(), strict=True))
        torch.testing.assert_close(out, expected)
    assert same(state_of(model), before)
    assert torch.equal(model(x, target, padding), expected)
    with pytest.raises(KeyError), swapped(model):
        raise KeyError
    assert same(state_of(model), before)


class Generated(nn.Module):
    def forward(self, x):
        return F.binary_cross_entropy_with_logits(x, torch.ones_like(x))


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_modules_whose_forward_was_generated():
    script, graph = torch.jit.script(nn.Linear(3, 3)), torch.fx.symbolic_trace(Generated())
    model = nn.ModuleDict({"script": script, "graph": graph, "plain": Generated()})
    assert [r.where for r in swap(model).replaced] == ["graph", "plain"]
    x = torch.randn(4, 3)
    for name in ("graph", "plain"):
        loss, names = ours(model[name], x)
        assert names == ["sigmoid_loss_fwd"]
        torch.testing.assert_close(loss, Generated()(x))


def test_a_part():
    model, (x, target, padding) = Model().eval(), batch()
    swap(model)
    assert len(unswap(model.encoder)) == 5
    with torch.no_grad():
        assert ours(model, x, target, padding)[1] == ["attention_fwd", "cross_entropy_fwd"]
    assert len(swap(model).replaced) == 5
    unswap(model)
    swap(model.encoder.layers[1])  # the encoder hands it nested tensors
    with torch.no_grad():
        expected, layer = copy.deepcopy(model), model.encoder.layers[1]
        unswap(expected)
        torch.testing.assert_close(model(x, target, padding), expected(x, target, padding))
        assert ours(layer, x)[1] == ["attention_fwd"]


def test_inside_swapped():
    model, (x, target, padding) = Model(), batch()
    expected = model(x, target, padding)
    with swapped():
        swap(model)
        out, names = ours(model, x, target, padding)
    assert names == ["attention_fwd"] * 3 + ["cross_entropy_fwd"]
    torch.testing.assert_close(out, expected)
    assert ours(model, x, target, padding)[1] == names  # the model stays swapped
    unswap(model)


def test_models_of_transformers_are_anothers(monkeypatch):
    class PreTrainedModel(Model):
        pass

    package = types.ModuleType("transformers.modeling_utils")
    package.PreTrainedModel = PreTrainedModel
    monkeypatch.setitem(sys.modules, "transformers.modeling_utils", package)
    monkeypatch.delitem(sys.modules, "transformers", raising=False)  # without it its adapter stays away
    theirs = PreTrainedModel()
    report = swap(nn.ModuleDict({"theirs": nn.ModuleList([theirs]), "ours": nn.BCEWithLogitsLoss()}))
    inside = ["theirs.0.encoder.layers.0.self_attn", "theirs.0.encoder.layers.1.self_attn", "theirs.0.attn", "theirs.0.loss"]
    assert {r.where for r in report.replaced} >= {*inside, "ours"} and "theirs.0" not in {r.where for r in report.replaced}


@pytest.mark.parametrize("kind", ["attention", "processed", "inherited", "static", "of-class", "decorated", "ce", "bce"])
def test_modules(kind):
    x, labels = torch.randn(6, 9).requires_grad_(), torch.randint(9, (6,))
    module, inputs = {
        "attention": (Attention(), [torch.randn(2, 5, 32).requires_grad_()]),
        "processed": (Processed(), [torch.randn(2, 3, 5, 8).requires_grad_()]),
        "inherited": (Inherited(torch.rand(9), reduction="sum"), [x, labels]),
        "static": (Static(), [x, labels]),
        "of-class": (OfClass(), [x, labels]),
        "decorated": (Decorated(), [x, labels]),
        "ce": (nn.CrossEntropyLoss(torch.rand(9), ignore_index=2, label_smoothing=0.1), [x, labels]),
        "bce": (nn.BCEWithLogitsLoss(torch.rand(9), pos_weight=torch.rand(9)), [x, torch.rand(6, 9)]),
    }[kind]
    twin = copy.deepcopy(module)
    assert len(swap(twin, strict=True).replaced) == 1
    assert len(ours(twin, *inputs)[1]) == 1
    module_judged(module, twin, inputs)


def test_losses_that_we_lack_are_pytorchs():
    ce, bce, x = nn.CrossEntropyLoss(reduction="none"), nn.BCEWithLogitsLoss(), torch.randn(4, 6)
    ce.reduction = "mean"  # read at the call, as PyTorch does
    expected = ce(x, x.softmax(1).double()), bce(x, x.double())
    swap(ce), swap(bce)
    results = ours(ce, x, x.softmax(1).double()), ours(bce, x, x.double())
    assert all(names == [] and torch.equal(loss, e) for (loss, names), e in zip(results, expected, strict=True))


def test_hooks_run_once():
    model, (x, target, padding), calls = Model(), batch(), []
    for name, module in model.named_modules():
        module.register_forward_hook(lambda *_, name=name: calls.append(name))
    model(x, target, padding)
    expected = calls.copy()
    calls.clear()
    swap(model)
    model(x, target, padding)
    assert calls == expected


def test_compile():
    torch._dynamo.reset()
    model, (x, target, _), graphs = Model().eval(), batch(), Graphs()
    expected = model(x, target)
    swap(model)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=graphs)
    torch.testing.assert_close(compiled(x, target), expected)
    more = batch(9)[:2]
    torch.testing.assert_close(compiled(*more), model(*more))
    assert graphs.count == 1 and {"attention_fwd", "cross_entropy_fwd"} <= graphs.names
    grads = [torch.autograd.grad(m(x, target), list(model.parameters())) for m in (compiled, model)]
    torch.testing.assert_close(*grads)
    unswap(model)  # a compiled model notices
    graphs.names.clear()
    torch.testing.assert_close(compiled(x, target), expected)
    assert not graphs.names


def test_export():
    model, (x, target, _) = Model().eval(), batch()
    swap(model)
    lengths = {1: torch.export.Dim("length", max=64)}
    with torch.no_grad():
        program = torch.export.export(model, (x, target), dynamic_shapes=(lengths, lengths))
        names = [node.target._opname for node in program.graph.nodes if getattr(node.target, "namespace", "") == "minkernels"]
        assert names == ["attention_fwd"] * 3 + ["cross_entropy_fwd"]
        more = batch(9)[:2]
        torch.testing.assert_close(program.module()(*more), model(*more))


def test_nothing_happens_on_import():
    assert minkernels.swap is swap  # the function, and not the package of that name
    code = "import sys, torch, minkernels; print(*sorted(m for m in sys.modules if m.startswith('minkernels.swap')))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.split() == ["minkernels.swap", "minkernels.swap.api", "minkernels.swap.changes"]
