"""What BERT learns from: [CLS] A [SEP] B [SEP] of one length, half the time B being what follows A, and 15 % of the tokens masked."""

from dataclasses import dataclass

import torch
from torch import Tensor

SHARE = 0.15  # of the tokens are to be guessed
PAD, UNK, CLS, SEP, MASK = SPECIAL = range(5)  # the first of every vocabulary that we train


@dataclass(frozen=True)
class Corpus:
    """Documents end to end. N tokens, S places where a sentence follows another one of its document."""

    ids: Tensor  # (N,) int32
    cuts: Tensor  # (S,) the index in ids of each of these places, rising
    first: Tensor  # (S,) where its document begins
    last: Tensor  # (S,) and ends
    others: Tensor  # (S, 2) the range of cuts that lie in the same document

    @classmethod
    def of(cls, documents: list[list[list[int]]]) -> "Corpus":
        """documents: of each its sentences, of each its ids."""
        ids, rows = [], []
        for sentences in documents:
            first, start = len(ids), len(rows)
            ids += (token for sentence in sentences for token in sentence)
            ends = torch.tensor([len(s) for s in sentences]).cumsum(0)[:-1].tolist()
            rows += [(first + end, first, len(ids), start, start + len(ends)) for end in ends]
        cuts, first, last, *others = torch.tensor(rows).reshape(-1, 5).unbind(1)
        return cls(torch.tensor(ids, dtype=torch.int32), cuts, first, last, torch.stack(others, 1))


def pairs(corpus: Corpus, at: Tensor, other: Tensor, length: int, generator: torch.Generator, short: float = 0.1):
    """The pair at each of the cuts `at` (B,); other (B,): 0 for the true B, 1 for one from another document, if there is another.

    Returns: ids (B, length), padded with PAD; segments (B, length): 0 or 1; used (B,): the tokens that are not padding. A share `short` of
    the pairs is cut to a random length.
    """
    B, S = len(at), len(corpus.cuts)
    start, end = corpus.others[at].unbind(1)
    alone = (end - start) == S
    draw = (torch.rand(B, generator=generator, dtype=torch.float64) * torch.where(alone, S, S - end + start)).long()
    elsewhere = torch.where(alone, draw, draw + (draw >= start) * (end - start))
    there = torch.where(other == 1, elsewhere, at)
    most = torch.full((B,), length - 3)
    cut = torch.rand(B, generator=generator) < short
    most = torch.where(cut, torch.randint(4, length - 2, (B,), generator=generator), most)
    len_a = torch.minimum(corpus.cuts[at] - corpus.first[at], most // 2)
    len_b = torch.minimum(corpus.last[there] - corpus.cuts[there], most - len_a)
    column = torch.arange(length)
    a, b = column - 1, column - 2 - len_a[:, None]  # the place in A and in B of each column
    in_a, in_b = (a >= 0) & (a < len_a[:, None]), (b >= 0) & (b < len_b[:, None])
    index = torch.where(in_a, corpus.cuts[at, None] - len_a[:, None] + a, torch.where(in_b, corpus.cuts[there, None] + b, 0))
    ids = torch.where(in_a | in_b, corpus.ids[index].long(), PAD)
    ids[:, 0] = CLS
    ids.scatter_(1, torch.stack((len_a + 1, len_a + len_b + 2), 1), SEP)
    used = len_a + len_b + 3
    return ids, ((b >= 0) & (column < used[:, None])).long(), used


def mask(ids: Tensor, vocab_size: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """(B, T) ids -> ids with a SHARE of the tokens of each sequence changed: 80 % to MASK, 10 % to any token, 10 % left; positions
    (B, P) of what is to be guessed, and labels (B, P): what it was, -1 where a sequence has fewer."""
    ordinary = ids >= len(SPECIAL)
    wanted = (ordinary.sum(1) * SHARE).round().clamp(min=1)
    order = torch.rand(ids.shape, generator=generator).masked_fill(~ordinary, -1.0)
    score, positions = order.topk(max(1, round(ids.shape[1] * SHARE)), dim=1)
    labels = ids.gather(1, positions).where((torch.arange(positions.shape[1]) < wanted[:, None]) & (score >= 0), -1)
    kind = torch.rand(labels.shape, generator=generator)
    random = torch.randint(len(SPECIAL), vocab_size, labels.shape, generator=generator)
    new = torch.where(kind < 0.8, MASK, torch.where(kind < 0.9, random, labels))
    return ids.scatter(1, positions, torch.where(labels < 0, ids.gather(1, positions), new)), positions, labels
