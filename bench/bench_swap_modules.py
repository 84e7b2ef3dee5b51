"""Encoders of torch.nn, swapped, beside themselves."""

import copy
from functools import partial
from typing import NamedTuple

import torch
from torch import nn

from bench.timing import max_error
from minkernels import swap


class Encoder(NamedTuple):
    batch: int
    length: int
    width: int
    dtype: torch.dtype
    training: bool = False
    padded: bool = False

    def __str__(self):
        what = "train" if self.training else "eval"
        return f"{what}-{self.batch}x{self.length}x{self.width}-{str(self.dtype).removeprefix('torch.')}{'-padded' * self.padded}"


CASES = {
    "cpu": [
        Encoder(*shape, dtype, training, padded)
        for *shape, padded in ((1, 1024, 512, False), (4, 256, 256, True))
        for dtype in (torch.float32, torch.bfloat16)
        for training in (False, True)
    ],
    "cuda": [Encoder(16, 1024, 1024, torch.bfloat16, training) for training in (False, True)],
    "tiny": [Encoder(2, 6, 16, torch.float32, training, True) for training in (False, True)],
}
IMPLS = {"minkernels": True, "torch": False}


def bench_encoder(timed, device, case, impl):
    """A layer of torch.nn; in eval PyTorch's own has a fast path."""

    def build():
        layer = nn.TransformerEncoderLayer(case.width, max(1, case.width // 64), 4 * case.width, dropout=0.0, batch_first=True)
        model = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False).to(device, case.dtype).train(case.training)
        x = torch.randn(case.batch, case.length, case.width, device=device, dtype=case.dtype)
        padding = torch.arange(case.length, device=device) >= torch.linspace(1, case.length, case.batch, device=device)[:, None]
        padding = padding if case.padded else None
        twin = copy.deepcopy(model)
        swap(twin)

        def step(model):
            if case.training:
                model.zero_grad()
                out = model(x, src_key_padding_mask=padding)
                out.float().square().mean().backward()
            else:
                with torch.no_grad():
                    out = model(x, src_key_padding_mask=padding)
            return (out.detach() if padding is None else out.detach()[~padding],)

        wide = copy.deepcopy(model).double().cpu()
        with torch.no_grad():
            exact = wide(x.double().cpu(), src_key_padding_mask=None if padding is None else padding.cpu()).to(device)
        exact = exact if padding is None else exact[~padding]
        return {"minkernels": partial(step, twin), "torch": partial(step, model)}, lambda out: max_error(out, (exact,), case.dtype)

    timed("nn.TransformerEncoder", build, shape=(case.batch, case.length, case.width), dtype=case.dtype)
