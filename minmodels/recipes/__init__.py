"""What training needs to know of each model: its data, its loss, how it is judged. One model a file, beside the model's own."""

import contextlib
import functools
import importlib
from abc import ABC, abstractmethod
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minmodels import UserError, files
from minmodels.device import pick_device
from minmodels.options import MODELS, TrainOptions

META = {"options": dict, "data_sha256": str, "step": int, "seconds": int | float}  # what a training writes of every model


class Recipe(ABC):
    """A subclass loads its data and sets `model`, built from `config`, a dataclass; and `data`, a name of the data and its size for people.

    Raises UserError for data and options that do not fit.
    """

    model: nn.Module
    config: Any
    data: str
    sha256: str  # of the data: a resumed run must have the same
    loss_unit = "nats"
    unit = "examples"  # of the rate
    units = 1  # in an example
    inner = ()  # how the names of the matrices begin that Muon trains

    def __init__(self, options: TrainOptions):
        self.options = options

    @abstractmethod
    def batch(self, generator: torch.Generator) -> tuple[Tensor, ...]:
        """Examples to learn from, on the CPU: the same whatever the device."""

    def loss(self, model: nn.Module, *batch: Tensor) -> Tensor:
        """Of a batch on the model's device; a scalar."""
        return model(*batch)

    @abstractmethod
    def heldout(self, model: nn.Module, move) -> dict[str, float]:
        """How good the model is on what it never saw: "heldout" is its loss, others are scores. move(t) takes a tensor to the device."""

    def extras(self) -> dict:
        """What else a checkpoint needs to be used: JSON."""
        return {}

    def finish(self, model: nn.Module, folder: Path) -> str:
        """Draws what is to be seen into folder; returns the last line that training prints."""
        return ""

    @classmethod
    def again(cls, options: TrainOptions, meta: dict) -> "Recipe":
        """Of a run that goes on, or is judged, from a checkpoint with this meta."""
        return cls(options)

    @classmethod
    @abstractmethod
    def build(cls, meta: dict) -> nn.Module:
        """An untrained model for the tensors of a checkpoint with this meta."""

    def optimizers(self) -> list[torch.optim.Optimizer]:
        """Muon (Jordan 2024) for the matrices inside, which at small sizes needs far fewer steps than AdamW, and AdamW for the rest."""
        lr, decay = self.options.lr, self.options.weight_decay
        named = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        muon = [p for name, p in named if p.dim() == 2 and name.startswith(self.inner)] if self.inner else []
        rest = [p for _, p in named if all(p is not q for q in muon)]
        tables = {id(m.weight) for m in self.model.modules() if isinstance(m, nn.Embedding)}
        decayed = [p.dim() >= 2 and id(p) not in tables for p in rest]
        groups = [
            {"params": [p for p, d in zip(rest, decayed, strict=True) if d == wanted], "weight_decay": decay if wanted else 0.0}
            for wanted in (True, False)
        ]
        made = [torch.optim.AdamW([g for g in groups if g["params"]], lr, fused=True)]
        if muon:
            made.append(torch.optim.Muon(muon, lr, weight_decay=decay, momentum=0.9, adjust_lr_fn="match_rms_adamw"))
        return made

    def meta(self) -> dict:
        return {"config": asdict(self.config), **self.extras()}


def recipe(name: str) -> type[Recipe]:
    module, attribute = MODELS[name].recipe.split(":")
    return getattr(importlib.import_module(module), attribute)


def load(name: str, checkpoint: str, device: str = "") -> tuple[nn.Module, dict]:
    """The trained model of a checkpoint, in evaluation mode, and what else the checkpoint says. Raises UserError."""
    device, (tensors, meta) = pick_device(device), files.load_checkpoint(Path(checkpoint), prefix="model.")
    check_model(name, meta, checkpoint)
    model = recipe(name).build(meta)
    try:
        model.load_state_dict({key.removeprefix("model."): t for key, t in tensors.items()})
    except RuntimeError as error:
        raise UserError(f"{checkpoint} does not fit the model that it describes: {str(error).splitlines()[-1].strip()}") from error
    return model.to(device).eval(), meta


def check_model(name: str, meta: dict, checkpoint):
    if meta.get("model") != name:
        raise UserError(f"{checkpoint} is a checkpoint of {meta.get('model', 'no model')}, not of {name}")
    for key, kind in META.items():
        found = meta.get(key)
        if not isinstance(found, kind) or (isinstance(found, int | float) and found < 0):
            raise UserError(f"{checkpoint} is damaged: its {key} is {found!r}")


@contextlib.contextmanager
def dropping(seed: Tensor, t: Tensor):
    """What a model on t's device drops in here is decided by seed, an int64 drawn with the batch: a resumed run drops the same."""
    with torch.random.fork_rng(devices=[t.device] if t.is_cuda else []):
        torch.manual_seed(int(seed))
        yield


def seeded(build):
    """build(...) as a method of a recipe, its weights drawn from the option --seed; the generator of everybody else is left as it was."""

    @functools.wraps(build)
    def method(self, *args):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.options.seed)
            return build(self, *args)

    return method
