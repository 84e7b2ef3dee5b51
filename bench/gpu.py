"""`python -m bench.gpu --out DIR --minutes N`: what is worth doing with a few minutes of GPU, the most valuable first.

Builds in place, runs the GPU tests, then the benches at their headline sizes, the memory checker, and what is left. Each step
is a process with a time limit of its own; whatever it found is in DIR as soon as it ends, so that the script may be cut off at
any moment: results.json (pytest-benchmark's, all steps together), report.md with its plots, summary.md, and logs/. all.tar.gz holds
all of it. With more time than one call has, call it again with --only and the steps that it did not reach.
"""

import argparse
import contextlib
import importlib.util
import io
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

from bench import report

ROOT = Path(__file__).resolve().parents[1]
WORKERS = 12  # processes that run tests: most of their time is Triton compiling
ARCHIVE = "all.tar.gz"
GRACE = 15.0  # seconds for a step to write down what it has, once it is told to stop
TESTS = ["-m", "gpu or interpret", "-v", "--tb=short", "-p", "no:cacheprovider"]  # -v: what was cut off is known up to there
TESTED = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "tests").glob("test_*_triton.py"))
TESTED += ["tests/test_merge_attention.py", "tests/test_nms_cuda.py"]
ONE_THREAD = {"OMP_NUM_THREADS": "1"}  # of each of the workers, whose references run on the CPU
SANITIZED = [f"tests/test_{name}_triton.py" for name in ("attention", "cross_entropy", "nms", "segmentation")]
SANITIZED += [*TESTS, "-k", "ragged or test_stats or test_dice or tiles_as_they_are"]


@dataclass
class Step:
    name: str
    command: list[str]
    least: float  # seconds: with less left, it is not started
    most: float  # seconds; where there are too few for all, the steps share them in this proportion
    env: dict[str, str] = field(default_factory=dict)
    json: Path | None = None  # where the command leaves pytest-benchmark's JSON
    outcome: str = "not reached"
    seconds: float = 0.0

    @property
    def ok(self):
        return self.outcome == "ok"


def plan(out: Path, dry_run: bool) -> list[Step]:
    """Every step, in the order of its value."""
    python, logs = [sys.executable], out / "logs"
    pytest = [*python, "-m", "pytest"]
    sizes = ["--device=cuda", "--compile=none", "--benchmark-max-time=0.3"]
    if dry_run:
        sizes = ["--device=cpu", "--tiny", "--compile=none", "--benchmark-max-time=0.05"]

    def bench(name, rows, least, most, *options):
        path = logs / f"{name}.json"
        command = [*pytest, *rows, f"--benchmark-json={path}", "--benchmark-columns=median,rounds", *sizes, *options]
        return Step(name, command, least, most, json=path)

    parallel = ["-n", str(min(WORKERS, os.cpu_count())), "--dist", "worksteal"] if importlib.util.find_spec("xdist") else []
    tests = ["--collect-only", "tests/test_bench.py"] if dry_run else [*TESTED, *parallel]
    steps = [
        Step("build", [*python, "-m", "minkernels", *([] if dry_run else ["build"])], 100, 150),
        Step("tests", [*pytest, *tests, *TESTS], 60 if dry_run else 240, 420, ONE_THREAD),  # over a thousand, most of which compile
        Step("timer", [*pytest, "tests/test_bench.py", "-k", "times_are_of_the_device", *TESTS], 15, 30),
        bench("attention-fwd", ["bench/bench_attention.py::bench_fwd"], 40, 120),
        bench("cross-entropy", ["bench/bench_cross_entropy.py"], 30, 90),
        bench("linear-cross-entropy", ["bench/bench_linear_cross_entropy.py"], 30, 60),
        bench("attention-fwd-bwd", ["bench/bench_attention.py::bench_fwd_bwd"], 40, 150),
        bench("attention-decode", ["bench/bench_attention.py::bench_decode", "bench/bench_merge.py"], 20, 60),
        bench("segmentation", ["bench/bench_segmentation.py"], 30, 60),
        bench("boxes", ["bench/bench_boxes.py"], 30, 60),
        bench("nms", ["bench/bench_nms.py"], 30, 60),
        bench("yolo", ["bench/bench_yolo.py"], 20, 60),
        bench("soft-nms", ["bench/bench_soft_nms.py"], 20, 60),
        bench("mingpt", ["bench/bench_mingpt.py"], 30, 60),
        bench("vision", ["bench/bench_models_vision.py"], 30, 60),
        bench("swap-transformers", ["bench/bench_swap_transformers.py"], 30, 60),
    ]
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer and not dry_run:
        no_cache = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # so that a tensor ends where its allocation ends
        steps.append(Step("sanitizer", [sanitizer, "--error-exitcode", "99", *pytest, *SANITIZED], 60, 120, no_cache))
    if not dry_run:
        steps.append(bench("cross-entropy-compiled", ["bench/bench_cross_entropy.py"], 60, 180, "--compile=some"))
        rows = ["bench/bench_attention.py", "-k", "4096"]
        steps.append(bench("attention-compiled", rows, 60, 180, "--compile=all"))
    return steps


