"""One training step of minGPT on our ops, beside the same model on F.scaled_dot_product_attention and F.cross_entropy."""

from typing import NamedTuple

import torch

from bench.model_step import IMPLS, training_step  # noqa: F401  conftest.py reads IMPLS
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


def bench_step(timed, device, case, impl):
    config, T = case.config, case.config.block_size

    def build():
        batch = torch.randint(config.vocab_size, (2, case.batch, T), device=device).unbind()
        return training_step(GPT(config).to(device), batch, case.dtype, one_by_one=True)

    rounds = {"min_rounds": 3} if config.n_embd > 128 else {}  # seconds a step on a CPU
    timed("minGPT step", build, shape=(case.batch, T), dtype=case.dtype, tokens=case.batch * T, **rounds)
