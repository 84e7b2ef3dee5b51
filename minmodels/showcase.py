"""What `make run` shows: this machine, minGPT trained for a minute, its text, its loss curve, and each fused op timed."""

import itertools
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

import minkernels
from minkernels import attention, cross_entropy
from minmodels import files
from minmodels.device import pick_device
from minmodels.generate import generate
from minmodels.options import GPTOptions
from minmodels.train import Run, train

SIZES = {"attention": (1, 8, 2048, 128), "cross_entropy": (1024, 32000)}  # (B, H, T, D), causal; (N, V)
OPS = {  # ours, PyTorch's best, and a part of the inputs that alone decides the same part of the results
    "attention": (partial(attention, causal=True), partial(F.scaled_dot_product_attention, is_causal=True), lambda t: t[:, :1]),
    "cross_entropy": (partial(cross_entropy, reduction="sum"), partial(F.cross_entropy, reduction="sum"), lambda t: t[:64]),
}

CAPTION = """attention: {attention}, causal; torch: F.scaled_dot_product_attention
cross_entropy: {cross_entropy}; torch: F.cross_entropy
ms: medians of calls in turn; ratio: how many times as fast as PyTorch
error: of the results, or the gradients: max |x - fp64| / max |fp64|"""


def showcase(text: str = "", out: str = "runs/showcase", minutes: float = 1.0, sizes: dict = SIZES, seconds: float = 2.0):
    """Trains for `minutes`, times each op for `seconds`, and writes checkpoint.safetensors, metrics.jsonl, loss.png, sample.txt
    and ops.txt into out. Raises UserError."""
    console, folder = Console(highlight=False, markup=False), Path(out)
    console.rule("this machine")
    info = minkernels.info()
    print(info)
    console.rule("training")
    fast = info.cpu_level == "avx512_bf16" or torch.cuda.is_available()  # elsewhere bfloat16 is emulated
    options = {"text": text, "out": out, "minutes": minutes, "dtype": "bfloat16" if fast else "float32"}
    threads = torch.get_num_threads()
    torch.set_num_threads(_training_threads(options))
    heldout = train("gpt", options, overwrite=True, console=console)[0]["heldout"]
    torch.set_num_threads(threads)
    console.rule("a sample")
    vocab = files.load_checkpoint(folder, prefix="model.")[1]["vocab"]
    sample = generate(out, prompt="The " if set("The ") <= set(vocab) else "", tokens=500, seed=1)
    print(sample)
    console.rule("fused ops")
    table = ops_table(sizes, seconds)
    console.print(table)
    with files.writing(folder):
        (folder / "sample.txt").write_text(sample + "\n")
        with (folder / "ops.txt").open("w") as f:
            Console(file=f, width=120).print(table)
    console.rule("done")
    print(f"held-out loss {heldout:.3f} nats per character after {minutes:g} minutes of training")
    print(f"in {folder}: loss.png, sample.txt, ops.txt (the table), {files.METRICS} (each step), {files.CHECKPOINT} (the model)")
    print(f"more text: python -m minmodels generate gpt --checkpoint {folder} --prompt 'The '")


def ops_table(sizes: dict[str, tuple], seconds: float) -> Table:
    """Each op beside PyTorch's: median ms, how many times as fast, and the errors of both."""
    device = pick_device("")
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    title = f"minkernels against PyTorch {torch.__version__} ({where})"
    layout = {"box": box.SIMPLE_HEAD, "pad_edge": False, "collapse_padding": True, "caption_justify": "left"}
    table = Table(title=title, caption=CAPTION.format(**sizes), **layout)
    for name in ("op", "dtype", "ms", "torch ms", "ratio", "error", "torch err"):
        table.add_column(name, justify="left" if name in ("op", "dtype") else "right", no_wrap=True)
    for op, backward in (("attention", False), ("attention", True), ("cross_entropy", True)):
        for short, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
            ours, theirs, part = OPS[op]
            inputs, do = _inputs(op, sizes[op], dtype, device)
            parts = ([part(t).double() if t.is_floating_point() else part(t) for t in ts] for ts in (inputs, do))
            exact = _call(theirs, *parts, backward)
            calls = [partial(_call, fn, inputs, do, backward) for fn in (ours, theirs)]
            errors = [max(_error(part(a), e) for a, e in zip(call(), exact, strict=True)) for call in calls]
            ms = _in_turns(calls, seconds)
            table.add_row(
                f"{op} {'fwd+bwd' if backward else 'fwd'}",
                short,
                *(f"{t:.4g}" for t in ms),
                f"{ms[1] / ms[0]:.2f}x",
                *(f"{e:.1e}" for e in errors),
            )
    return table


def _training_threads(options: dict) -> int:
    """All threads, or one if a step is faster so: where other programs are busy, threads wait for each other most of the time."""
    run = Run("gpt", GPTOptions(**options))
    counts = torch.get_num_threads(), 1
    seconds = dict.fromkeys(counts, 0.0)
    for i, threads in itertools.product(range(5), counts):
        torch.set_num_threads(threads)
        start = time.perf_counter()
        run.train_step()
        seconds[threads] += time.perf_counter() - start if i else 0.0  # the first one warms up
    return min(counts, key=seconds.get)


def _inputs(op: str, size: tuple, dtype: torch.dtype, device: torch.device) -> tuple[list[Tensor], list[Tensor]]:
    """The arguments of an op, and the gradient of its result unless that is a scalar."""
    if op == "attention":
        *qkv, do = torch.randn(4, *size, device=device, dtype=dtype).unbind()
        return qkv, [do]
    return [torch.randn(size, device=device, dtype=dtype), torch.randint(size[1], size[:1], device=device)], []


def _call(fn: Callable, inputs: list[Tensor], do: list[Tensor], backward: bool) -> tuple[Tensor, ...]:
    if not backward:
        return (fn(*inputs),)
    inputs = [t.detach().requires_grad_(t.is_floating_point()) for t in inputs]
    return torch.autograd.grad(fn(*inputs), [t for t in inputs if t.requires_grad], do or None)


def _error(actual: Tensor, exact: Tensor) -> float:
    return ((actual - exact).abs().max() / exact.abs().max()).item()


def _in_turns(calls: list[Callable], seconds: float) -> list[float]:
    """The median ms of each call, measured A B A B ..., so that other load on the machine slows them alike."""
    samples, end = [[] for _ in calls], time.perf_counter() + seconds
    while len(samples[0]) < 5 or time.perf_counter() < end:
        for call, ms in zip(calls, samples, strict=True):
            start = time.perf_counter()
            call()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            ms.append((time.perf_counter() - start) * 1e3)
    return [statistics.median(ms) for ms in samples]
