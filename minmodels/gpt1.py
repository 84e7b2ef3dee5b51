"""GPT-1: the decoder of "Improving Language Understanding by Generative Pre-Training" (Radford et al. 2018), and its second stage.

Parameter names match the OpenAI GPT checkpoints, whose matrices are the transposes of these. Sections and equations are the paper's.
Shapes: B batch, S sequences of an example, T tokens, C embedding, H heads, D head dim (C = H D), V vocabulary, K classes.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minmodels.kernels import attention, cross_entropy, linear_cross_entropy

START, DELIMITER, EXTRACT = 1, 2, 3  # token ids of every vocabulary that we train; 0 is what the vocabulary lacks


@dataclass(frozen=True)
class GPT1Config:
    """The defaults are the paper's, 117 M parameters."""

    vocab_size: int = 40478
    n_positions: int = 512  # the longest context, in tokens
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.1  # of the embeddings and of what each layer adds, in training

    def __post_init__(self):
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be from 0 to less than 1, got {self.dropout!r}")
        for name in ("vocab_size", "n_positions", "n_layer", "n_head", "n_embd"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a positive int, got {value!r}")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd must be a multiple of n_head, got {self.n_embd} and {self.n_head}")


class Block(nn.Module):
    def __init__(self, config: GPT1Config):
        super().__init__()
        C, self.n_head = config.n_embd, config.n_head
        self.attn = nn.ModuleDict({"c_attn": nn.Linear(C, 3 * C), "c_proj": nn.Linear(C, C)})
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(C, 4 * C), "c_proj": nn.Linear(4 * C, C)})
        self.ln_1, self.ln_2, self.drop = nn.LayerNorm(C), nn.LayerNorm(C), nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:  # (B, T, C) -> (B, T, C)
        q, k, v = self.attn.c_attn(x).unflatten(-1, (3, self.n_head, -1)).permute(2, 0, 3, 1, 4)  # each (B, H, T, D)
        seen = attention(q, k, v, causal=True).transpose(1, 2).flatten(2)
        x = self.ln_1(x + self.drop(self.attn.c_proj(seen)))  # post-norm: after the sum
        return self.ln_2(x + self.drop(self.mlp.c_proj(F.gelu(self.mlp.c_fc(x), approximate="tanh"))))


class GPT1(nn.Module):
    def __init__(self, config: GPT1Config):
        super().__init__()
        self.config = config
        self.tokens_embed = nn.Embedding(config.vocab_size, config.n_embd)
        self.positions_embed = nn.Embedding(config.n_positions, config.n_embd)
        self.h, self.drop = nn.ModuleList(Block(config) for _ in range(config.n_layer)), nn.Dropout(config.dropout)
        for name, p in self.named_parameters():
            if p.dim() == 2:
                nn.init.normal_(p, std=0.02)  # section 4.1
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def hidden(self, ids: Tensor) -> Tensor:
        """(B, T) ids -> (B, T, C)."""
        T = ids.shape[1]
        if T > self.config.n_positions:
            raise ValueError(f"{T} tokens are more than the n_positions of {self.config.n_positions}")
        x = self.drop(self.tokens_embed(ids) + self.positions_embed.weight[:T])
        for block in self.h:
            x = block(x)
        return x

    def likelihood(self, x: Tensor, targets: Tensor) -> Tensor:
        """-L1 (equation 1): hidden (B, T, C) and next tokens (B, T), -1 where there is none -> nats per token, a mean."""
        return linear_cross_entropy(x, self.tokens_embed.weight, targets, ignore_index=-1)  # tied embeddings, equation 2

    def forward(self, ids: Tensor, targets: Tensor | None = None) -> Tensor:
        """(B, T) ids -> (B, T, V) logits; with targets (B, T), the loss of stage 1."""
        x = self.hidden(ids)
        return x @ self.tokens_embed.weight.T if targets is None else self.likelihood(x, targets)


# Stage 2: each task's input is sequences of tokens (section 3.3, figure 1). A text is a list of ids.
def classification(text: list[int]) -> list[list[int]]:
    return [[START, *text, EXTRACT]]


def entailment(premise: list[int], hypothesis: list[int]) -> list[list[int]]:
    return [[START, *premise, DELIMITER, *hypothesis, EXTRACT]]


def similarity(a: list[int], b: list[int]) -> list[list[int]]:
    """Neither text comes first, so both orders."""
    return [*entailment(a, b), *entailment(b, a)]


def choice(context: list[int], *answers: list[int]) -> list[list[int]]:
    return [sequence for answer in answers for sequence in entailment(context, answer)]


INPUTS = {"classification": classification, "entailment": entailment, "similarity": similarity, "choice": choice}


class GPT1Task(nn.Module):
    """GPT-1 with the one linear layer that a task adds. kind: a key of INPUTS; classes: K, and for choice nothing, the sequences are."""

    def __init__(self, config: GPT1Config, kind: str, classes: int, weight: float = 0.5):
        super().__init__()
        self.transformer, self.kind, self.weight = GPT1(config), kind, weight
        self.head = nn.Linear(config.n_embd, 1 if kind == "choice" else classes)
        nn.init.normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def logits(self, x: Tensor, ends: Tensor) -> Tensor:
        """Hidden (B S, T, C), and the place of EXTRACT in each sequence, (B, S) -> (B, K)."""
        h = x[torch.arange(len(x), device=x.device), ends.flatten()].unflatten(0, ends.shape)  # (B, S, C)
        return self.head(h).squeeze(-1) if self.kind == "choice" else self.head(h.sum(1))  # similarity: the two orders are added

    def forward(self, ids: Tensor, ends: Tensor, labels: Tensor | None = None) -> Tensor:
        """ids (B, S, T), anything after EXTRACT -> (B, K) logits; with labels (B,), the loss of stage 2: -(L2 + weight L1), equation 5."""
        x = self.transformer.hidden(ids.flatten(0, 1))
        logits = self.logits(x, ends)
        if labels is None:
            return logits
        loss = cross_entropy(logits, labels)
        if not self.weight:
            return loss
        places = torch.arange(ids.shape[2] - 1, device=ids.device)
        following = ids[..., 1:].where(places < ends[..., None], -1)
        return loss + self.weight * self.transformer.likelihood(x[:, :-1], following.flatten(0, 1))
