"""The encoder-decoder learns to say words of random letters back to front."""

from pathlib import Path
from shlex import quote

import torch
from torch import nn

from minmodels import UserError
from minmodels.data import reverse
from minmodels.options import TransformerOptions
from minmodels.recipes import Recipe, seeded
from minmodels.transformer import Transformer, TransformerConfig


class TransformerRecipe(Recipe):
    loss_unit, unit, inner = "nats per letter", "words", ("encoder.", "decoder.")

    def __init__(self, options: TransformerOptions):
        super().__init__(options)
        self.unseen = reverse.heldout(options.length)
        try:
            self.config = TransformerConfig(reverse.VOCAB, options.n_layer, options.n_head, options.n_embd)
        except ValueError as error:
            raise UserError(str(error)) from error
        self.model, self.sha256, self.without = self.new(), f"words of up to {options.length} letters", set(self.unseen)
        self.data = f"words of 1 to {options.length} letters, to be reversed: random ones, {len(self.unseen)} held out"

    @seeded
    def new(self):
        return Transformer(self.config)

    def batch(self, generator):
        words = reverse.sample(self.options.length, self.options.batch_size, self.without, generator)
        return reverse.pairs(words, self.options.length)

    def heldout(self, model, move):
        """exact: the share of unseen words of which every letter, and the end, is right, each generated after the ones before it."""
        src, idx, targets = (move(t) for t in reverse.pairs(self.unseen, self.options.length))
        loss, written = self.loss(model, src, idx, targets).item(), model.generate(src, reverse.START, targets.shape[1])
        return {"heldout": loss, "exact": ((written == targets) | (targets == -1)).all(1).double().mean().item()}

    def extras(self):
        return {"length": self.options.length}

    def finish(self, model, folder: Path):
        prompt = "hello" if self.options.length > 4 else "word"
        return f"to reverse: python -m minmodels generate transformer --checkpoint {quote(str(folder))} --prompt {prompt}"

    @classmethod
    def build(cls, meta) -> nn.Module:
        return Transformer(TransformerConfig(**meta["config"]))


@torch.no_grad()
def answer(model: Transformer, prompt: str, longest: int) -> str:
    """The prompt, back to front, as the model has it. longest: of the words that it has learned from. Raises UserError."""
    if not prompt or set(prompt) - set(reverse.LETTERS):
        raise UserError(f"the prompt must be one word of the letters a to z, got {prompt!r}")
    if len(prompt) > longest:
        raise UserError(f"{prompt}: {len(prompt)} letters, and the model has learned from words of {longest} at most")
    src = reverse.encode([prompt], longest).to(model.embedding.weight.device)
    return reverse.decode(model.generate(src, reverse.START, longest + 1)[0])
