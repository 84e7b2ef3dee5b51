"""What `make run` shows: each model trained for a little, and one page of what they do and how fast the ops are on this machine.

The models train in processes of their own, as the commands that the page names do, one on each core where there are several.
"""

import contextlib
import json
import os
import shlex
import signal
import tempfile
import time
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import IO

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

import minkernels
from minmodels import Interrupted, UserError, exhibits, files, forked, page, speed
from minmodels.data import text as textdata
from minmodels.train import Output, Signals, told

GRACE = 90.0  # seconds at most for what a training does besides its steps: loading, evaluating, drawing
USUAL = 4.0  # what that takes on a machine that nobody else uses
BUDGET = 285.0  # seconds for all trainings: on a busy machine the later ones get less time, so that `make run` stays under six minutes
INDEX = "index.html"


@dataclass
class Training:
    """A process that trains the model of an exhibit into folder."""

    exhibit: exhibits.Exhibit
    command: list[str]
    folder: Path
    limit: float  # seconds in which the model learns
    process: BaseProcess | None = None
    errors: IO = field(default_factory=lambda: tempfile.NamedTemporaryFile("w+"))  # noqa: SIM115  unlike a pipe, it is never full
    begun: float = 0.0

    def start(self, threads: int, scale: float):
        self.limit *= scale
        self.command += ["--minutes", f"{self.limit / 60:.3g}"]
        for name in (files.CHECKPOINT, files.METRICS, files.CONFIG):  # of an earlier showcase
            with contextlib.suppress(OSError):  # where nothing can be written, the training says so
                (self.folder / name).unlink()
        self.process = forked.process(["train", *self.command], threads, self.errors.name)
        self.process.start()
        self.begun = time.perf_counter()

    def done(self) -> bool:
        if self.process.is_alive() and time.perf_counter() - self.begun > self.limit + GRACE:
            self.stop()
        return not self.process.is_alive()

    def stop(self):
        if self.process and self.process.is_alive():
            with contextlib.suppress(ProcessLookupError):  # it has just ended
                os.kill(self.process.pid, signal.SIGINT)
            self.process.join(10)
            self.process.kill()
            self.process.join()

    def last(self, key: str) -> dict:
        """Of the lines in the last part of its metrics, the last one with that key; {} if there is none yet."""
        try:
            with (self.folder / files.METRICS).open("rb") as f:
                f.seek(max(0, f.seek(0, os.SEEK_END) - 4096))
                lines = f.read().decode().split("\n")[:-1]  # the last one may be half written, and so may the first be cut
        except OSError:
            return {}
        return next((json.loads(line) for line in reversed(lines) if line.startswith("{") and f'"{key}"' in line), {})

    def scores(self) -> dict:
        return self.last("heldout")

    def failure(self) -> str:
        """One sentence of why it ended early; "" if it did not."""
        if not self.process.exitcode:
            return ""
        if time.perf_counter() - self.begun > self.limit + GRACE:
            return f"it was not done after {self.limit + GRACE:.0f} seconds"
        self.errors.seek(0)
        lines = self.errors.read().strip().splitlines()
        return lines[-1].removeprefix("error: ") if lines else f"the training ended with status {self.process.exitcode}"


def showcase(
    text: str = "", out: str = "runs/showcase", minutes: float = 1.0, seconds: float = 0.7, sizes: dict[str, tuple] | None = None
):
    """Writes out/index.html, and a folder beside it for each model, as `train` leaves it.

    text: a file for the language models. minutes: those in which minGPT learns; the others have less, in proportion. seconds, sizes: of
    the speed table, see speed.measure. What cannot be done here is left out with a sentence that says why, and the rest goes on.
    A script that calls this needs `if __name__ == "__main__":`, as with all of multiprocessing.
    Raises: UserError for a text that cannot be read, a folder that cannot be written, and if no model could be trained; Interrupted.
    """
    console, folder, start = Output(), Path(out), time.perf_counter()
    if text:
        textdata.read(text)
    with files.writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    info = minkernels.info()
    console.print(str(info), soft_wrap=True)
    fast = info.cpu_level == "avx512_bf16" or torch.cuda.is_available()  # elsewhere bfloat16 is emulated
    trainings = [_training(exhibit, folder, text, minutes, fast) for exhibit in exhibits.EXHIBITS]
    failures = _train(trainings, start + BUDGET * max(1, minutes), console)
    if all(failures.values()):
        raise UserError(f"nothing can be shown: {next(iter(failures.values()))}")
    shown = {training.exhibit.name: failures[training.exhibit.name] or _show(training, text, console) for training in trainings}

    console.print("timing the ops")
    rows = speed.measure(seconds, sizes)
    console.print(speed.table(rows), speed.NOTE, sep="\n", highlight=False)
    spent = (time.perf_counter() - start) / 60
    index = folder / INDEX
    with files.replacing(index) as part:
        part.write_text(_page(info, trainings, shown, rows, sizes, spent), encoding="utf-8", errors="replace")
    console.print(f"{spent:.1f} minutes. The page: {index}", soft_wrap=True)


