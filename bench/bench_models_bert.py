"""One training step of GPT-1 and minBERT at their default sizes, on our ops, beside the same models on PyTorch's."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch

from bench.model_step import IMPLS, training_step  # noqa: F401  conftest.py reads IMPLS
from minmodels import gpt1, minbert
from minmodels.data import pairs


class Case(NamedTuple):
    name: str
    model: Callable[[], torch.nn.Module]
    batch: Callable[[], tuple[torch.Tensor, ...]]
    dtype: torch.dtype  # float32, or the dtype of autocast

    def __str__(self):
        return f"{self.name}-{str(self.dtype).removeprefix('torch.')}"


def windows(vocab, batch, T):
    return torch.randint(vocab, (2, batch, T)).unbind()


def examples(classes, S, vocab, batch, T):
    """Of a task: ids, the places of EXTRACT, labels."""
    return torch.randint(vocab, (batch, S, T)), torch.randint(T // 2, T, (batch, S)), torch.randint(classes, (batch,))


def masked_pairs(vocab, batch, T):
    """Three quarters of the sequences are full, as with short documents."""
    ids = torch.randint(len(pairs.SPECIAL), vocab, (batch, T))
    used = torch.where(torch.arange(batch) % 4 == 0, T // 2, T)
    key_mask, segments = torch.arange(T) < used[:, None], (torch.arange(T) >= used[:, None] // 2).long()
    ids, positions, labels = pairs.mask(ids.where(key_mask, pairs.PAD), vocab, torch.Generator().manual_seed(0))
    return ids, segments, key_mask, positions, labels, torch.arange(batch) % 2


def gpt(*sizes):
    return partial(gpt1.GPT1, gpt1.GPT1Config(*sizes, dropout=0.0))


def task(kind, classes, *sizes):
    return partial(gpt1.GPT1Task, gpt1.GPT1Config(*sizes, dropout=0.0), kind, classes)


def bert(*sizes):
    return partial(minbert.BERT, minbert.BERTConfig(*sizes))


def cases(dtype):
    small = 2000, 128, 4, 4, 128
    return [
        Case("gpt1", gpt(*small), partial(windows, 2000, 32, 128), dtype),
        Case("gpt1-similarity", task("similarity", 2, *small), partial(examples, 2, 2, 2000, 32, 48), dtype),
        Case("minbert", bert(2000, 128, 4, 4, 512, 128), partial(masked_pairs, 2000, 32, 128), dtype),
        Case("minbert-slice", bert(30522, 768, 2, 12, 3072, 512), partial(masked_pairs, 30522, 4, 128), dtype),  # of BERT base
    ]


TINY = [
    Case("gpt1", gpt(11, 8, 1, 2, 16), partial(windows, 11, 2, 5), torch.float32),
    Case("minbert", bert(11, 16, 1, 2, 32, 8), partial(masked_pairs, 11, 2, 8), torch.float32),
]
CASES = {**dict.fromkeys(("cpu", "cuda"), cases(torch.float32) + cases(torch.bfloat16)), "tiny": TINY}


def bench_step(timed, device, case, impl):
    def build():
        return training_step(case.model().to(device), [t.to(device) for t in case.batch()], case.dtype)

    shape, rounds = case.batch()[0].shape, {"min_rounds": 3} if case.name == "minbert-slice" else {}
    timed("language model step", build, shape=shape, dtype=case.dtype, tokens=shape.numel(), **rounds)
