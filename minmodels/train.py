"""Training of any model, by its recipe. A resumed run has the losses of an unbroken one, on as many threads bit for bit."""

import contextlib
import json
import math
import signal
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path
from shlex import quote
from statistics import fmean

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from torch import Tensor

import minkernels
from minmodels import Interrupted, UserError, files
from minmodels.device import pick_device
from minmodels.kernels import using
from minmodels.options import FREE, MODELS, TrainOptions
from minmodels.plot import loss_figure
from minmodels.recipes import check_model, recipe


class Trained(UserError):
    """A run that has nothing left to do; scores: what train() would have returned."""

    def __init__(self, message: str, scores: dict[str, float]):
        super().__init__(message)
        self.scores = scores


class Output(Console):
    def __init__(self):
        super().__init__(highlight=False, markup=False, emoji=False)

    def on_broken_pipe(self):
        raise BrokenPipeError  # rich itself would end the process, with status 1


def train(
    name: str, given: dict, *, resume: bool = False, overwrite: bool = False, meta: dict | None = None, console: Console | None = None
) -> tuple[dict[str, float], str]:
    """Trains the model of that name. Returns its last evaluation, and a line that says what can be done with it.

    given: options of that model, by name. With resume, those not given are as in the checkpoint; all but the FREE ones must be as there.
    meta: of a checkpoint of the same model, from which a new run takes what Recipe.again() does.
    Writes out/run.json: model, config and options; out/checkpoint.safetensors at each evaluation, at the end and when
        interrupted; out/metrics.jsonl: a line a step {step, loss, lr, seconds} and a line an evaluation {step, heldout, ..., seconds},
        seconds being those spent in training steps; and at the end out/loss.png, and what pictures the model has. With resume, a run that
        has nothing left to do draws these again.
    SIGINT or SIGTERM ends the run after the present step, with a checkpoint; a second one ends it at once.
    Raises: UserError for bad input, a disk that is full, a loss that is not finite; Trained; Interrupted.
    """
    console = console or Output()
    given = {**given, "out": given.get("out") or f"runs/{name}"}
    path = Path(given["out"]) / files.CHECKPOINT
    if resume:
        tensors, meta = files.load_checkpoint(path)
        check_model(name, meta, path)
        options = _resumed(MODELS[name].options, _saved(name, meta, path), given)
    elif path.exists() and not overwrite:
        raise UserError(f"{path} exists: --resume continues it, --overwrite starts anew")
    else:
        options = MODELS[name].options.of(given)
    places = {key: str(Path(getattr(options, key)).absolute()) for key in _data(options) if getattr(options, key)}
    run = Run(name, replace(options, **places), meta)  # whole paths: it may be resumed from elsewhere
    if resume:
        run.restore(tensors, meta)
    if run.progress() >= 1:
        scores, spent = run.heldout(), f"{run.step} steps, {run.seconds / 60:.1f} minutes"
        run.finish(path.parent)
        raise Trained(f"{path} is trained already ({spent}), its pictures are drawn anew: ask for more with --steps or --minutes", scores)
    with files.writing(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
    with files.claimed(path.parent):
        return _train(run, path, console)


def _train(run: "Run", path: Path, console: Console) -> tuple[dict[str, float], str]:
    console.print(run, soft_wrap=True)
    columns = BarColumn(), TaskProgressColumn(), TextColumn("{task.description}"), TimeRemainingColumn()
    bar = Progress(*columns, console=console, disable=not console.is_terminal, transient=True)
    task, before = bar.add_task("", total=1.0, completed=run.progress()), (run.step, run.seconds)
    with Signals() as signals, bar:
        done = stop = metrics = None
        while not (done or stop):
            since, record = run.step, run.train_step()
            if metrics is None:  # only now: what fails at once leaves there what it would replace
                run.finite(float(record["loss"]), run.step)
                metrics = _start(run, path, since)
            metrics.pending.append(record)
            done, stop = run.progress() >= 1, bool(signals.number)
            evaluate = done or run.step % run.options.eval_every == 0
            if evaluate or stop or metrics.due():
                losses = [run.finite(record["loss"], record["step"]) for record in metrics.flush()]
                speed = (run.step - before[0]) * run.units / (run.seconds - before[1])
                state = f"step {run.step:5d}  loss {fmean(losses):.3f}  {speed:6,.0f} {run.recipe.unit}/s"
                bar.update(task, completed=run.progress(), description=state)
            if evaluate:
                scores = run.heldout()
                run.finite(scores["heldout"], run.step)
                metrics.write({"step": run.step, **scores, "seconds": run.seconds})
            if evaluate or stop:
                run.save(path)
            if evaluate:  # only now: who reads this may be gone
                console.print(f"{state}  {told(scores)}", soft_wrap=True)
    if not done:
        again = f"python -m minmodels train {run.name} --out {quote(str(path.parent))} --resume"
        raise Interrupted(f"interrupted; {path} holds step {run.step}", signals.number, again)
    return scores, run.finish(path.parent)


def _start(run: "Run", path: Path, since: int) -> files.Metrics:
    """The files of a run from the step `since` of its checkpoint on; from 0 on they are new ones."""
    with files.writing(path.parent):
        if not since:
            for name in (files.CHECKPOINT, files.LOSS):
                path.with_name(name).unlink(missing_ok=True)
        metrics = files.Metrics(path.with_name(files.METRICS), upto=since)
    with files.replacing(path.with_name(files.CONFIG)) as part:
        part.write_text(json.dumps({"model": run.name, "config": run.recipe.meta()["config"], "options": asdict(run.options)}, indent=1))
    run.clock = time.perf_counter()
    return metrics


def evaluate(name: str, checkpoint: str, **given) -> dict[str, float]:
    """The scores of a trained model on its held-out data. given: the options that may change, device and data. Raises UserError."""
    tensors, meta = files.load_checkpoint(Path(checkpoint), prefix="model.")
    check_model(name, meta, checkpoint)
    if unknown := given.keys() - MODELS[name].options.__dataclass_fields__.keys():
        raise UserError(f"{name} has no option --{min(unknown)}")
    run = Run(name, MODELS[name].options(**{**_saved(name, meta, checkpoint), **given}), meta)
    run.check_data(meta)
    run.load_model(tensors)
    return run.heldout()


def told(scores: dict) -> str:
    return "  ".join(f"{'held-out loss' if key == 'heldout' else key} {value:.3f}" for key, value in scores.items())


def _data(options) -> list[str]:
    return [key for key, f in options.__dataclass_fields__.items() if f.metadata.get("data")]


def _saved(name: str, meta: dict, checkpoint) -> dict:
    """The options in a checkpoint, which may be another version's."""
    saved = meta["options"]
    if unknown := saved.keys() - MODELS[name].options.__dataclass_fields__.keys():
        raise UserError(f"{checkpoint} was trained with --{min(unknown).replace('_', '-')}, which this version does not have")
    return saved


def _resumed(kind: type[TrainOptions], saved: dict, given: dict) -> TrainOptions:
    for key in saved.keys() - set(FREE) - set(_data(kind)):
        if given.get(key, saved[key]) != saved[key]:
            before = "none" if saved[key] == "" else saved[key]
            raise UserError(f"--{key.replace('_', '-')} {given[key]}: the checkpoint was trained with {before}")
    if "steps" in given:
        saved = {**saved, "minutes": 0.0}
    return kind(**{**saved, **given})


class Run:
    """What a checkpoint holds: model, optimizers, the generator of the batches, the steps and seconds spent."""

    def __init__(self, name: str, options: TrainOptions, meta: dict | None = None):
        self.name, self.options, self.step, self.seconds = name, options, 0, 0.0
        self.device = pick_device(options.device)
        self.recipe = recipe(name).again(options, meta) if meta else recipe(name)(options)
        self.units = options.batch_size * options.accumulate * self.recipe.units  # of a step
        self.model = self.recipe.model.to(self.device)
        self.called = torch.compile(self.model) if options.compile else self.model
        self.optimizers = self.recipe.optimizers()
        self.generator = torch.Generator().manual_seed(options.seed)  # on the CPU: the same batches whatever the device
        self.clock = time.perf_counter()

    def __str__(self):
        size = sum(p.numel() for p in self.model.parameters())
        how = f"{self.options.dtype} on {self.device}, {self.options.kernels} kernels"
        if self.options.dtype == "bfloat16" and self.device.type == "cpu" and minkernels.info().cpu_level in ("plain", "avx2"):
            how += " (this CPU has no instructions for it: --dtype float32 is several times as fast)"
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
        """Draws the pictures, after heldout(); returns the last line that training prints."""
        figure = loss_figure(folder / files.METRICS, f"{self.name} learns {self.recipe.data.split(':')[0]}", self.recipe.loss_unit)
        with files.replacing(folder / files.LOSS) as part:
            figure.savefig(part)
        self.model.eval()
        with using(self.options.kernels):
            return self.recipe.finish(self.model, folder)

    def finite(self, loss: float, step: int) -> float:
        if not math.isfinite(loss):
            raise UserError(f"the loss is {loss} at step {step}: try a lower --lr than {self.options.lr}")
        return loss

    def save(self, path: Path):
        weights = self.model.state_dict()
        if wrong := [name for name, t in weights.items() if not t.isfinite().all()]:  # the last loss is that of the weights before these
            kept = f", {path} is as it was" if path.exists() else ""
            raise UserError(f"step {self.step} is not saved{kept}: {wrong[0]} is not finite, try a lower --lr than {self.options.lr}")
        tensors = {f"model.{name}": t for name, t in weights.items()}
        states = [(f"optimizer.{name}.{key}", t) for name, _, state in self._states() for key, t in state.items()]
        tensors.update(states)
        meta = {
            "model": self.name,
            **self.recipe.meta(),
            "data_sha256": self.recipe.sha256,
            "options": asdict(self.options),
            "step": self.step,
            "seconds": self.seconds,
            "optimizer": len(states),  # tensors
        }
        files.save_checkpoint(path, tensors | {"generator": self.generator.get_state()}, meta)
        self.clock = time.perf_counter()

    def load_model(self, tensors: dict[str, Tensor]):
        try:
            self.model.load_state_dict({name.removeprefix("model."): t for name, t in tensors.items() if name.startswith("model.")})
        except RuntimeError as error:
            raise UserError(f"the checkpoint does not fit the model: {str(error).splitlines()[-1].strip()}") from error

    def check_data(self, meta: dict):
        if meta["data_sha256"] != self.recipe.sha256:
            raise UserError(f"{self.recipe.data.split(':')[0]}: not the data that the checkpoint was trained on")

    def restore(self, tensors: dict[str, Tensor], meta: dict):
        self.check_data(meta)
        self.load_model(tensors)
        states = {name: (p, state) for name, p, state in self._states()}
        given = {key.removeprefix("optimizer."): t for key, t in tensors.items() if key.startswith("optimizer.")}
        try:
            if len(given) != meta.get("optimizer"):
                raise KeyError(f"{len(given)} of {meta.get('optimizer')} tensors")
            for key, t in given.items():
                name, _, slot = key.rpartition(".")
                p, state = states[name]
                if t.dim() and t.shape != p.shape:
                    raise KeyError(f"{key} is {tuple(t.shape)}, not {tuple(p.shape)}")
                state[slot] = t.to(self.device)
            self.generator.set_state(tensors["generator"])
        except (KeyError, RuntimeError) as error:  # RuntimeError: of set_state()
            raise UserError(f"the checkpoint is damaged: its optimizer or generator does not fit ({error})") from error
        self.step, self.seconds = meta["step"], meta["seconds"]

    def _states(self):
        """(name, parameter, its optimizer's state)."""
        names = {id(p): name for name, p in self.model.named_parameters()}
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                yield from ((names[id(p)], p, optimizer.state[p]) for p in group["params"])

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
