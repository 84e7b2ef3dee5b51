"""What a swapped call costs beside a direct call of our op, at sizes where nothing else counts."""

import copy
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from bench.timing import max_error
from minkernels import attention, bce_with_logits, cross_entropy, swap, swapped

CALLS = 1000  # in a row: a row's milliseconds are microseconds a call
sdpa = F.scaled_dot_product_attention


class Call(NamedTuple):
    name: str
    direct: Callable  # on our op
    theirs: Callable  # PyTorch's, swapped or not
    inputs: tuple[torch.Tensor, ...]
    module: nn.Module | None = None  # theirs(module, ...) is swapped by swap(module); without one, by swapped()

    def __str__(self):
        return self.name


class Attention(nn.Module):
    def forward(self, q):
        return sdpa(q, q, q)


class OurAttention(nn.Module):
    def forward(self, q):
        return attention(q, q, q)


class OurLoss(nn.Module):
    def forward(self, input, target):
        return cross_entropy(input, target)


class OurHeads(nn.MultiheadAttention):
    def forward(self, x):
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias).view(*x.shape[:2], 3, self.num_heads, self.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind()
        return F.linear(attention(q, k, v).transpose(1, 2).flatten(2), self.out_proj.weight, self.out_proj.bias)


def calls() -> list[Call]:
    q, mask = torch.randn(1, 1, 1, 8), torch.ones(1, 1, 1, 1).bool()
    x, labels, y, weight = torch.randn(2, 4), torch.tensor([0, 1]), torch.rand(2, 4), torch.rand(4)
    one, ours_one, loss, ours_loss = Attention(), OurAttention(), nn.CrossEntropyLoss(), OurLoss()
    mha, ours_mha = (cls(8, 1, batch_first=True) for cls in (nn.MultiheadAttention, OurHeads))
    ours_mha.load_state_dict(mha.state_dict())
    return [
        Call("F.scaled_dot_product_attention", lambda q: attention(q, q, q), lambda q: sdpa(q, q, q), (q,)),
        Call("F.scaled_dot_product_attention-mask", lambda q, m: attention(q, q, q, mask=m), lambda q, m: sdpa(q, q, q, m), (q, mask)),
        Call("F.cross_entropy", cross_entropy, F.cross_entropy, (x, labels)),
        Call("F.cross_entropy-weight", cross_entropy, F.cross_entropy, (x, labels, weight)),
        Call("F.cross_entropy-probabilities", cross_entropy, F.cross_entropy, (x, y)),
        Call("F.cross_entropy-spatial", cross_entropy, F.cross_entropy, (torch.randn(2, 4, 3), labels[:, None].expand(2, 3))),
        Call("F.binary_cross_entropy_with_logits", bce_with_logits, F.binary_cross_entropy_with_logits, (x, y)),
        Call(
            "F.binary_cross_entropy_with_logits-pos_weight",
            lambda x, y, w: bce_with_logits(x, y, pos_weight=w),
            lambda x, y, w: F.binary_cross_entropy_with_logits(x, y, pos_weight=w),
            (x, y, weight),
        ),
        Call("any-other-function", torch.neg, torch.neg, (q,)),
        Call("module-with-sdpa", ours_one, lambda m, q: m(q), (q,), one),
        Call("nn.CrossEntropyLoss", ours_loss, lambda m, *args: m(*args), (x, labels), loss),
        Call("nn.MultiheadAttention", ours_mha, lambda m, x: m(x, x, x, need_weights=False)[0], (torch.randn(1, 1, 8),), mha),
    ]


CASES = {"cpu": calls(), "cuda": calls(), "tiny": calls()[:1]}
IMPLS = ("minkernels", "minkernels-direct", "torch")


def bench_calls(timed, device, case, impl):
    def build():
        inputs = [t.to(device) for t in case.inputs]
        theirs = [] if case.module is None else [case.module.to(device)]
        twins = copy.deepcopy(theirs)
        for twin in twins:
            swap(twin, strict=True)

        def many(call, *args):
            with torch.no_grad():
                for _ in range(CALLS):
                    out = call(*args)
            return (out,)

        def inside(call, *args):
            with swapped():
                return many(call, *args)

        table = {
            "minkernels-direct": partial(many, case.direct, *inputs),
            "minkernels": partial(many if twins else inside, case.theirs, *twins, *inputs),
            "torch": partial(many, case.theirs, *theirs, *inputs),
        }
        doubles = [t.double() if t.is_floating_point() else t for t in inputs]
        exact = case.theirs(*(copy.deepcopy(m).double() for m in theirs), *doubles).detach()
        return table, lambda out: max_error(out, (exact,), torch.float32)

    timed("1000 swapped calls", build, shape=case.inputs[0].shape, dtype=torch.float32)