def _training(exhibit: exhibits.Exhibit, folder: Path, text: str, minutes: float, fast: bool) -> Training:
    place = folder / exhibit.name
    options = [*exhibit.options.split(), *(["--text", text] if text and exhibit.reads_text else [])]
    options += ["--dtype", "bfloat16" if fast and exhibit.bfloat16 else "float32"]
    return Training(exhibit, [exhibit.name, *options, "--overwrite", "--out", str(place)], place, 60 * exhibit.minutes * minutes)


def _train(trainings: list[Training], deadline: float, console: Console) -> dict[str, str]:
    """Trains them all by the deadline, as many at a time as there are cores, at most 4; returns why each is left out, "" if it is not."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    lanes = min(4, cores)
    waiting, running, failures = sorted(trainings, key=lambda t: -t.limit), [], {}
    bar = Progress(TextColumn("{task.description}"), BarColumn(), console=console, disable=not console.is_terminal, transient=True)
    tasks = {}
    with Signals() as signals, bar:
        try:
            while waiting or running:
                while waiting and len(running) < lanes:
                    needed = sum(t.limit + USUAL for t in waiting) / lanes
                    running.append(waiting.pop(0))
                    running[-1].start(max(1, cores // lanes), min(1, max(0.1, (deadline - time.perf_counter()) / needed)))
                    tasks[running[-1].exhibit.name] = bar.add_task(f"{running[-1].exhibit.title:9}", total=running[-1].limit)
                for training in [t for t in running if t.done()]:
                    running.remove(training)
                    name, title = training.exhibit.name, training.exhibit.title
                    bar.remove_task(tasks[name])
                    failures[name] = failure = training.failure()
                    scores = {key: value for key, value in training.scores().items() if key not in ("step", "seconds")}
                    line = f"left out: {failure}" if failure else told(scores)
                    console.print(f"{title:9}  {time.perf_counter() - training.begun:4.0f} s  {line}", soft_wrap=True)
                for training in running:
                    _advance(bar, tasks[training.exhibit.name], training)
                time.sleep(0.2)
                if signals.number:
                    raise Interrupted("interrupted; no page was written", signals.number)
        finally:
            for training in running:
                training.stop()
    return failures


def _show(training: Training, text: str, console: Console) -> exhibits.Shown | str:
    """What it has to show, or why it has nothing: a failure here is its own, and the others go on."""
    try:
        return training.exhibit.show(exhibits.Trained(training.folder, training.scores(), text))
    except Exception as error:
        why = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        console.print(f"{training.exhibit.title:9}  left out: {why}", soft_wrap=True)
        return why


def _advance(bar: Progress, task, training: Training):
    if step := training.last("loss"):
        description = f"{training.exhibit.title:9}  step {step['step']:5d}  loss {step['loss']:.3f}"
        bar.update(task, completed=step["seconds"], description=description)


def _page(info, trainings, shown, rows, sizes, spent) -> str:
    sections, tiles = [], []
    for training in trainings:
        title, found = training.exhibit.title, shown[training.exhibit.name]
        if isinstance(found, exhibits.Shown):
            command = shlex.join(["python", "-m", "minmodels", "train", *training.command])
            tiles.append(found.tile)
            if found.body:
                sections.append(page.section(f"{title}: {training.exhibit.claim}", found.about, *found.body, command=command))
        else:
            sections.append(page.left_out(title, found))
    models = len(tiles)
    tiles += [(f"{r.ratio:.1f}x", "attention in bf16: as fast as PyTorch") for r in rows if r[:2] == ("attention fwd+bwd", "bf16")]
    sections.append(exhibits.speed_section(rows, sizes))
    sections.append(page.section("This machine", "What serves each op here, and why.", page.text("python -m minkernels", str(info))))
    cpu = " ".join(str(info).splitlines()[1].split())
    about = (
        f"{models} small models learned from nothing on this machine, in {spent:.1f} minutes with all else on this page. They run "
        f"on the fused kernels; each section names the command that repeats it, or does it for longer and better. {cpu}."
    )
    footer = f"Written by python -m minmodels showcase, {time.strftime('%Y-%m-%d %H:%M')}. docs/models.md has what longer trainings reach."
    return page.page("minkernels: what this machine did", about, tiles, sections, footer)
