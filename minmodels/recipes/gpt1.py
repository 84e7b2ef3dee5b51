"""GPT-1 learns to continue text (stage 1), then a task on it (stage 2)."""

from pathlib import Path
from shlex import quote

import torch
from tokenizers import Tokenizer

from minmodels import UserError, files
from minmodels.data import documents as documentsdata
from minmodels.data import text as textdata
from minmodels.gpt1 import GPT1, INPUTS, GPT1Config, GPT1Task
from minmodels.options import GPT1Options
from minmodels.recipes import Recipe, check_model, dropping, seeded
from minmodels.recipes.task import TaskRecipe

SPECIAL = ["[UNK]", "[START]", "[DELIMITER]", "[EXTRACT]"]  # minmodels.gpt1 has their ids


class GPT1Recipe(Recipe):
    unit, loss_unit, inner = "tokens", "nats per token", ("h.",)

    def __init__(self, options: GPT1Options):
        super().__init__(options)
        documents, T = documentsdata.load(options.text), options.block_size
        self.tokenizer = documentsdata.train_tokenizer("bpe", documents.train, options.vocab_size, SPECIAL)
        self.train, self.held = (
            torch.tensor([i for d in documentsdata.encode(self.tokenizer, part) for s in d for i in s], dtype=torch.int32)
            for part in (documents.train, documents.heldout)
        )
        textdata.check_length(documents.name, self.train, self.held, T, "tokens")
        try:
            self.config = GPT1Config(self.tokenizer.get_vocab_size(), T, options.n_layer, options.n_head, options.n_embd, options.dropout)
        except ValueError as error:
            raise UserError(str(error)) from error
        self.units, self.sha256, self.model = T, documents.sha256, self.new()
        self.data = f"{documents.name}: {len(self.train):,} tokens, {textdata.told(self.held)}, {self.config.vocab_size:,} different ones"

    @seeded
    def new(self):
        return GPT1(self.config)

    def batch(self, generator):
        windows = textdata.sample(self.train, self.options.batch_size, self.options.block_size, generator)
        return *windows, torch.randint(2**62, (), generator=generator)

    def loss(self, model, ids, targets, seed):
        with dropping(seed, ids):
            return model(ids, targets)

    def heldout(self, model, move):
        windows = textdata.sweep(self.held, self.options.block_size)
        return {"heldout": textdata.mean_loss(windows, lambda ids, targets: model(move(ids), move(targets)))}

    def extras(self):
        return {"tokenizer": self.tokenizer.to_str()}

    def finish(self, model, folder: Path):
        return f"stage 2: python -m minmodels finetune gpt1 --checkpoint {quote(str(folder))}"

    @classmethod
    def build(cls, meta):
        return GPT1(GPT1Config(**meta["config"]))


class GPT1TaskRecipe(TaskRecipe):
    family, inner, limit, kind_of_config = "gpt1", ("transformer.h.",), "n_positions", GPT1Config

    def pretrained(self, checkpoint):
        tensors, meta = files.load_checkpoint(Path(checkpoint), prefix="model.")
        check_model("gpt1", meta, checkpoint)
        tensors = {"transformer." + name.removeprefix("model."): t for name, t in tensors.items()}
        try:
            config = GPT1Config(**{**meta["config"], "dropout": self.options.dropout})
        except ValueError as error:
            raise UserError(str(error)) from error
        return config, Tokenizer.from_str(meta["tokenizer"]), meta["options"]["text"], tensors

    @staticmethod
    def inputs(tokenizer, kind, texts):
        return [(ids, [0] * len(ids)) for ids in INPUTS[kind](*texts)]

    @staticmethod
    def logits(model, ids, segments, lengths):
        return model(ids, lengths - 1)

    def loss(self, model, ids, segments, lengths, labels, seed):
        with dropping(seed, ids):
            return model(ids, lengths - 1, labels)

    @classmethod
    def network(cls, config, task):
        return GPT1Task(GPT1Config(**config), task["kind"], len(task["classes"]), task["likelihood"])

    def _about(self):
        return {**super()._about(), "likelihood": self.options.likelihood}