def run(steps: list[Step], out: Path, seconds: float, grace: float = GRACE):
    """Runs what fits, in order; after each step, its results and the summary are in `out`."""
    end = time.monotonic() + seconds
    (out / "logs").mkdir(parents=True, exist_ok=True)
    merged = None
    for i, step in enumerate(steps):
        left = end - time.monotonic() - grace
        share = left * step.most / sum(later.most for later in steps[i:] if later is step or later.least <= left)
        if left < step.least:
            step.outcome = f"skipped: {max(0, left):.0f} s left, it needs {step.least:.0f}"
            _summarise(steps, out)
        else:
            try:
                _run_step(step, out, min(left, step.most, max(step.least, share)), grace)
            except KeyboardInterrupt:
                step.outcome = "interrupted"
                raise
            finally:
                merged = _collect(step, merged, out)
                _summarise(steps, out)
        print(f"{step.name}: {step.outcome} ({step.seconds:.0f} s)", flush=True)


def _run_step(step, out, limit, grace):
    start = time.monotonic()
    path = os.pathsep.join(filter(None, [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH")]))
    if step.json:
        step.json.unlink(missing_ok=True)  # of an earlier run
    with (out / "logs" / f"{step.name}.log").open("wb") as log:
        log.write(f"$ {shlex.join(step.command)}\n".encode())
        log.flush()
        process = subprocess.Popen(
            step.command, cwd=ROOT, env={**os.environ, "PYTHONPATH": path, **step.env}, stdin=subprocess.DEVNULL,
            stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            code = process.wait(limit)
            ending = f"killed by {signal.Signals(-code).name}" if code < 0 else f"failed: exit {code}"
            step.outcome = ending if code else "ok"
        except subprocess.TimeoutExpired:
            step.outcome = f"cut off after {limit:.0f} s"
        finally:
            _stop(process, grace)
            step.seconds = time.monotonic() - start


def _stop(process, grace):
    """Interrupts the step and what it started: pytest then writes down the rows it has. After the grace, kills them."""
    try:
        os.killpg(process.pid, signal.SIGINT)
        process.wait(grace)
    except (ProcessLookupError, subprocess.TimeoutExpired):
        pass
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _collect(step, merged, out):
    """Adds the rows of a step to results.json and draws the report anew."""
    if step.json is None or not step.json.exists():
        return merged
    try:
        rows = report.load(step.json)
        merged = rows if merged is None else {**merged, "benchmarks": merged["benchmarks"] + rows["benchmarks"]}
        report.write(out / "results.json", json.dumps(merged, indent=1).encode())
        report.make([out / "results.json"], out)
    except Exception as error:  # no matplotlib, say: the steps that come are worth more
        step.outcome += f"; no report: {type(error).__name__}: {error}"
    return merged


def _summarise(steps, out):
    lines = ["# GPU session", "", "| step | outcome | seconds | command |", "|---|---|--:|---|"]
    lines += [f"| {step.name} | {step.outcome} | {step.seconds:.0f} | `{shlex.join(step.command)}` |" for step in steps]
    report.write(out / "summary.md", ("\n".join(lines) + "\n").encode())
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w:gz") as files:
        for path in sorted(out.rglob("*")):
            if path.is_file() and path.name != ARCHIVE:
                files.add(path, path.relative_to(out))
    report.write(out / ARCHIVE, archive.getvalue())


def _interrupt(*_):
    raise KeyboardInterrupt


def main(argv=None) -> int:
    text = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__, formatter_class=text)
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--minutes", type=float, default=10.0, help="when to be done (default 10)")
    parser.add_argument("--only", nargs="+", metavar="STEP", help="run these steps alone")
    parser.add_argument("--dry-run", action="store_true", help="try the steps on the CPU, with tiny sizes")
    args = parser.parse_args(argv)
    if not args.dry_run and not torch.cuda.is_available():
        print("bench.gpu: torch sees no CUDA device; --dry-run tries the steps on the CPU", file=sys.stderr)
        return 2
    steps = plan(args.out.resolve(), args.dry_run)
    unknown = set(args.only or ()) - {step.name for step in steps}
    if unknown:
        parser.error(f"no step {', '.join(sorted(unknown))}; there are {', '.join(step.name for step in steps)}")
    steps = [step for step in steps if not args.only or step.name in args.only]
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        run(steps, args.out.resolve(), args.minutes * 60)
    except KeyboardInterrupt:
        print("bench.gpu: interrupted", file=sys.stderr)
        return 130
    print(args.out / "summary.md")
    return 0 if all(step.ok for step in steps) else 1


if __name__ == "__main__":
    raise SystemExit(main())
