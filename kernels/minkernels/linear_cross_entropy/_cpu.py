"""How the linear layer with a softmax loss is fast on a CPU: PyTorch's matrix products, and the kernels of cross_entropy."""

from functools import cache, partial
from types import SimpleNamespace

import torch

from minkernels.cross_entropy import _cpu as kernels
from minkernels.cross_entropy._options import all_ignored, check_labels, is_labels
from minkernels.linear_cross_entropy import _chunked

CHUNK_BYTES = 16 << 20  # of logits
CHUNK_ROWS = 512  # at least: each chunk reads the weight twice, and reads and writes the sum of its gradients
PART = 2048  # classes whose product is formed at a time where it is not written or added at once

_add = torch.ops.minkernels._add_bfloat16.default


@cache
def multiplied(dtype):
    """In which dtype products are formed: float32 where this CPU has no instructions for a 16-bit one, in which PyTorch's take up to a
    hundred times as long."""
    known = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
    if dtype not in known or (torch.backends.mkldnn.is_available() and getattr(torch.ops.mkldnn, known[dtype])()):
        return dtype
    return torch.float32


def parts(classes):
    return (slice(i, i + PART) for i in range(0, classes, PART))


def logits(input, weight, bias, out):
    if (wide := multiplied(out.dtype)) == out.dtype:
        return _chunked.logits(input, weight, bias, out)
    input = input.to(wide)
    for part in parts(len(weight)):
        product = input @ weight[part].to(wide).T
        out[:, part] = product if bias is None else product.add_(bias[part])


def dinput(grad, weight, out):
    if (wide := multiplied(out.dtype)) == out.dtype:
        return torch.mm(grad, weight, out=out)
    total = torch.zeros_like(out, dtype=wide)
    for part in parts(len(weight)):
        total.addmm_(grad[:, part].to(wide), weight[part].to(wide))
    out.copy_(total)


class Sum:
    """out = the sum of grad.T @ input over all chunks, in float32 for 16-bit out."""

    def __init__(self, out, chunks):
        self.out, self.left, self.first = out, chunks, True
        self.low = self.wide = None
        if chunks > 1 and out.dtype == torch.bfloat16:
            self.low = torch.empty_like(out)
        elif chunks > 1 and out.dtype == torch.float16:
            self.wide = torch.zeros_like(out, dtype=torch.float32)

    def add(self, grad, input):
        self.left -= 1
        wide = multiplied(grad.dtype)
        if self.low is None and self.wide is None and wide == grad.dtype:
            (torch.mm if self.first else partial(torch.addmm, self.out))(grad.T, input, out=self.out)
        else:
            input = input.to(wide)
            for part in parts(len(self.out)):
                product = grad[:, part].to(wide).T @ input
                if self.low is not None:
                    _add(self.out[part], self.low[part], product, self.first, self.left == 0)
                elif self.wide is not None:
                    self.wide[part] += product
                else:
                    self.out[part] = product
        self.first = False

    def finish(self):
        if self.first:
            self.out.zero_()
        elif self.wide is not None:
            self.out.copy_(self.wide)


def compact(target, ignore_index, input, *tensors):
    """The rows that count, and where they were; None where all do. With positions all rows, those that count at none without what they
    may hold: 0 * NaN is NaN."""
    if is_labels(target):
        ignored = all_ignored(target, ignore_index)
        if ignored.any():
            if target.dim() > 1:
                return None, (input.masked_fill(ignored[:, None], 0.0), *tensors)
            kept = (~ignored).nonzero()[:, 0]
            return kept, [t[kept] for t in (input, *tensors)]
    return None, (input, *tensors)


_road = SimpleNamespace(
    fwd=kernels.part, stats=kernels.stats, grad=kernels.grad, check_labels=check_labels, compact=compact, logits=logits, dinput=dinput,
    Sum=Sum, CHUNK_BYTES=CHUNK_BYTES, CHUNK_ROWS=CHUNK_ROWS,
)  # fmt: skip
fwd, stats, grad = (partial(f, _road) for f in (_chunked.fwd, _chunked.stats, _chunked.grad))
