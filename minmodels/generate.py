"""Text from a trained checkpoint."""

from pathlib import Path

import torch

from minmodels import files
from minmodels.data import text as textdata
from minmodels.device import pick_device
from minmodels.mingpt import GPT, GPTConfig


def generate(checkpoint: str, prompt: str, tokens: int, *, temperature: float = 0.8, seed: int = 0, device: str = "") -> str:
    """The prompt and `tokens` characters that follow it. An empty prompt starts after a line break, which is not returned."""
    tensors, meta = files.load_checkpoint(Path(checkpoint), prefix="model.")
    vocab, device = meta["vocab"], pick_device(device)
    model = GPT(GPTConfig(**meta["config"]))
    model.load_state_dict({name.removeprefix("model."): t for name, t in tensors.items()})
    start = prompt or ("\n" if "\n" in vocab else vocab[0])
    idx = textdata.encode(start, vocab).to(device)[None]
    generator = torch.Generator(device).manual_seed(seed)
    ids = model.to(device).generate(idx, tokens, temperature=temperature, generator=generator)[0]
    return textdata.decode(ids, vocab) if prompt else textdata.decode(ids[1:], vocab)
