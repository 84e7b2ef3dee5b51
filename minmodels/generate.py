"""Text from a trained checkpoint."""

import torch

from minmodels.data import text as textdata
from minmodels.recipes import load


def generate(checkpoint: str, prompt: str, tokens: int, *, temperature: float = 0.8, seed: int = 0, device: str = "") -> str:
    """The prompt and `tokens` characters that follow it. An empty prompt starts after a line break, which is not returned."""
    model, meta = load("gpt", checkpoint, device)
    vocab, device = meta["vocab"], next(model.parameters()).device
    start = prompt or ("\n" if "\n" in vocab else vocab[0])
    idx = textdata.encode(start, vocab).to(device)[None]
    generator = torch.Generator(device).manual_seed(seed)
    ids = model.generate(idx, tokens, temperature=temperature, generator=generator)[0]
    return textdata.decode(ids, vocab) if prompt else textdata.decode(ids[1:], vocab)
