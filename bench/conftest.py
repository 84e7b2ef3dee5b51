"""The `timed` fixture: pytest-benchmark rows whose samples were taken in turn with those of the rows they are compared with.

A bench function takes `timed`, `case` (from its own cases or its module's CASES: a list each for "cpu", "cuda", "tiny") and `impl` (a
name in its module's IMPLS, and in CUDA_IMPLS, COMPILED and COMPILED_SLOWLY where they apply), in that order of nesting. The
first row of a case measures every implementation of it that was selected, in turn (bench/timing.py); each row then replays
its own samples into pytest-benchmark through a clock that stands still but for them. So --benchmark-json, -compare and
-group-by work as ever, and the samples of a case pair up round by round. With --benchmark-disable each row runs and is
judged once, untimed.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from bench import machine, timing

MEASURED = pytest.StashKey[dict]()
MACHINE = pytest.StashKey[dict]()
CLOCK = [0.0]  # seconds


def replay_clock():
    return CLOCK[0]


def pytest_addoption(parser):
    group = parser.getgroup("minkernels bench")
    group.addoption("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    group.addoption("--tiny", action="store_true", help="the smallest cases, to try the suite itself")
    group.addoption("--no-peaks", action="store_true", help="do not measure the machine's matrix products and copies first")
    which = "which peers under torch.compile to run; all: also those that take minutes to compile"
    group.addoption("--compile", choices=["none", "some", "all"], default="some", help=which)


def pytest_configure(config):
    config.stash[MEASURED] = {}
    if config.getoption("device") == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda: no CUDA device here")
    results = config.getoption("benchmark_json")
    if isinstance(results, str | os.PathLike):  # opened at the end, when a missing folder would cost every result
        Path(results).parent.mkdir(parents=True, exist_ok=True)


def pytest_generate_tests(metafunc):
    if "case" in metafunc.fixturenames:
        module, config = metafunc.module, metafunc.config
        device = config.getoption("device")
        cases = getattr(metafunc.function, "cases", module.CASES)["tiny" if config.getoption("tiny") else device]
        tables = ["IMPLS"] + ["CUDA_IMPLS"] * (device == "cuda")
        tables += {"none": [], "some": ["COMPILED"], "all": ["COMPILED", "COMPILED_SLOWLY"]}[config.getoption("compile")]
        impls = [name for table in tables for name in getattr(module, table, ())]
        metafunc.parametrize("case", cases, ids=str)
        metafunc.parametrize("impl", impls)  # the inner loop


def pytest_itemcollected(item):
    marker = item.get_closest_marker("benchmark")
    options = {**(marker.kwargs if marker else {}), "timer": replay_clock}
    item.add_marker(pytest.mark.benchmark(**options), append=False)


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info["minkernels"] = _machine(config)


def _machine(config):
    if MACHINE not in config.stash:
        with_peaks = not (config.getoption("tiny") or config.getoption("no_peaks"))
        config.stash[MACHINE] = machine.describe(config.getoption("device"), with_peaks=with_peaks)
    return config.stash[MACHINE]


@pytest.fixture
def device(request):
    return request.config.getoption("device")


@pytest.fixture
def timed(benchmark, request, device):
    """timed(op, build, shape=, dtype=, ...) makes this row's benchmark; see the module's docstring.

    Args:
        op: names the table that the row belongs to.
        build: called once for a case, returns ({impl: callable without arguments}, judge); judge(what a callable returned)
            is its error against fp64, or raises. A callable that calls pytest.skip skips its row alone.
        shape, dtype: of the inputs.
        flops, bytes, tokens: the work of one call: floating-point operations; the fewest bytes that must move; tokens.
        length: what a plot over lengths has on its x axis; series: the curve that this row belongs to.
        env: environment variables the case needs from the start of the process; it then runs in a process of its own.
        warmup, min_rounds: rounds before those that count, and the fewest that do, where this case wants other than the usual.
    """

    def run(op, build, *, shape, dtype, flops=None, bytes=None, tokens=None, length=None, series=None, env=None, **rounds):
        impl, case = request.node.callspec.params["impl"], str(request.node.callspec.params["case"])
        benchmark.group = f"{op}: {case}"
        benchmark.extra_info |= {
            "op": op,
            "case": case,
            "impl": impl,
            "shape": list(shape),
            "dtype": str(dtype).removeprefix("torch."),
            "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        }
        if benchmark.disabled:
            impls, judge = build()
            benchmark.extra_info["error"] = judge(benchmark.pedantic(impls[impl]))
            return
        result = _measured(request, build, device, env, rounds)[impl]
        if isinstance(result, BaseException):
            raise result
        rates = {"gflops": flops, "gbytes_per_s": bytes, "tokens_per_s": tokens}
        median = statistics.median(result.seconds)
        benchmark.extra_info |= {
            "peak_extra_mib": None if result.peak_bytes is None else result.peak_bytes / 2**20,
            "error": result.error,
            "length": length,
            "series": series,
            **{name: work / median / (1 if name == "tokens_per_s" else 1e9) for name, work in rates.items() if work},
        }
        _replay(benchmark, result.seconds)

    return run


def _measured(request, build, device, env, rounds):
    """{impl: Result or exception} of this row's case; measured by the first row that asks."""
    _machine(request.config)  # now, so that what goes wrong there does not cost the results at the end
    rows = [row for row in request.session.items if _case(row) == _case(request.node)]
    done = request.config.stash[MEASURED]
    key = rows[0].nodeid
    if key not in done:
        names = [row.callspec.params["impl"] for row in rows]
        if env and env.items() - os.environ.items():
            done[key] = dict(zip(names, _in_a_process(rows, request.config, env), strict=True))
        else:
            torch.manual_seed(0)
            impls, judge = build()
            option = request.config.getoption
            usual = {"min_rounds": option("benchmark_min_rounds"), "warmup": 3 if device == "cuda" else 1}
            selected = {name: impls[name] for name in names}
            done[key] = timing.measure(
                selected, judge, device, max_time=float(option("benchmark_max_time")), **{**usual, **rounds}
            )
    return done[key]


