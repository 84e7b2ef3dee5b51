"""One training step of minGPT on our ops, beside the same model on F.scaled_dot_product_attention and F.cross_entropy."""

import copy
from functools import cache, partial
from typing import NamedTuple

import torch

from bench.timing import max_error
from minmodels.kernels import using
from minmodels.mingpt import GPT, GPTConfig


class Case(NamedTuple):
    name: str
    config: GPTConfig
    batch: int
    dtype: torch.dtype  # float32, or the dtype of autocast

    def __str__(self):
        return f"{self.name}-{str(self.dtype).removeprefix('torch.')}"


SHOWCASE = GPTConfig(vocab_size=103, block_size=64, n_layer=3, n_head=4, n_embd=128)  # what `make run` trains on characters
SLICE = GPTConfig(vocab_size=50257, block_size=256, n_layer=2, n_head=12, n_embd=768)  # two layers of GPT-2 small
TINY = GPTConfig(vocab_size=17, block_size=8, n_layer=1, n_head=2, n_embd=16)
CASES = {
    "cpu": [
        Case("showcase", SHOWCASE, 32, torch.float32),
        Case("gpt2-slice", SLICE, 2, torch.float32),
        Case("gpt2-slice", SLICE, 2, torch.bfloat16),
    ],
    "cuda": [
        Case("gpt2-small", GPTConfig(), 8, torch.bfloat16),
        Case("showcase", SHOWCASE, 32, torch.bfloat16),
    ],
    "tiny": [Case("tiny", TINY, 2, torch.float32)],
}
IMPLS = {"minkernels": "fused", "torch": "torch"}  # the kernels that the model runs on


def loss_of(model, idx, targets, *, kernels, autocast=None):
    with using(kernels), torch.autocast(idx.device.type, autocast, enabled=autocast is not None):
        return model(idx, targets)


def bench_step(timed, device, case, impl):
    config, T = case.config, case.config.block_size
    autocast = None if case.dtype == torch.float32 else case.dtype

    def build():
        initial = GPT(config).to(device)
        idx, targets = torch.randint(config.vocab_size, (2, case.batch, T), device=device)

        def step(model, optimizer, kernels):
            loss = loss_of(model, idx, targets, kernels=kernels, autocast=autocast)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return (loss.detach(),)

        @cache
        def exact():  # one sequence at a time, for the memory; every target counts, so the means may be averaged
            model, pairs = copy.deepcopy(initial).double(), zip(idx.split(1), targets.split(1), strict=True)
            with torch.no_grad():
                return (torch.stack([loss_of(model, i, t, kernels="torch") for i, t in pairs]).mean(),)

        steps = {}
        for name, kernels in IMPLS.items():
            model = copy.deepcopy(initial)
            steps[name] = partial(step, model, torch.optim.AdamW(model.parameters(), lr=1e-3), kernels)
        return steps, lambda outputs: max_error(outputs, exact(), case.dtype)  # of the first step: the weights move on

    rounds = {"min_rounds": 3} if config.n_embd > 128 else {}  # seconds a step on a CPU
    timed("minGPT step", build, shape=(case.batch, T), dtype=case.dtype, tokens=case.batch * T, **rounds)
