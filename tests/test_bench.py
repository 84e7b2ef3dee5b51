import json
import os
import subprocess
import sys
import tarfile
import time
from functools import partial

import pytest
import torch

from bench import bench_attention, bench_nms, gpu, report, timing

ROOT = gpu.ROOT
QUICK = ["--tiny", "--compile=none", "--device=cpu", "--benchmark-min-rounds=4", "--benchmark-max-time=0.001"]
PYTHON = sys.executable


WORKER = "PYTEST_XDIST_WORKER"  # a bench that inherits it does nothing: pytest-benchmark takes itself for a worker


@pytest.fixture(autouse=True)
def no_worker(monkeypatch):
    monkeypatch.delenv(WORKER, raising=False)


def run_bench(*args):
    environment = {name: value for name, value in os.environ.items() if name != WORKER} | {"OMP_NUM_THREADS": "1"}
    command = [PYTHON, "-m", "pytest", "-q", "-p", "no:cacheprovider", *args, *QUICK]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def bench_json(tmp_path_factory):
    """One case of attention, and one of cross-entropy that needs a process of its own."""
    path = tmp_path_factory.mktemp("bench") / "results" / "run.json"  # a folder that is not there yet, as in a fresh clone
    rows = ["bench/bench_attention.py::bench_fwd", "bench/bench_cross_entropy.py::bench_fwd_grad", "-k", "32x16 or retained"]
    run_bench(*rows, f"--benchmark-json={path}")
    return path


def test_implementations_run_in_turn():
    calls = []
    results = timing.measure(
        {name: lambda name=name: calls.append(name) for name in "abc"}, lambda _: 0.5, "cpu", min_rounds=3, max_time=0, warmup=2
    )
    assert calls == [*"aabbcc", *"abc" * (2 + 3)]  # judged, watched for memory; then in turn
    assert [len(result.seconds) for result in results.values()] == [3, 3, 3]
    assert all(result.error == 0.5 for result in results.values())


def test_one_that_fails_leaves_the_others():
    def judge(outputs):
        return timing.max_error(outputs, [torch.ones(3, dtype=torch.float64)], torch.float32)

    impls = {
        "right": lambda: [torch.ones(3)],
        "wrong": lambda: [torch.full((3,), 1.1)],
        "nan": lambda: [torch.full((3,), float("nan"))],
        "broken": lambda: 1 / 0,
        "skipped": lambda: pytest.skip("not here"),
    }
    results = timing.measure(impls, judge, "cpu", min_rounds=2, max_time=0)
    assert len(results["right"].seconds) == 2
    kinds = {"wrong": AssertionError, "nan": AssertionError, "broken": ZeroDivisionError, "skipped": pytest.skip.Exception}
    assert {name: type(results[name]) for name in kinds} == kinds
    assert "0.1 from the fp64 reference, whose largest value is 1" in str(results["wrong"])


def test_cpu_times():
    short, long = timing.cpu_rounds([lambda: time.sleep(0.002), lambda: time.sleep(0.02)], 3)
    assert 0.002 <= min(short) < 0.02 <= min(long)


def test_peak_memory_counts_what_is_freed_again():
    def needs_64_mib():
        return torch.ones(16 << 20).sum()

    result = timing.measure({"x": needs_64_mib}, lambda _: 0.0, "cpu", min_rounds=1, max_time=0)["x"]
    if result.peak_bytes is None:
        pytest.skip("this system does not let a process reset its peak memory")
    assert 60 << 20 < result.peak_bytes < 80 << 20


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_times_are_of_the_device():
    x = torch.ones(1 << 28, device="cuda")  # 1 GiB: writing it takes at least 100 us on any GPU, launching it 10
    short, long = timing.cuda_rounds([lambda: x[:1].zero_(), lambda: x.zero_()], 5)
    assert sorted(short)[2] < 1e-4 < sorted(long)[2]


def test_rows_of_a_run(bench_json):
    rows = {row["name"]: row for row in json.loads(bench_json.read_text())["benchmarks"]}
    case, heap = "1x2x32x16-causal-float32", "5x33-bfloat16-heap-retained"
    assert sorted(rows) == sorted(
        [f"bench_fwd[{case}-{impl}]" for impl in ("minkernels", "torch-sdpa", "reference")]
        + [f"bench_fwd_grad[{heap}-{impl}]" for impl in ("minkernels", "torch")]
    )
    for row in rows.values():
        info, stats = row["extra_info"], row["stats"]
        assert row["group"] == f"{info['op']}: {info['case']}"
        assert stats["rounds"] == len(stats["data"]) >= 4
        assert 0 < stats["min"] <= stats["median"] < 10
        assert info["threads"] == 1 and info["device"] == "cpu" and 0 <= info["error"] < 0.1
    info = rows[f"bench_fwd[{case}-minkernels]"]["extra_info"]
    assert info["shape"] == [1, 2, 32, 16] and info["dtype"] == "float32"
    flops = 4 * 2 * 16 * (32 * 33 / 2)  # 2 heads, D 16, the triangle of 32 x 32
    assert info["gflops"] * 1e9 == pytest.approx(flops / rows[f"bench_fwd[{case}-minkernels]"]["stats"]["median"], rel=0.5)
    assert json.loads(bench_json.read_text())["machine_info"]["minkernels"]["torch"] == torch.__version__


