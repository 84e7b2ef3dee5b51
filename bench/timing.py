"""How a case is timed: its implementations in turn, A B A B ..., so that other load slows all of them alike."""

import ctypes
import os
import shutil
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch

import minkernels

LIMITS = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}  # of the largest value; tests/ are far stricter
MAX_ROUNDS = 200
CLEAR_BYTES = 2 << 30  # many times any L2, and at 4.8 TB/s 0.45 ms to write: longer than most calls take to launch
PROC = Path("/proc/self")
RETAINED = {  # environment under which glibc keeps freed memory: no page faults, as in a long training run whose allocator caches
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
    "MALLOC_TOP_PAD_": str(1 << 30),
}


@dataclass
class Result:
    seconds: list[float]  # one a round: round i of every implementation ran beside round i of the others
    peak_bytes: int | None  # memory of one call on top of its inputs, its results included; None where it cannot be read
    error: float  # max |x - fp64 reference| over the outputs


def measure(
    impls: dict[str, Callable], judge: Callable, device: str, *, min_rounds: int = 5, max_time: float = 1.0, warmup: int = 1
) -> dict[str, Result | BaseException]:
    """Times callables without arguments against each other: {name: Result, or what it raised}.

    The first call of each goes to judge(outputs), which returns its error or raises: a wrong result has no speed. The second
    shows its memory. Then all run in turn, `warmup` rounds that do not count and as many that do as give each about
    max_time seconds, at least min_rounds.
    """
    results, one_round = {}, 0.0
    for name, fn in impls.items():
        try:
            error = judge(fn())
            seconds, peak_bytes = _second_call(fn, device)
        except (Exception, pytest.skip.Exception) as failure:
            traceback.clear_frames(failure.__traceback__)  # they hold tensors
            results[name] = failure
        else:
            results[name] = Result([], peak_bytes, error)
            one_round += seconds
    running = [name for name, result in results.items() if isinstance(result, Result)]
    if running:
        fns = [impls[name] for name in running]
        rounds = max(min_rounds, min(MAX_ROUNDS, int(max_time * len(fns) / one_round)))
        time_rounds = cuda_rounds if device == "cuda" else cpu_rounds
        time_rounds(fns, warmup)
        for name, seconds in zip(running, time_rounds(fns, rounds), strict=True):
            results[name].seconds = seconds
    return results


def cpu_rounds(fns: list[Callable], rounds: int) -> list[list[float]]:
    """Seconds of each call, one list for each fn. Freeing the result is part of a call, as it is in a training loop."""
    samples = [[] for _ in fns]
    for _ in range(rounds):
        for fn, seconds in zip(fns, samples, strict=True):
            start = time.perf_counter()
            fn()
            seconds.append(time.perf_counter() - start)
    return samples


def cuda_rounds(fns: list[Callable], rounds: int) -> list[list[float]]:
    """Device seconds of each call between two events, with a cold L2, one list for each fn.

    Nothing waits until the end: the clearing of L2 keeps the device busy while Python launches the call, so that launches
    are hidden as they are in a model that runs ahead of its GPU. A call that launches for longer than that shows it.
    """
    clear, marks = torch.empty(CLEAR_BYTES, dtype=torch.uint8, device="cuda"), []
    for _ in range(rounds):
        for fn in fns:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            clear.zero_()
            start.record()
            fn()
            end.record()
            marks.append((start, end))
    torch.cuda.synchronize()
    seconds = [start.elapsed_time(end) / 1e3 for start, end in marks]  # elapsed_time is in ms
    return [seconds[i :: len(fns)] for i in range(len(fns))]


def compiled(fn: Callable) -> Callable:
    """fn under torch.compile, compiled at its first call and from nothing: past some recompiles torch would run it eagerly."""

    @cache
    def compile_now():
        if not shutil.which(os.environ.get("CXX", "g++")):
            pytest.skip("torch.compile needs a C++ compiler, and there is none")
        torch.compiler.reset()
        return torch.compile(fn, fullgraph=True, dynamic=False)

    return lambda *args, **kwargs: compile_now()(*args, **kwargs)


def installed(name: str, load: Callable) -> Callable:
    """What load() returns, imported at its first call; where it is not installed, its row is skipped."""

    @cache
    def peer():
        try:
            return load()
        except ImportError as error:
            pytest.skip(f"{name}: {error}")

    return lambda *args, **kwargs: peer()(*args, **kwargs)


def max_error(actual, exact, dtype: torch.dtype) -> float:
    """max |actual - exact| over all outputs; raises where one is further off than rounding in dtype explains, or NaN."""
    worst = 0.0
    for a, e in zip(actual, exact, strict=True):
        error, largest = (a.double() - e).abs().max().item(), e.abs().max().item()
        if not error <= LIMITS[dtype] * largest:
            raise AssertionError(f"wrong result: {error:.3g} from the fp64 reference, whose largest value is {largest:.3g}")
        worst = max(worst, error)
    return worst


def _second_call(fn, device):
    """(seconds, peak bytes or None) of one call."""
    before = _reset_peak(device)
    start = time.perf_counter()
    out = fn()
    if device == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    del out
    return seconds, None if before is None else max(0, _peak(device) - before)


def _reset_peak(device):
    """Bytes in use now, from where the peak is counted anew; None where the system does not let us."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    try:
        minkernels.empty_cache()  # what it holds back would hide what the call needs, as what malloc does
        ctypes.CDLL(None).malloc_trim(0)
        (PROC / "clear_refs").write_text("5")  # man 5 proc: resets VmHWM
    except (AttributeError, OSError):  # no glibc, no Linux, or not allowed
        return None
    return _status("VmRSS")


def _peak(device):
    return torch.cuda.max_memory_allocated() if device == "cuda" else _status("VmHWM")


def _status(field):
    lines = (PROC / "status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(field + ":"))  # the kernel writes kB
