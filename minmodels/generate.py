"""Text from a trained checkpoint, or from the weights of GPT-2."""

from pathlib import Path

import torch
from torch import nn

from minmodels import UserError, gpt2
from minmodels.data import tokens as tokendata
from minmodels.device import pick_device
from minmodels.recipes import load


def generate(
    checkpoint: str,
    prompt: str,
    tokens: int = 500,
    *,
    model: str = "gpt",
    temperature: float = 0.8,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    device: str = "",
) -> str:
    """The prompt and `tokens` tokens that follow it. An empty prompt starts after a line break, or GPT-2's end of a text, which is
    not returned. temperature, top_k, top_p: see minmodels.sampling.sample.

    model: gpt, bigram; or adder, transformer, which answer the prompt, as they have learned to. checkpoint: for gpt it may be a
    folder of Hugging Face with the weights and the tokenizer of a GPT-2. Raises UserError.
    """
    if model in ("adder", "transformer"):
        return _answer(model, checkpoint, prompt, device)
    net, codes = _load(model, checkpoint, device)
    start = codes.encode(prompt) if prompt else codes.start()
    if len(start) == 0:
        raise UserError(f"the prompt has no token: {prompt!r}")
    device = next(net.parameters()).device
    how = dict(temperature=temperature, top_k=top_k, top_p=top_p, generator=torch.Generator(device).manual_seed(seed))
    ids = net.generate(start.to(device)[None], tokens, **how)[0]
    return codes.decode(ids if prompt else ids[len(start) :])


def _load(name: str, checkpoint: str, device: str) -> tuple[nn.Module, tokendata.Characters | tokendata.BPE]:
    if name == "gpt" and gpt2.is_folder(checkpoint):
        codes = tokendata.BPE.read(Path(checkpoint))
        net = gpt2.load(checkpoint)
        if len(codes) > net.config.vocab_size:
            raise UserError(f"{checkpoint}: the tokenizer has {len(codes)} tokens, the model {net.config.vocab_size}")
        return net.to(pick_device(device)), codes
    net, meta = load(name, checkpoint, device)
    return net, tokendata.restore(meta)


def _answer(name: str, checkpoint: str, prompt: str, device: str) -> str:
    net, meta = load(name, checkpoint, device)
    if name == "adder":
        from minmodels.recipes.adder import answer

        return answer(net, prompt)
    from minmodels.recipes.transformer import answer

    return answer(net, prompt, meta["length"])
