"""minGPT: the decoder-only transformer of GPT-2 (Radford et al. 2019). Parameter names match the GPT-2 checkpoints.

Shapes: B batch, T tokens, C embedding, H heads, D head dim (C = H D), V vocabulary.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minmodels.kernels import attention, cross_entropy
from minmodels.sampling import sample


@dataclass(frozen=True)
class GPTConfig:
    """The defaults are GPT-2 small, 124 M parameters."""

    vocab_size: int = 50257
    block_size: int = 1024  # the longest context, in tokens
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0  # of the embeddings and of what each layer adds, in training

    def __post_init__(self):
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be from 0 to less than 1, got {self.dropout!r}")
        for name in ("vocab_size", "block_size", "n_layer", "n_head", "n_embd"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a positive int, got {value!r}")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd must be a multiple of n_head, got {self.n_embd} and {self.n_head}")


class Cache:
    """The keys and values of the tokens seen so far: for each layer (2, B, H, block_size, D), made when the first ones come."""

    def __init__(self, config: GPTConfig):
        self.block_size, self.kv = config.block_size, [None] * config.n_layer
        self.length = 0  # tokens that every layer has seen

    def append(self, layer: int, k: Tensor, v: Tensor) -> Tensor:
        """k and v (B, H, T, D) of the next tokens -> those of all tokens, (2, B, H, length + T, D), a view."""
        B, H, T, D = k.shape
        if self.kv[layer] is None:
            self.kv[layer] = k.new_empty(2, B, H, self.block_size, D)
        end = self.length + T
        self.kv[layer][0, :, :, self.length : end], self.kv[layer][1, :, :, self.length : end] = k, v
        return self.kv[layer][:, :, :, :end]


class Block(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        C, self.n_head = config.n_embd, config.n_head
        self.ln_1, self.ln_2 = nn.LayerNorm(C), nn.LayerNorm(C)
        self.attn = nn.ModuleDict({"c_attn": nn.Linear(C, 3 * C), "c_proj": nn.Linear(C, C)})
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(C, 4 * C), "c_proj": nn.Linear(4 * C, C)})
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, cache: Cache | None = None, layer: int = 0) -> Tensor:  # (B, T, C) -> (B, T, C)
        qkv = self.attn.c_attn(self.ln_1(x)).unflatten(-1, (3, self.n_head, -1))  # (B, T, 3, H, D)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, H, T, D), no copy: the kernel takes any strides
        if cache is not None:
            k, v = cache.append(layer, k, v)
        x = x + self.drop(self.attn.c_proj(attention(q, k, v, causal=True).transpose(1, 2).flatten(2)))
        return x + self.drop(self.mlp.c_proj(F.gelu(self.mlp.c_fc(self.ln_2(x)), approximate="tanh")))


class GPT(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)
        for name, p in self.named_parameters():  # GPT-2, section 2.3; LayerNorm starts as the identity
            if name.endswith("c_proj.weight"):
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_layer))  # 2 n_layer terms add up on the residual stream
            elif p.dim() == 2:
                nn.init.normal_(p, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> Tensor:
        """(B, T) ids -> (B, T, V) logits; with targets (B, T), the mean loss in nats per token, targets of -1 not counted."""
        logits = self._hidden(idx) @ self.wte.weight.T  # tied embeddings
        return logits if targets is None else cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)

    @torch.no_grad()
    def generate(self, idx: Tensor, max_new_tokens: int, *, use_cache: bool = True, **how) -> Tensor:
        """Appends max_new_tokens tokens, one at a time: (B, T) ids -> (B, T + max_new_tokens) ids.

        how: temperature, top_k, top_p and generator, see minmodels.sampling.sample.
        use_cache: keep keys and values, so that a token costs one position and not the whole context; the same tokens either
            way. A context longer than block_size is cropped to its last block_size tokens: every token then moves to another
            position, no cached key holds any more, and each token costs a whole context again.
        """
        if idx.dim() != 2 or idx.shape[1] == 0:
            raise ValueError(f"idx must be (batch, at least one token), got shape {tuple(idx.shape)}")
        cache = Cache(self.config) if use_cache else None
        for _ in range(max_new_tokens):
            if cache is None or idx.shape[1] > self.config.block_size:
                x = self._hidden(idx[:, -self.config.block_size :])
            else:
                x = self._hidden(idx[:, cache.length :], cache)
            idx = torch.cat((idx, sample(x[:, -1] @ self.wte.weight.T, **how)), 1)
        return idx

    def _hidden(self, idx: Tensor, cache: Cache | None = None) -> Tensor:
        """(B, T) ids that follow the cached ones -> (B, T, C), normalised, ready for the logits."""
        past = cache.length if cache else 0
        end = past + idx.shape[1]
        if end > self.config.block_size:
            raise ValueError(f"{end} tokens are more than the block_size of {self.config.block_size}")
        x = self.drop(self.wte(idx) + self.wpe.weight[past:end])
        for layer, block in enumerate(self.h):
            x = block(x, cache, layer)
        if cache is not None:
            cache.length = end
        return self.ln_f(x)