def _case(row):
    return row.path, row.originalname, str(row.callspec.params["case"])


def _in_a_process(rows, config, env):
    """Runs rows in a pytest of their own and reads their results from its JSON."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "rows.json")
        passed = ["benchmark_min_rounds", "benchmark_max_time", "device", "compile"]
        options = [f"--{name.replace('_', '-')}={config.getoption(name)}" for name in passed]
        options += ["--no-peaks"] + ["--tiny"] * config.getoption("tiny")
        command = [sys.executable, "-m", "pytest", *(row.nodeid for row in rows), f"--benchmark-json={path}", *options]
        child = subprocess.run(command, cwd=config.rootpath, env={**os.environ, **env}, capture_output=True, text=True)
        found = {row["name"]: row for row in json.loads(path.read_text())["benchmarks"]} if path.exists() else {}
    return [_from_json(found[row.name]) if row.name in found else _absent(row, child) for row in rows]


def _from_json(row):
    peak = row["extra_info"]["peak_extra_mib"]
    return timing.Result(row["stats"]["data"], None if peak is None else round(peak * 2**20), row["extra_info"]["error"])


def _absent(row, child):
    if child.returncode:
        return RuntimeError(f"{row.name} in a process of its own:\n{child.stdout[-4000:]}{child.stderr[-4000:]}")
    return pytest.skip.Exception("skipped in a process of its own")


def _replay(benchmark, seconds):
    samples = iter(seconds)

    def rewind():
        CLOCK[0] = 0.0

    def pass_time():
        CLOCK[0] = next(samples)

    benchmark.pedantic(pass_time, setup=rewind, rounds=len(seconds))
