"""Training on text. Muon (Jordan 2024) for the matrices inside, which at these sizes needs far fewer tokens than AdamW, and AdamW
for the rest. A resumed run has the losses of an unbroken one, bit for bit.
"""

import math
import signal
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from torch import Tensor

from minmodels import Interrupted, UserError, files
from minmodels.data import text as textdata
from minmodels.device import pick_device
from minmodels.mingpt import GPT, GPTConfig
from minmodels.options import KEPT, TrainOptions


def train(given: dict, *, resume: bool = False, overwrite: bool = False, console: Console | None = None) -> float:
    """Trains minGPT and returns its loss on the held-out text, in nats per character.

    given: TrainOptions by name. With resume, those not given are as in the checkpoint, and the KEPT ones must be as there.
    Writes out/checkpoint.safetensors at each evaluation, at the end and when interrupted, and out/metrics.jsonl: a line a step
        {step, loss, lr, seconds} and a line an evaluation {step, heldout, seconds}; seconds are those spent in training steps.
    SIGINT or SIGTERM ends the run after the present step, with a checkpoint; a second one ends it at once.
    Raises: UserError for bad input, a disk that is full, a loss that is not finite; Interrupted.
    """
    console = console or Console(highlight=False, markup=False)
    path = Path(given.get("out", TrainOptions.out)) / files.CHECKPOINT
    if resume:
        tensors, meta = files.load_checkpoint(path)
        options = _resumed(meta["options"], given)
    elif path.exists() and not overwrite:
        raise UserError(f"{path} exists: --resume continues it, --overwrite starts anew")
    else:
        options = TrainOptions(**given)
    options = replace(options, text=options.text and str(Path(options.text).resolve()))  # it may be resumed from elsewhere
    run = Run(options, textdata.load(options.text, options.block_size))
    if resume:
        run.restore(tensors, meta)
    if run.progress() >= 1:
        spent = f"{run.step} steps, {run.seconds / 60:.1f} minutes"
        raise UserError(f"{path} is trained already ({spent}): ask for more with --steps or --minutes")
    with files.writing(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        if not resume:
            path.unlink(missing_ok=True)
        metrics = files.Metrics(path.with_name(files.METRICS), upto=run.step)
    console.print(run, soft_wrap=True)

    columns = BarColumn(), TaskProgressColumn(), TextColumn("{task.description}"), TimeRemainingColumn()
    bar = Progress(*columns, console=console, disable=not console.is_terminal, transient=True)
    task, before = bar.add_task("", total=1.0, completed=run.progress()), (run.step, run.seconds)
    with Signals() as signals, bar:
        done = stop = False
        while not (done or stop):
            metrics.pending.append(run.train_step())
            done, stop = run.progress() >= 1, bool(signals.number)
            evaluate = done or run.step % options.eval_every == 0
            if evaluate or stop or metrics.due():
                loss = run.finite(metrics.flush())
                speed = (run.step - before[0]) * options.batch_size * options.block_size / (run.seconds - before[1])
                state = f"step {run.step:5d}  loss {loss:.3f}  {speed:6,.0f} characters/s"
                bar.update(task, completed=run.progress(), description=state)
            if evaluate:
                heldout = run.finite(run.heldout())
                metrics.write({"step": run.step, "heldout": heldout, "seconds": run.seconds})
                console.print(f"{state}  held-out {heldout:.3f} nats per character", soft_wrap=True)
            if evaluate or stop:
                run.save(path)
    if not done:
        resume = f"python -m minmodels train gpt --out {path.parent} --resume"
        raise Interrupted(f"interrupted; {path} holds step {run.step}. To go on: {resume}", signals.number)
    return heldout


def _resumed(saved: dict, given: dict) -> TrainOptions:
    for name in KEPT:
        if given.get(name, saved[name]) != saved[name]:
            option = name.replace("_", "-")
            raise UserError(f"--{option} {given[name]}: the checkpoint was trained with {saved[name]}")
    if "steps" in given:
        saved = {**saved, "minutes": 0.0}
    return TrainOptions(**{**saved, **given})


class Run:
    """What a checkpoint holds: model, optimizers, the generator of the batches, the steps and seconds spent."""

    def __init__(self, options: TrainOptions, text: textdata.Text):
        self.options, self.text, self.step, self.seconds = options, text, 0, 0.0
        try:
            config = GPTConfig(len(text.vocab), options.block_size, options.n_layer, options.n_head, options.n_embd)
        except ValueError as error:
            raise UserError(str(error)) from error
        self.device = pick_device(options.device)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(options.seed)
            self.model = GPT(config).to(self.device)
        inner = {name: p for name, p in self.model.named_parameters() if name.startswith("h.") and p.dim() == 2}
        outer = {name: p for name, p in self.model.named_parameters() if name not in inner}
        muon = torch.optim.Muon(inner.values(), options.lr, weight_decay=0.0, momentum=0.9, adjust_lr_fn="match_rms_adamw")
        adamw = torch.optim.AdamW(outer.values(), options.lr, weight_decay=0.0, fused=True)
        self.optimizers = dict.fromkeys(inner, muon) | dict.fromkeys(outer, adamw)  # by parameter name
        self.generator = torch.Generator().manual_seed(options.seed)  # on the CPU: the same batches whatever the device
        self.clock = time.perf_counter()

    def __str__(self):
        size = sum(p.numel() for p in self.model.parameters())
        return (
            f"minGPT, {size / 1e6:.2f} M parameters, {self.options.dtype} on {self.device}, learns {self.text.name}: "
            f"{len(self.text.train):,} characters, {len(self.text.heldout):,} held out, {len(self.text.vocab)} different ones"
        )

    def progress(self) -> float:
        """0 to 1, by steps or by minutes."""
        minutes = self.options.minutes
        return self.seconds / (60 * minutes) if minutes else self.step / self.options.steps

    def rate(self) -> float:
        """The learning rate of the next step."""
        return self.options.lr * min(1, (self.step + 1) / self.options.warmup) * (1 + math.cos(math.pi * self.progress())) / 2

    def train_step(self) -> dict:
        lr = self.rate()
        optimizers = set(self.optimizers.values())
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = lr
            optimizer.zero_grad()
        loss = self._loss(*textdata.sample(self.text.train, self.options.batch_size, self.options.block_size, self.generator))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        self.step, now = self.step + 1, time.perf_counter()
        self.seconds, self.clock = self.seconds + now - self.clock, now
        return {"step": self.step, "loss": loss.detach(), "lr": lr, "seconds": self.seconds}

    @torch.no_grad()
    def heldout(self) -> float:
        """The mean loss on the held-out text; the time that it takes is not counted."""
        windows = [t.split(64) for t in textdata.sweep(self.text.heldout, self.options.block_size)]
        total = sum(self._loss(idx, targets).item() * len(idx) for idx, targets in zip(*windows, strict=True))
        self.clock = time.perf_counter()
        return total / sum(map(len, windows[0]))

    def finite(self, loss: float) -> float:
        if not math.isfinite(loss):
            raise UserError(f"the loss is {loss} at step {self.step}: try a lower --lr than {self.options.lr}")
        return loss

    def save(self, path: Path):
        tensors = {f"model.{name}": t for name, t in self.model.state_dict().items()}
        for name, p in self.model.named_parameters():
            tensors |= {f"optimizer.{name}.{key}": t for key, t in self.optimizers[name].state[p].items()}
        meta = {
            "model": "gpt",
            "config": asdict(self.model.config),
            "vocab": self.text.vocab,
            "text_sha256": self.text.sha256,
            "options": asdict(self.options),
            "step": self.step,
            "seconds": self.seconds,
        }
        files.save_checkpoint(path, tensors | {"generator": self.generator.get_state()}, meta)
        self.clock = time.perf_counter()

    def restore(self, tensors: dict[str, Tensor], meta: dict):
        if meta["text_sha256"] != self.text.sha256:
            raise UserError(f"{self.text.name}: not the text that the checkpoint was trained on")
        self.model.load_state_dict({name: tensors[f"model.{name}"] for name in self.model.state_dict()})
        parameters = dict(self.model.named_parameters())
        for key, t in tensors.items():
            if key.startswith("optimizer."):
                name, _, slot = key.removeprefix("optimizer.").rpartition(".")
                self.optimizers[name].state[parameters[name]][slot] = t.to(self.device)
        self.generator.set_state(tensors["generator"])
        self.step, self.seconds = meta["step"], meta["seconds"]

    def _loss(self, idx: Tensor, targets: Tensor) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.options.dtype == "bfloat16"):
            return self.model(idx.to(self.device), targets.to(self.device))


class Signals:
    """The first SIGINT or SIGTERM is noted in number; a second one acts as it did before."""

    def __enter__(self):
        self.number, self.before = 0, {}
        if threading.current_thread() is threading.main_thread():  # only there can handlers be set
            self.before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _note(self, number, _frame):
        self.number = number
        self.__exit__()
