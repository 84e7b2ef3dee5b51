"""Training of any model, by its recipe. A resumed run has the losses of an unbroken one, bit for bit."""

import contextlib
import json
import math
import signal
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path
from shlex import quote

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from torch import Tensor

from minmodels import Interrupted, UserError, files
from minmodels.device import pick_device
from minmodels.kernels import using
from minmodels.options import FREE, MODELS, TrainOptions
from minmodels.plot import loss_figure
from minmodels.recipes import check_model, recipe


class Trained(UserError):
    """A run that has nothing left to do."""


def train(
    name: str, given: dict, *, resume: bool = False, overwrite: bool = False, console: Console | None = None
) -> tuple[dict[str, float], str]:
    """Trains the model of that name. Returns its last evaluation, and a line that says what can be done with it.

    given: options of that model, by name. With resume, those not given are as in the checkpoint; all but the FREE ones must be as there.
    Writes out/run.json: model, config and options; out/checkpoint.safetensors at each evaluation, at the end and when
        interrupted; out/metrics.jsonl: a line a step {step, loss, lr, seconds} and a line an evaluation {step, heldout, ..., seconds},
        seconds being those spent in training steps; and at the end out/loss.png, and what pictures the model has.
    SIGINT or SIGTERM ends the run after the present step, with a checkpoint; a second one ends it at once.
    Raises: UserError for bad input, a disk that is full, a loss that is not finite; Interrupted.
    """
    console = console or Console(highlight=False, markup=False)
    given = {**given, "out": given.get("out") or f"runs/{name}"}
    path = Path(given["out"]) / files.CHECKPOINT
    if resume:
        tensors, meta = files.load_checkpoint(path)
        check_model(name, meta, path)
        options = _resumed(MODELS[name].options, meta["options"], given)
    elif path.exists() and not overwrite:
        raise UserError(f"{path} exists: --resume continues it, --overwrite starts anew")
    else:
        options = MODELS[name].options.of(given)
    places = {key: str(Path(getattr(options, key)).resolve()) for key in _data(options) if getattr(options, key)}
    run = Run(name, replace(options, **places))  # whole paths: it may be resumed from elsewhere
    if resume:
        run.restore(tensors, meta)
    if run.progress() >= 1:
        spent = f"{run.step} steps, {run.seconds / 60:.1f} minutes"
        raise Trained(f"{path} is trained already ({spent}): ask for more with --steps or --minutes")
    with files.writing(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        if not resume:
            path.unlink(missing_ok=True)
        metrics = files.Metrics(path.with_name(files.METRICS), upto=run.step)
    with files.replacing(path.with_name(files.CONFIG)) as part:
        part.write_text(json.dumps({"model": name, "config": run.recipe.meta()["config"], "options": asdict(run.options)}, indent=1))
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
                speed = (run.step - before[0]) * run.units / (run.seconds - before[1])
                state = f"step {run.step:5d}  loss {loss:.3f}  {speed:6,.0f} {run.recipe.unit}/s"
                bar.update(task, completed=run.progress(), description=state)
            if evaluate:
                scores = run.heldout()
                run.finite(scores["heldout"])
                metrics.write({"step": run.step, **scores, "seconds": run.seconds})
                console.print(f"{state}  {told(scores)}", soft_wrap=True)
            if evaluate or stop:
                run.save(path)
    if not done:
        again = f"python -m minmodels train {name} --out {quote(str(path.parent))} --resume"
        raise Interrupted(f"interrupted; {path} holds step {run.step}", signals.number, again)
    title = f"{name} learns {run.recipe.data.split(':')[0]}"
    with files.replacing(path.with_name("loss.png")) as part:
        loss_figure(path.with_name(files.METRICS), title, run.recipe.loss_unit).savefig(part)
    return scores, run.finish(path.parent)


def evaluate(name: str, checkpoint: str, **given) -> dict[str, float]:
    """The scores of a trained model on its held-out data, or on those of the options given. Raises UserError."""
    tensors, meta = files.load_checkpoint(Path(checkpoint), prefix="model.")
    check_model(name, meta, checkpoint)
    run = Run(name, MODELS[name].options(**{**meta["options"], **given}))
    run.load_model(tensors)
    return run.heldout()


def told(scores: dict) -> str:
    return "  ".join(f"{'held-out loss' if key == 'heldout' else key} {value:.3f}" for key, value in scores.items())


def _data(options) -> list[str]:
    return [key for key, f in options.__dataclass_fields__.items() if f.metadata.get("data")]


def _resumed(kind: type[TrainOptions], saved: dict, given: dict) -> TrainOptions:
    for key in saved.keys() - set(FREE) - set(_data(kind)):
        if given.get(key, saved[key]) != saved[key]:
            raise UserError(f"--{key.replace('_', '-')} {given[key]}: the checkpoint was trained with {saved[key]}")
    if "steps" in given:
        saved = {**saved, "minutes": 0.0}
    return kind(**{**saved, **given})


class Run:
    """What a checkpoint holds: model, optimizers, the generator of the batches, the steps and seconds spent."""

    def __init__(self, name: str, options: TrainOptions):
        self.name, self.options, self.step, self.seconds = name, options, 0, 0.0
        self.device = pick_device(options.device)
        self.recipe = recipe(name)(options)
        self.units = options.batch_size * options.accumulate * self.recipe.units  # of a step
        self.model = self.recipe.model.to(self.device)
        self.called = torch.compile(self.model) if options.compile else self.model
        self.optimizers = self.recipe.optimizers()
        self.generator = torch.Generator().manual_seed(options.seed)  # on the CPU: the same batches whatever the device
        self.clock = time.perf_counter()

    def __str__(self):
        size = sum(p.numel() for p in self.model.parameters())
        how = f"{self.options.dtype} on {self.device}, {self.options.kernels} kernels"
        return f"{self.name}, {size / 1e6:.2f} M parameters, {how}, learns {self.recipe.data}"

    def progress(self) -> float:
        """0 to 1, by steps or by minutes."""
        minutes = self.options.minutes
        return self.seconds / (60 * minutes) if minutes else self.step / self.options.steps

    def rate(self) -> float:
        """The learning rate of the next step."""
        return self.options.lr * min(1, (self.step + 1) / self.options.warmup) * (1 + math.cos(math.pi * self.progress())) / 2

    def train_step(self) -> dict:
        lr, parts = self.rate(), self.options.accumulate
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.zero_grad()
        loss = 0.0
        for _ in range(parts):
            part = self._loss(*self.recipe.batch(self.generator)) / parts
            part.backward()
            loss += part.detach()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.options.clip)
        for optimizer in self.optimizers:
            optimizer.step()
        self.step, now = self.step + 1, time.perf_counter()
        self.seconds, self.clock = self.seconds + now - self.clock, now
        return {"step": self.step, "loss": loss, "lr": lr, "seconds": self.seconds}

    @torch.no_grad()
    def heldout(self) -> dict[str, float]:
        """The scores on held-out data; the time that they take is not counted."""
        self.model.eval()
        with using(self.options.kernels), self._autocast():
            scores = self.recipe.heldout(self.model, lambda t: t.to(self.device))
        self.model.train()
        self.clock = time.perf_counter()
        return scores

    @torch.no_grad()
    def finish(self, folder: Path) -> str:
        self.model.eval()
        with using(self.options.kernels):
            return self.recipe.finish(self.model, folder)

    def finite(self, loss: float) -> float:
        if not math.isfinite(loss):
            raise UserError(f"the loss is {loss} at step {self.step}: try a lower --lr than {self.options.lr}")
        return loss

    def save(self, path: Path):
        tensors = {f"model.{name}": t for name, t in self.model.state_dict().items()}
        for name, state in self._states():
            tensors |= {f"optimizer.{name}.{key}": t for key, t in state.items()}
        meta = {
            "model": self.name,
            **self.recipe.meta(),
            "data_sha256": self.recipe.sha256,
            "options": asdict(self.options),
            "step": self.step,
            "seconds": self.seconds,
        }
        files.save_checkpoint(path, tensors | {"generator": self.generator.get_state()}, meta)
        self.clock = time.perf_counter()

    def load_model(self, tensors: dict[str, Tensor]):
        try:
            self.model.load_state_dict({name.removeprefix("model."): t for name, t in tensors.items() if name.startswith("model.")})
        except RuntimeError as error:
            raise UserError(f"the checkpoint does not fit the model: {str(error).splitlines()[-1].strip()}") from error

    def restore(self, tensors: dict[str, Tensor], meta: dict):
        if meta["data_sha256"] != self.recipe.sha256:
            raise UserError(f"{self.recipe.data.split(':')[0]}: not the data that the checkpoint was trained on")
        self.load_model(tensors)
        states = dict(self._states())
        for key, t in tensors.items():
            if key.startswith("optimizer."):
                name, _, slot = key.removeprefix("optimizer.").rpartition(".")
                states[name][slot] = t.to(self.device)
        self.generator.set_state(tensors["generator"])
        self.step, self.seconds = meta["step"], meta["seconds"]

    def _states(self):
        """(name of a parameter, its optimizer's state)."""
        names = {id(p): name for name, p in self.model.named_parameters()}
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                yield from ((names[id(p)], optimizer.state[p]) for p in group["params"])

    def _autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16) if self.options.dtype == "bfloat16" else contextlib.nullcontext()

    def _loss(self, *batch: Tensor) -> Tensor:
        with using(self.options.kernels), self._autocast():
            return self.recipe.loss(self.called, *(t.to(self.device) if t.dim() else t for t in batch))  # a seed is read by the host


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
