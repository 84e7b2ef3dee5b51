"""The bigram model: what comes next depends on the present token alone. The first step of every course on language models.

Shapes: B batch, T tokens, V vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from minmodels.kernels import cross_entropy
from minmodels.sampling import sample


@dataclass(frozen=True)
class BigramConfig:
    vocab_size: int

    def __post_init__(self):
        if isinstance(self.vocab_size, bool) or not isinstance(self.vocab_size, int) or self.vocab_size < 1:
            raise ValueError(f"vocab_size must be a positive int, got {self.vocab_size!r}")


class Bigram(nn.Module):
    def __init__(self, config: BigramConfig):
        super().__init__()
        self.config = config
        self.table = nn.Embedding(config.vocab_size, config.vocab_size)  # row i: the logits of what follows token i
        nn.init.normal_(self.table.weight, std=0.02)  # nearly uniform: a loss of ln V before the first step

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> Tensor:
        """(B, T) ids -> (B, T, V) logits; with targets (B, T), the mean loss in nats per token, targets of -1 not counted."""
        logits = self.table(idx)
        return logits if targets is None else cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)

    @torch.no_grad()
    def generate(self, idx: Tensor, max_new_tokens: int, **how) -> Tensor:
        """Appends tokens, one at a time: (B, T) ids -> (B, T + max_new_tokens) ids. how: see minmodels.sampling.sample."""
        if idx.dim() != 2 or idx.shape[1] == 0:
            raise ValueError(f"idx must be (batch, at least one token), got shape {tuple(idx.shape)}")
        for _ in range(max_new_tokens):
            idx = torch.cat((idx, sample(self.table(idx[:, -1]), **how)), 1)
        return idx