def test_every_bench_is_right_when_run_once():
    assert " passed" in run_bench("bench", "--benchmark-disable")


def test_attention_is_compiled_anew_for_each_case(monkeypatch):
    """Past some shapes torch would raise: of one function it compiles only so many."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    with torch._dynamo.config.patch(recompile_limit=1):
        for case in bench_attention.CASES["tiny"]:
            assert bench_attention.impls()["torch-compile-reference"](bench_attention.make(case, "cpu")).isfinite().all()


def test_report(bench_json, tmp_path):
    out = tmp_path / "new" / "folder"
    assert report.main([str(bench_json), "--out", str(out)]) == 0
    assert sorted(path.name for path in out.iterdir()) == ["report.md", "speedup.png"]
    assert (out / "speedup.png").read_bytes().startswith(b"\x89PNG")
    page = (out / "report.md").read_text()
    assert "| cpu | attention fwd | 1x2x32x16-causal-float32 |" in page and "## cross_entropy fwd+grad on cpu" in page
    assert f"torch {torch.__version__}" in page and "measured peaks: none" in page


@pytest.mark.parametrize("factor, verdict", [(2.0, "**0.50x, slower** | 0.50 to 0.50"), (0.25, "4.00x | 4.00 to 4.00")])
def test_report_tells_a_loss_from_a_win(bench_json, tmp_path, factor, verdict):
    """Every round of ours takes `factor` times as long as the peer's."""
    run = json.loads(bench_json.read_text())
    run["benchmarks"] = [row for row in run["benchmarks"] if row["extra_info"]["op"] == "attention fwd"]
    stats = {row["extra_info"]["impl"]: row["stats"] for row in run["benchmarks"]}
    stats["minkernels"]["data"] = [seconds * factor for seconds in stats["torch-sdpa"]["data"]]
    stats["minkernels"]["median"] = stats["torch-sdpa"]["median"] * factor
    stats["reference"]["median"] = 0.0  # the fastest, but no peer
    direct = run["benchmarks"][-1]
    direct = {**direct, "extra_info": {**direct["extra_info"], "impl": "minkernels-direct"}, "stats": {**direct["stats"], "median": 0.0}}
    run["benchmarks"].append(direct)
    path = tmp_path / "edited.json"
    path.write_text(json.dumps(run))
    assert f"| {verdict} |" in report.make([path], tmp_path).read_text()


def test_report_names_a_case_without_our_result(bench_json, tmp_path):
    run = json.loads(bench_json.read_text())
    run["benchmarks"] = [row for row in run["benchmarks"] if row["extra_info"]["impl"] != "minkernels"]
    path = tmp_path / "edited.json"
    path.write_text(json.dumps(run))
    assert "| attention fwd | 1x2x32x16-causal-float32 | **no result** |" in report.make([path], tmp_path).read_text()


