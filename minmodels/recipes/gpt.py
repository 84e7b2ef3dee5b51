"""minGPT learns to continue text, and so does the bigram model."""

from abc import abstractmethod
from pathlib import Path
from shlex import quote

import torch
from torch import nn

from minmodels import UserError
from minmodels.bigram import Bigram, BigramConfig
from minmodels.data import text as textdata
from minmodels.data import tokens
from minmodels.mingpt import GPT, GPTConfig
from minmodels.options import BigramOptions
from minmodels.recipes import Recipe, dropping, seeded


class TextRecipe(Recipe):
    """Of a model of tokens -> logits of the tokens that follow. A subclass gives its name, kind and kind_of_config."""

    name: str
    kind: type[nn.Module]
    kind_of_config: type

    def __init__(self, options: BigramOptions):
        super().__init__(options)
        self.text, self.tokens = tokens.load(options.text, options.block_size, options.tokenizer, options.vocab_size)
        text, self.unit = self.text, self.tokens.unit
        try:
            self.config = self.sizes()
        except ValueError as error:
            raise UserError(str(error)) from error
        self.loss_unit = f"nats per {self.unit.removesuffix('s')}"
        self.units, self.sha256, self.model = options.block_size, text.sha256, self.new()
        self.data = f"{text.name}: {len(text.train):,} {self.unit}, {textdata.told(text.heldout)}, {len(self.tokens)} different ones"

    @abstractmethod
    def sizes(self):
        """The config of a new model. May raise ValueError."""

    @seeded
    def new(self):
        return self.kind(self.config)

    def batch(self, generator):
        return textdata.sample(self.text.train, self.options.batch_size, self.options.block_size, generator)

    def heldout(self, model, move):
        windows = textdata.sweep(self.text.heldout, self.options.block_size)
        loss = textdata.mean_loss(windows, lambda idx, targets: self.loss(model, move(idx), move(targets)))
        if self.options.tokenizer == "chars":
            return {"heldout": loss}
        return {"heldout": loss, "per character": loss * len(self.text.heldout) / len(self.tokens.decode(self.text.heldout))}

    def extras(self):
        return self.tokens.state()

    def finish(self, model, folder: Path):
        return f"to sample: python -m minmodels generate {self.name} --checkpoint {quote(str(folder))}"

    @classmethod
    def build(cls, meta) -> nn.Module:
        return cls.kind(cls.kind_of_config(**meta["config"]))


class BigramRecipe(TextRecipe):
    name, kind, kind_of_config = "bigram", Bigram, BigramConfig

    def sizes(self):
        return BigramConfig(len(self.tokens))


class GPTRecipe(TextRecipe):
    name, kind, kind_of_config = "gpt", GPT, GPTConfig
    inner = ("h.",)

    def sizes(self):
        options = self.options
        if options.noise > 0.5:
            raise ValueError(f"noise must be at most 0.5, got {options.noise}")
        return GPTConfig(len(self.tokens), options.block_size, options.n_layer, options.n_head, options.n_embd, options.dropout)

    def batch(self, generator):
        """Ids, some of them replaced where --noise asks for it (Xie et al. 2017: it smooths, as n-gram models do), and targets; with
        --dropout also a seed. Each window has a noise of its own, 0 to twice the average: so the model knows clean text too."""
        idx, targets = super().batch(generator)
        if self.options.noise:
            replaced = torch.rand(idx.shape, generator=generator) < 2 * self.options.noise * torch.rand(len(idx), 1, generator=generator)
            idx = torch.where(replaced, torch.randint(len(self.tokens), idx.shape, generator=generator), idx)
        return (idx, targets, torch.randint(2**62, (), generator=generator)) if self.options.dropout else (idx, targets)

    def loss(self, model, idx, targets, seed=None):
        """seed: of what is dropped, drawn with the batch, so that a resumed run drops the same."""
        if seed is None:
            return model(idx, targets)
        with dropping(seed, idx):
            return model(idx, targets)
