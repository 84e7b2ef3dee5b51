"""The transformer as it was first described: an encoder and a decoder (Vaswani et al. 2017, "Attention is all you need").

Shapes: B batch, S source tokens, T target tokens, C width, H heads, D head dim (C = H D), V vocabulary.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from minmodels.kernels import attention, cross_entropy


@dataclass(frozen=True)
class TransformerConfig:
    """The defaults are the base model of the paper; ids of 0 are padding."""

    vocab_size: int = 37000
    n_layer: int = 6  # of the encoder, and of the decoder
    n_head: int = 8
    n_embd: int = 512

    def __post_init__(self):
        for name, value in vars(self).items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a positive int, got {value!r}")
        if self.n_embd % self.n_head or self.n_embd % 2:
            raise ValueError(f"n_embd must be even and a multiple of n_head, got {self.n_embd} and {self.n_head}")


class Attention(nn.Module):
    def __init__(self, config: TransformerConfig):
        super().__init__()
        C, self.n_head = config.n_embd, config.n_head
        self.q, self.k, self.v, self.out = (nn.Linear(C, C) for _ in range(4))

    def forward(self, x: Tensor, memory: Tensor, key_mask: Tensor | None = None, causal: bool = False) -> Tensor:
        """x (B, T, C) looks at memory (B, S, C), where key_mask (B, S) is True and, if causal, no further than itself -> (B, T, C)."""
        q, k, v = (f(t).unflatten(-1, (self.n_head, -1)).transpose(1, 2) for f, t in ((self.q, x), (self.k, memory), (self.v, memory)))
        return self.out(attention(q, k, v, causal=causal, key_mask=key_mask).transpose(1, 2).flatten(2))


class FeedForward(nn.Sequential):
    def __init__(self, config: TransformerConfig):
        C = config.n_embd
        super().__init__(nn.Linear(C, 4 * C), nn.ReLU(), nn.Linear(4 * C, C))


class EncoderLayer(nn.Module):
    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.self_attn, self.ff = Attention(config), FeedForward(config)
        self.norm1, self.norm2 = nn.LayerNorm(config.n_embd), nn.LayerNorm(config.n_embd)

    def forward(self, x: Tensor, key_mask: Tensor) -> Tensor:  # (B, S, C) -> (B, S, C)
        x = self.norm1(x + self.self_attn(x, x, key_mask))  # normalised after the sum, as in the paper
        return self.norm2(x + self.ff(x))


class DecoderLayer(nn.Module):
    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.self_attn, self.cross_attn, self.ff = Attention(config), Attention(config), FeedForward(config)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(config.n_embd) for _ in range(3))

    def forward(self, x: Tensor, memory: Tensor, key_mask: Tensor) -> Tensor:  # (B, T, C), (B, S, C), (B, S) -> (B, T, C)
        x = self.norm1(x + self.self_attn(x, x, causal=True))  # no mask: what padding follows a target is later than all of it
        x = self.norm2(x + self.cross_attn(x, memory, key_mask))
        return self.norm3(x + self.ff(x))


class Transformer(nn.Module):
    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.n_embd)  # of sources, targets and logits: section 3.4
        self.encoder = nn.ModuleList(EncoderLayer(config) for _ in range(config.n_layer))
        self.decoder = nn.ModuleList(DecoderLayer(config) for _ in range(config.n_layer))
        nn.init.normal_(self.embedding.weight, std=config.n_embd**-0.5)
        for name, p in self.named_parameters():
            if p.dim() == 2 and not name.startswith("embedding"):
                nn.init.xavier_uniform_(p)

    def forward(self, src: Tensor, idx: Tensor, targets: Tensor | None = None) -> Tensor:
        """src (B, S) and idx (B, T) ids -> (B, T, V) logits; with targets (B, T), the mean loss in nats, targets of -1 not counted."""
        logits = self.decode(idx, self.encode(src), src != 0)
        return logits if targets is None else cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)

    def encode(self, src: Tensor) -> Tensor:
        """(B, S) ids -> memory (B, S, C); what stands where src is padding means nothing."""
        x = self._embed(src)
        for layer in self.encoder:
            x = layer(x, src != 0)
        return x

    def decode(self, idx: Tensor, memory: Tensor, key_mask: Tensor) -> Tensor:
        """idx (B, T), memory (B, S, C), key_mask (B, S) -> (B, T, V) logits of what follows each target token."""
        x = self._embed(idx)
        for layer in self.decoder:
            x = layer(x, memory, key_mask)
        return x @ self.embedding.weight.T

    @torch.no_grad()
    def generate(self, src: Tensor, start: int, length: int) -> Tensor:
        """The likeliest next token, `length` times: (B, S) ids -> (B, length) ids. start: the id before the first token."""
        memory, idx = self.encode(src), src.new_full((len(src), 1), start)
        for _ in range(length):
            idx = torch.cat((idx, self.decode(idx, memory, src != 0)[:, -1:].argmax(-1)), 1)
        return idx[:, 1:]

    def _embed(self, idx: Tensor) -> Tensor:  # (B, T) -> (B, T, C)
        C = self.config.n_embd
        return self.embedding(idx) * math.sqrt(C) + positions(idx.shape[1], C, idx.device)


def positions(T: int, C: int, device: torch.device | None = None) -> Tensor:
    """(T, C): sines in the even columns, cosines in the odd ones, of wavelengths from 2 pi to 10000 * 2 pi (section 3.5)."""
    angles = torch.arange(T, device=device)[:, None] * 10000.0 ** (-torch.arange(0, C, 2, device=device) / C)  # (T, C / 2)
    return torch.stack((angles.sin(), angles.cos()), -1).flatten(1)
