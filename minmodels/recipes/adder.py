"""minGPT learns to add: it reads two numbers and writes their sum, one digit after the other. Only the sum's digits are learned."""

from pathlib import Path
from shlex import quote

import torch
from torch import nn

from minmodels import UserError
from minmodels.data import adder
from minmodels.mingpt import GPT, GPTConfig
from minmodels.options import AdderOptions
from minmodels.recipes import Recipe, seeded


class AdderRecipe(Recipe):
    loss_unit, unit, inner = "nats per digit", "sums", ("h.",)

    def __init__(self, options: AdderOptions):
        super().__init__(options)
        if options.digits > 9:
            raise UserError(f"--digits {options.digits}: at most 9")  # the keys of pairs are 64-bit numbers
        self.unseen = adder.heldout(options.digits)
        try:
            self.config = GPTConfig(10, 3 * options.digits, options.n_layer, options.n_head, options.n_embd)
        except ValueError as error:
            raise UserError(str(error)) from error
        self.model, self.sha256 = self.new(), f"adder, {options.digits} digits"
        self.data = f"sums of {options.digits} digits: random ones, {len(self.unseen)} held out"

    @seeded
    def new(self):
        return GPT(self.config)

    def batch(self, generator):
        pairs = adder.sample(self.options.digits, self.options.batch_size, self.unseen, generator)
        return adder.parallel(*adder.encode(pairs, self.options.digits))

    def heldout(self, model, move):
        """exact: the share of unseen sums of which every digit is right, each generated after the ones before it."""
        prompts, answers = (move(t) for t in adder.encode(self.unseen, self.options.digits))
        loss = self.loss(model, *adder.parallel(prompts, answers)).item()
        written = model.generate(prompts, answers.shape[1], temperature=0)[:, prompts.shape[1] :]
        return {"heldout": loss, "exact": (written == answers).all(1).double().mean().item()}

    def finish(self, model, folder: Path):
        prompt = "12+34" if self.options.digits > 1 else "1+2"
        return f"to add: python -m minmodels generate adder --checkpoint {quote(str(folder))} --prompt {prompt}"

    @classmethod
    def build(cls, meta) -> nn.Module:
        return GPT(GPTConfig(**meta["config"]))


@torch.no_grad()
def answer(model: GPT, prompt: str) -> str:
    """The model's sum of a prompt like 12+34: 12+34=46. Raises UserError."""
    digits = model.config.block_size // 3
    parts = prompt.split("+")
    if len(parts) != 2 or not all(part.isascii() and part.isdecimal() for part in parts):
        raise UserError(f"the prompt must be a sum like 12+34, got {prompt!r}")
    if max(map(len, parts)) > digits:
        raise UserError(f"{prompt}: the model has learned to add numbers of {digits} digits at most")
    pair = torch.tensor([[int(part) for part in parts]])
    prompts = adder.encode(pair, digits)[0].to(model.wte.weight.device)
    written = model.generate(prompts, digits + 1, temperature=0)[0, 2 * digits :].tolist()
    return f"{prompt}={int(''.join(map(str, reversed(written))))}"