BAD = {
    "missing": (None, "no such file"),
    "truncated": (lambda good: good[: len(good) // 2], "not complete JSON"),
    "binary": (lambda good: b"\x89PNG\xff\xfe", "not a text file"),
    "another": (lambda good: b'{"loss": [1, 2]}', "not written by pytest --benchmark-json"),
    "empty": (lambda good: json.dumps({**json.loads(good), "benchmarks": []}).encode(), "without a single result"),
    "foreign": (lambda good: good.replace(b'"impl":', b'"other":'), "not of this suite"),
}


@pytest.mark.parametrize("spoil, message", BAD.values(), ids=BAD)
def test_report_of_bad_input(bench_json, tmp_path, capsys, spoil, message):
    path, out = tmp_path / "bad.json", tmp_path / "out"
    if spoil:
        path.write_bytes(spoil(bench_json.read_bytes()))
    assert report.main([str(bench_json), str(path), "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert message in error and "bad.json" in error and error.count("\n") == 1
    assert not out.exists()


def test_report_into_a_file(bench_json, capsys):
    assert report.main([str(bench_json), "--out", str(bench_json)]) == 2
    assert "File exists" in capsys.readouterr().err


def test_gpu_without_a_gpu(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main(["--out", str(tmp_path / "out")]) == 2
    assert "no CUDA device" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_gpu_steps_that_go_wrong(tmp_path, bench_json):
    """A step that fails, one that is killed, one that hangs and will not be interrupted: the next ones run all the same."""
    deaf = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); print('deaf', flush=True); time.sleep(60)"
    rows = tmp_path / "rows.json"
    copy = f"import shutil; shutil.copy({str(bench_json)!r}, {str(rows)!r})"
    half = tmp_path / "half.json"
    steps = [
        gpu.Step("fails", [PYTHON, "-c", "raise SystemExit(3)"], 0, 100),
        gpu.Step("dies", [PYTHON, "-c", "import os; os.kill(os.getpid(), 9)"], 0, 100),
        gpu.Step("hangs", [PYTHON, "-c", deaf], 0, 2),
        gpu.Step("half", [PYTHON, "-c", f"open({str(half)!r}, 'w').write('{{')"], 0, 100, json=half),
        gpu.Step("rows", [PYTHON, "-c", copy], 0, 100, json=rows),
        gpu.Step("too-long", [PYTHON, "-c", ""], 10000, 20000),
        gpu.Step("last", [PYTHON, "-c", "print('here')"], 0, 100),
    ]
    start = time.monotonic()
    gpu.run(steps, tmp_path / "out", seconds=1000, grace=0.5)
    assert time.monotonic() - start < 30
    outcomes = {step.name: step.outcome for step in steps}
    assert outcomes["fails"] == "failed: exit 3" and outcomes["dies"] == "killed by SIGKILL"
    assert outcomes["hangs"] == "cut off after 2 s" and outcomes["half"].startswith("ok; no report: ")
    assert outcomes["too-long"].startswith("skipped: ") and outcomes["rows"] == outcomes["last"] == "ok"
    assert "deaf" in (tmp_path / "out/logs/hangs.log").read_text()
    summary = (tmp_path / "out/summary.md").read_text()
    assert all(f"| {name} | {outcome} |" in summary for name, outcome in outcomes.items())
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert len(results["benchmarks"]) == 5 and (tmp_path / "out/report.md").exists()
    with tarfile.open(tmp_path / "out/all.tar.gz") as archive:
        assert {"summary.md", "results.json", "report.md", "logs/last.log"} <= set(archive.getnames())


def test_gpu_time_is_shared_out(tmp_path):
    """Two steps of equal weight that want 100 s each get half of 3 s, and the second one what the first left over."""
    steps = [gpu.Step(name, [PYTHON, "-c", "import time; time.sleep(30)"], 0, 100) for name in ("first", "second")]
    gpu.run(steps, tmp_path, seconds=3, grace=0)
    assert all(1 < step.seconds < 2 and step.outcome.startswith("cut off") for step in steps)


def test_gpu_dry_run(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    steps = ["build", "tests", "attention-fwd", "mingpt"]
    assert gpu.main(["--dry-run", "--out", str(tmp_path), "--only", *steps]) == 0, capsys.readouterr()
    summary = (tmp_path / "summary.md").read_text()
    assert all(f"| {name} | ok |" in summary for name in steps)
    assert {"results.json", "report.md", "summary.md", "logs"} <= {path.name for path in tmp_path.iterdir()}
    assert "## minGPT step on cpu" in (tmp_path / "report.md").read_text()


def test_a_lost_device_ends_the_tests(tmp_path):
    (tmp_path / "test_lost.py").write_text("""
import torch
def test_first(): raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
def test_second(): assert False, "it ran"
""")
    command = [PYTHON, "-m", "pytest", "-q", "-p", "conftest", "-p", "no:cacheprovider", tmp_path]
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(gpu.ROOT / "tests"), str(gpu.ROOT / "kernels")])}
    result = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert "the device is lost to this process since test_lost.py::test_first" in result.stdout, result.stdout
    assert result.returncode == 1 and "it ran" not in result.stdout


def test_gpu_steps_find_their_tests(tmp_path, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # as if there were a GPU
    monkeypatch.setattr(gpu.shutil, "which", lambda name: name)
    commands = {step.name: step.command for step in gpu.plan(tmp_path, dry_run=False)}
    for name in ("tests", "sanitizer"):
        pytest_alone = commands[name][commands[name].index(PYTHON) :]
        subprocess.run([*pytest_alone, "--collect-only"], cwd=gpu.ROOT, check=True, stdout=subprocess.DEVNULL)  # 5: none


def test_our_cuda_cpp_is_no_peer_of_ours():
    assert all(name.startswith(report.OURS) for name in bench_nms.CUDA_IMPLS)


def test_rows_of_cuda_cpp_are_skipped_without_it(monkeypatch):
    monkeypatch.setattr(bench_nms._cuda, "built", lambda: False)
    with pytest.raises(pytest.skip.Exception, match="without nvcc"):
        bench_nms.CUDA_IMPLS["minkernels-cuda-cpp"](torch.rand(3, 4), torch.rand(3), None)


def test_gpu_unknown_step(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        gpu.main(["--dry-run", "--out", str(tmp_path / "out"), "--only", "lunch"])
    assert "no step lunch; there are build, tests" in capsys.readouterr().err
