"""Fine-tuning of a pretrained language model on a task (minmodels.data.tasks)."""

import hashlib
from abc import abstractmethod

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from minmodels import UserError
from minmodels.data import tasks
from minmodels.kernels import cross_entropy
from minmodels.options import TaskOptions
from minmodels.recipes import Recipe, seeded

Sequence = tuple[list[int], list[int]]  # ids, segments


class TaskRecipe(Recipe):
    """A subclass gives its kind_of_config, and says how texts become sequences and what the model makes of them."""

    unit, loss_unit, kinds = "examples", "nats", tasks.KINDS
    kind_of_config: type

    def __init__(self, options: TaskOptions, meta: dict | None = None):
        """meta: of a checkpoint of such a run, which has what is needed of the pretraining but for the weights."""
        super().__init__(options)
        if meta:
            self.config, self.tokenizer = self.kind_of_config(**meta["config"]), Tokenizer.from_str(meta["tokenizer"])
            self.text, tensors = meta["text"], {}
        elif options.checkpoint:
            self.config, self.tokenizer, self.text, tensors = self.pretrained(options.checkpoint)
        else:
            raise UserError("--checkpoint: it takes the folder of a pretraining to fine-tune it")
        self.task = task = tasks.load(options.task, options.examples, self.text)
        if task.kind not in self.kinds:
            raise UserError(f"--task {options.task}: {self.family} learns {', '.join(self.kinds)}, not {task.kind}")
        self.train, self.held = self._encode(task.train), self._encode(task.heldout)
        parts = task.sha256, self.tokenizer.to_str(), str(self.config)
        self.sha256 = hashlib.sha256("".join(parts).encode()).hexdigest()
        self.data = f"{task.name}: {len(self.train):,} examples, {len(self.held):,} held out"
        self.model = self.new()
        if not options.scratch:
            self.model.load_state_dict(tensors, strict=False)  # the task's own layer is new

    @classmethod
    def again(cls, options, meta):
        return cls(options, meta if "text" in meta else None)  # older checkpoints do not have it

    @abstractmethod
    def pretrained(self, checkpoint: str):
        """(config, tokenizer, the text that it learned from, tensors by their names in the model)."""

    @classmethod
    @abstractmethod
    def network(cls, config: dict, task: dict) -> nn.Module:
        """An untrained model of that config for what _about() says of the task."""

    @staticmethod
    @abstractmethod
    def inputs(tokenizer: Tokenizer, kind: str, texts: list[list[int]]) -> list[Sequence]:
        """The sequences of an example, from the ids of its texts."""

    @staticmethod
    @abstractmethod
    def logits(model: nn.Module, ids: Tensor, segments: Tensor, lengths: Tensor) -> Tensor:
        """(B, S, T), (B, S, T), (B, S) -> (B, classes)."""

    @seeded
    def new(self):
        return self.network(vars(self.config), self._about())

    def batch(self, generator):
        picked = torch.randint(len(self.train), (self.options.batch_size,), generator=generator)
        return *self._stack([self.train[i] for i in picked.tolist()]), torch.randint(2**62, (), generator=generator)

    def heldout(self, model, move):
        loss, labels, right = 0.0, [], 0
        for start in range(0, len(self.held), 64):
            *inputs, wanted = map(move, self._stack(self.held[start : start + 64]))
            logits = self.logits(model, *inputs).float()
            loss += cross_entropy(logits, wanted, reduction="sum").item()
            right += (logits.argmax(-1) == wanted).sum().item()
            labels += wanted.tolist()
        most = max(labels.count(label) for label in set(labels))
        return {"heldout": loss / len(labels), "accuracy": right / len(labels), "most frequent class": most / len(labels)}

    def extras(self):
        return {"tokenizer": self.tokenizer.to_str(), "text": self.text, "task": self._about()}

    @classmethod
    def build(cls, meta):
        return cls.network(meta["config"], meta["task"])

    @classmethod
    def prepare(cls, meta: dict, tokenizer: Tokenizer, texts: tuple[str, ...]) -> list[Sequence]:
        """The sequences of an example for a model of this meta. Raises UserError where they do not fit."""
        ids = [e.ids for e in tokenizer.encode_batch(list(texts), add_special_tokens=False)]
        sequences = cls.inputs(tokenizer, meta["task"]["kind"], ids)
        most, longest = meta["config"][cls.limit], max(len(ids) for ids, _ in sequences)
        if longest > most:
            raise UserError(f"{' '.join(texts)[:40]!r}...: {longest} tokens with the special ones, and the model takes {most}")
        return sequences

    @staticmethod
    def collate(examples: list[list[Sequence]], most: int) -> tuple[Tensor, Tensor, Tensor]:
        """ids (B, S, T), segments (B, S, T), lengths (B, S); padded with 0 to a multiple of 8, but to no more than `most`."""
        lengths = torch.tensor([[len(ids) for ids, _ in sequences] for sequences in examples])
        T = min(most, -(-int(lengths.max()) // 8) * 8)
        both = (
            torch.tensor([[s[part] + [0] * (T - len(s[part])) for s in sequences] for sequences in examples]) for part in (0, 1)
        )
        return *both, lengths

    def _about(self):
        return {"kind": self.task.kind, "classes": self.task.classes, "texts": len(self.task.train[0].texts)}

    def _encode(self, examples):
        meta, encoded = {"config": vars(self.config), "task": self._about()}, []
        for example in examples:
            try:
                encoded.append((self.prepare(meta, self.tokenizer, example.texts), example.label))
            except UserError:
                if self.options.examples:
                    raise
        if not encoded:
            raise UserError(f"{self.task.name}: no example fits into {meta['config'][self.limit]} tokens")
        return encoded

    def _stack(self, examples):
        sequences, labels = zip(*examples, strict=True)
        return *self.collate(list(sequences), getattr(self.config, self.limit)), torch.tensor(labels)
