"""How the linear layer with a softmax loss is fast on a GPU: cuBLAS, and the Triton kernels of cross_entropy."""

from functools import partial
from types import SimpleNamespace

import torch

from minkernels.cross_entropy import _triton as kernels
from minkernels.cross_entropy._options import all_ignored, is_labels
from minkernels.linear_cross_entropy import _chunked

CHUNK_BYTES = 1 << 30  # of logits
CHUNK_ROWS = 2048  # at least: fewer leave the matrix products short of work


class Sum:
    """out = the sum of grad.T @ input over all chunks, in float32."""

    def __init__(self, out, chunks):
        self.out, self.first = out, True
        self.wide = out if chunks <= 1 or out.dtype == torch.float32 else torch.empty_like(out, dtype=torch.float32)

    def add(self, grad, input):
        mixed = {} if self.wide.dtype == grad.dtype else {"out_dtype": torch.float32}
        if mixed and grad.dtype == torch.float16 and torch.backends.cuda.matmul.allow_fp16_accumulation:  # then PyTorch refuses it
            product = torch.mm(grad.T, input)
            self.wide.copy_(product) if self.first else self.wide.add_(product)
        elif self.first:
            torch.mm(grad.T, input, out=self.wide, **mixed)
        else:
            torch.addmm(self.wide, grad.T, input, out=self.wide, **mixed)
        self.first = False

    def finish(self):
        if self.first:
            self.out.zero_()
        elif self.wide is not self.out:
            self.out.copy_(self.wide)


def compact(target, ignore_index, input, *tensors):
    """All rows, since how many count only the device knows; the others without what they may hold: 0 * NaN is NaN."""
    if is_labels(target):
        input = input.masked_fill(all_ignored(target, ignore_index)[:, None], 0.0)
    return None, (input, *tensors)


_road = SimpleNamespace(
    fwd=kernels.fwd, stats=kernels.stats, grad=kernels.grad, logits=_chunked.logits, dinput=torch.mm,
    Sum=Sum, CHUNK_BYTES=CHUNK_BYTES, CHUNK_ROWS=CHUNK_ROWS,
    check_labels=lambda *_: None,  # the kernels assert
    compact=compact,
)  # fmt: skip
fwd, stats, grad = (partial(f, _road) for f in (_chunked.fwd, _chunked.stats, _chunked.grad))
