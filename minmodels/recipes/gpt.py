"""minGPT learns to continue text."""

from pathlib import Path

from torch import nn

from minmodels import UserError
from minmodels.data import text as textdata
from minmodels.mingpt import GPT, GPTConfig
from minmodels.options import GPTOptions
from minmodels.recipes import Recipe, seeded


class GPTRecipe(Recipe):
    unit, loss_unit, inner = "characters", "nats per character", ("h.",)

    def __init__(self, options: GPTOptions):
        super().__init__(options)
        self.text = text = textdata.load(options.text, options.block_size)
        try:
            self.config = GPTConfig(len(text.vocab), options.block_size, options.n_layer, options.n_head, options.n_embd)
        except ValueError as error:
            raise UserError(str(error)) from error
        self.units, self.sha256, self.model = options.block_size, text.sha256, self.new()
        self.data = f"{text.name}: {len(text.train):,} characters, {len(text.heldout):,} held out, {len(text.vocab)} different ones"

    @seeded
    def new(self):
        return GPT(self.config)

    def batch(self, generator):
        return textdata.sample(self.text.train, self.options.batch_size, self.options.block_size, generator)

    def heldout(self, model, move):
        windows = [t.split(64) for t in textdata.sweep(self.text.heldout, self.options.block_size)]
        total = sum(self.loss(model, move(idx), move(targets)).item() * len(idx) for idx, targets in zip(*windows, strict=True))
        return {"heldout": total / sum(map(len, windows[0]))}

    def extras(self):
        return {"vocab": self.text.vocab}

    def finish(self, model, folder: Path):
        return f"to sample: python -m minmodels generate gpt --checkpoint {folder}"

    @classmethod
    def build(cls, meta) -> nn.Module:
        return GPT(GPTConfig(**meta["config"]))
