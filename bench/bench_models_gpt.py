"""One training step of the language models at their default sizes, on our ops, beside the same models on PyTorch's."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch

from bench.model_step import IMPLS, training_step  # noqa: F401  conftest.py reads IMPLS
from minmodels import bigram, mingpt, transformer
from minmodels.data import adder, reverse


class Case(NamedTuple):
    name: str
    model: Callable[[], torch.nn.Module]
    batch: Callable[[], tuple[torch.Tensor, ...]]
    dtype: torch.dtype  # float32, or the dtype of autocast

    def __str__(self):
        return f"{self.name}-{str(self.dtype).removeprefix('torch.')}"


def windows(vocab, batch, T):
    return torch.randint(vocab, (2, batch, T)).unbind()


def sums(digits, batch):
    return adder.parallel(*adder.encode(torch.randint(10**digits, (batch, 2)), digits))


def words(longest, batch):
    return reverse.pairs(reverse.sample(longest, batch, set(), torch.Generator().manual_seed(0)), longest)


def gpt(*sizes):
    return partial(mingpt.GPT, mingpt.GPTConfig(*sizes))


def cases(dtype):
    return [
        Case("bigram", partial(bigram.Bigram, bigram.BigramConfig(103)), partial(windows, 103, 32, 64), dtype),
        Case("gpt-topics", gpt(103, 256, 4, 6, 192), partial(windows, 103, 16, 256), dtype),
        Case("adder", gpt(10, 6, 3, 4, 64), partial(sums, 2, 128), dtype),
        Case("transformer", reverser(2, 4, 64), partial(words, 12, 64), dtype),
    ]


def reverser(*sizes):
    return partial(transformer.Transformer, transformer.TransformerConfig(reverse.VOCAB, *sizes))


TINY = [
    Case("bigram", partial(bigram.Bigram, bigram.BigramConfig(11)), partial(windows, 11, 2, 5), torch.float32),
    Case("adder", gpt(10, 3, 1, 2, 16), partial(sums, 1, 3), torch.float32),
    Case("transformer", reverser(1, 2, 16), partial(words, 5, 3), torch.float32),
]
CASES = {**dict.fromkeys(("cpu", "cuda"), cases(torch.float32) + cases(torch.bfloat16)), "tiny": TINY}


def bench_step(timed, device, case, impl):
    def build():
        return training_step(case.model().to(device), [t.to(device) for t in case.batch()], case.dtype)

    shape = case.batch()[0].shape
    timed("language model step", build, shape=shape, dtype=case.dtype, tokens=shape.numel())
