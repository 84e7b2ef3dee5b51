"""What the tests of swapped models share."""

import copy

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention as sdpa
from torch.utils._python_dispatch import TorchDispatchMode

from judge import assert_close


class Ops(TorchDispatchMode):
    """Which operators of ours ran inside, in order, and with what."""

    def __init__(self):
        super().__init__()
        self.names, self.args = [], []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op.namespace == "minkernels":
            self.names.append(op._opname)
            self.args.append(args)
        return op(*args, **(kwargs or {}))


def ours(function, *args, **kwargs):
    """(result, names of our operators that ran)"""
    with Ops() as ops:
        result = function(*args, **kwargs)
    return result, ops.names


def attend(q, k, v):
    return sdpa(q, k, v)


class Attention(nn.Module):
    """As timm's: F.scaled_dot_product_attention, here in a function of the same package that a method calls."""

    def __init__(self, width=32, heads=4):
        super().__init__()
        self.heads, self.qkv, self.proj = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        return self.proj(self.heads_of(x).transpose(1, 2).flatten(2))

    def heads_of(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return attend(q, k, v)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.attn = Attention()
        self.head = nn.Linear(32, 7)
        self.loss = nn.CrossEntropyLoss(ignore_index=3)

    def forward(self, x, target, padding=None):
        x = self.attn(self.encoder(x, src_key_padding_mask=padding))
        return self.loss(self.head(x).flatten(0, 1), target.flatten())


def batch(length=5):
    padding = torch.zeros(2, length, dtype=torch.bool)
    padding[1, 3:] = True
    return torch.randn(2, length, 32), torch.randint(7, (2, length)), padding


class Graphs:
    """A backend of torch.compile that runs a graph as it is, and knows the operators of ours in all graphs so far."""

    def __init__(self):
        self.count, self.names = 0, set()

    def __call__(self, graph, example_inputs):
        self.count += 1
        for module in graph.modules():  # an autograd.Function is a graph inside the graph
            for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
                if getattr(node.target, "namespace", "") == "minkernels":
                    self.names.add(node.target._opname)
        return graph


def run(function, inputs, parameters=()):
    """[output, gradients of inputs, of parameters] under an upstream gradient that depends on shapes alone."""
    inputs = [t.detach().clone().requires_grad_(t.is_floating_point() and t.requires_grad) for t in inputs]
    out = function(*inputs)
    wanted = [t for t in (*inputs, *parameters) if t.requires_grad]
    upstream = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).reshape(out.shape).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, wanted, upstream, allow_unused=True)]


def judged(actual, plain, exact, dtype, what="", draws=1):
    """Each result within the budget of tests/judge.py; what has no gradient in one has none in the others."""
    for i, (a, p, e) in enumerate(zip(actual, plain, exact, strict=True)):
        assert (a is None) == (e is None), f"{what}: gradient {i} is there in one only"
        if e is not None:
            assert_close(a, p, e, dtype, f"{what} result {i}", draws=draws)


def module_judged(module, swapped, inputs, call=None, what=""):
    """A swapped copy of a module against the module: outputs and gradients of inputs and parameters."""
    call = call or (lambda m, *args: m(*args))
    wide = copy.deepcopy(module).double()
    doubles = [t.double() if t.is_floating_point() else t for t in inputs]
    for t, d in zip(inputs, doubles, strict=True):
        d.requires_grad_(t.requires_grad)
    results = [
        run(lambda *args, m=m: call(m, *args), given, list(m.parameters()))
        for m, given in ((swapped, inputs), (module, inputs), (wide, doubles))
    ]
    judged(*results, next(t.dtype for t in inputs if t.is_floating_point()), what, draws=2)  # a module is many sums
