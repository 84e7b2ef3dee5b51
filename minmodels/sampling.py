"""How a token is drawn from its logits."""

import math

import torch
from torch import Tensor


def sample(
    logits: Tensor, *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, generator: torch.Generator | None = None
) -> Tensor:
    """Draws a token for each row: (B, V) logits -> (B, 1) ids.

    temperature: divides the logits; 0 (below 1e-6) takes the likeliest token.
    top_k: only the k likeliest tokens can be drawn; 0: all.
    top_p: of these, only the likeliest ones that together reach the probability top_p, in (0, 1] (Holtzman et al. 2020); 1: all.
    generator: draws the tokens, on the logits' device.
    Raises ValueError.
    """
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature must be finite and not negative, got {temperature}")
    if top_k < 0:
        raise ValueError(f"top_k must not be negative, got {top_k}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must be more than 0 and at most 1, got {top_p}")
    logits = logits.float()
    if temperature < 1e-6:
        return logits.argmax(-1, keepdim=True)
    logits, V = logits / temperature, logits.shape[-1]
    if (top_k == 0 or top_k >= V) and top_p == 1:
        return torch.multinomial(logits.softmax(-1), 1, generator=generator)
    logits, ids = logits.topk(min(top_k or V, V))  # likeliest first
    p = logits.softmax(-1)
    p = p.masked_fill(p.cumsum(-1) - p >= top_p, 0.0)  # those before it reach top_p already
    return ids.gather(-1, torch.multinomial(p, 1, generator=generator))
