"""Sums as sequences of digits, as in minGPT's adder: 85 + 50 = 135 is 8 5 5 0 5 3 1. The sum stands back to front: so the carry is
known when a digit is due.
"""

import torch
from torch import Tensor


def heldout(digits: int, most: int = 500) -> Tensor:
    """(pairs, 2): different pairs (a, b), a <= b, of numbers below 10**digits that training never sees, in neither order."""
    n = 10**digits
    pairs = torch.randint(n, (min(most, n * n // 20), 2), generator=torch.Generator().manual_seed(0))
    return pairs.sort(-1).values.unique(dim=0)


def sample(digits: int, batch: int, without: Tensor, generator: torch.Generator) -> Tensor:
    """(batch, 2): random pairs of numbers, none of those in `without`, in neither order."""
    hidden, pairs = _keys(without, digits), torch.randint(10**digits, (batch, 2), generator=generator)
    while (bad := torch.isin(_keys(pairs, digits), hidden)).any():
        pairs[bad] = torch.randint(10**digits, (int(bad.sum()), 2), generator=generator)
    return pairs


def encode(pairs: Tensor, digits: int) -> tuple[Tensor, Tensor]:
    """(N, 2) -> the digits of both numbers, (N, 2 digits), and those of the sum, back to front, (N, digits + 1)."""
    places = 10 ** torch.arange(digits + 1)
    a, b = (pairs[:, i, None] // places[:digits].flip(0) % 10 for i in (0, 1))
    return torch.cat((a, b), 1), pairs.sum(1, keepdim=True) // places % 10


def parallel(prompts: Tensor, answers: Tensor) -> tuple[Tensor, Tensor]:
    """What a decoder learns from: X1 X2 X3 Y1 Y2 as ids, -1 -1 Y1 Y2 Y3 as targets. (N, P), (N, A) -> both (N, P + A - 1)."""
    idx, hidden = torch.cat((prompts, answers), 1), torch.full_like(prompts[:, 1:], -1)
    return idx[:, :-1], torch.cat((hidden, answers), 1)


def _keys(pairs: Tensor, digits: int) -> Tensor:
    return pairs.amin(1) * 10**digits + pairs.amax(1)
