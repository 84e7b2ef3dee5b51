"""What surrounds the kernels: the import, the report, the build, and life without the C++ library."""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tarfile
from functools import partial
from pathlib import Path

import pytest
import torch

import minkernels
from minkernels import _build, _library

PACKAGE = Path(minkernels.__file__).parent


def python(code, *, path=PACKAGE.parent, **env):
    """Runs code in a fresh interpreter that imports minkernels from `path`."""
    env = os.environ | {"PYTHONPATH": str(path)} | env
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)


def copy_package(to, *, library):
    ignore = shutil.ignore_patterns("__pycache__", *([] if library else ["_ops.so"]))
    shutil.copytree(PACKAGE, to / "minkernels", ignore=ignore)
    return to


def test_import_is_quick_and_needs_torch_alone():
    code = """
import sys, time, torch
class Wall:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("triton", "numpy", "matplotlib", "rich", "safetensors", "minmodels"):
            raise ImportError(name)
sys.meta_path.insert(0, Wall())
start = time.process_time()
import minkernels
print(time.process_time() - start)
"""
    results = [python(code) for _ in range(3)]
    assert not any(r.returncode for r in results), results[0].stderr
    assert min(float(r.stdout) for r in results) < 0.3


@pytest.mark.parametrize("order", [1, -1])
def test_flops_are_counted_in_either_order_of_imports(order):
    imports = ["import minkernels", "from torch.utils import flop_counter"][::order]
    count = """
q = torch.ones(1, 2, 3, 4)
with flop_counter.FlopCounterMode(display=False) as counter:
    minkernels.attention(q, q, q)
print(counter.get_total_flops())
"""
    result = python(f"import torch\n{imports[0]}\n{imports[1]}\n{count}")
    assert result.stdout == f"{2 * 2 * 3 * 3 * (4 + 4)}\n", result.stderr


def test_info_names_what_serves_each_op(library):
    info = minkernels.info()
    assert info.version == minkernels.__version__ and info.cpu_level == library._cpu_level() and not info.missing
    assert set(info.backends) == {"attention", "cross_entropy", "linear_cross_entropy", "segmentation", "boxes", "nms", "soft_nms", "yolo"}
    assert all(info.cpu_level in devices["CPU"] for devices in info.backends.values())
    printed = python("import runpy; runpy.run_module('minkernels', run_name='__main__')")
    assert printed.stdout.strip() == str(info).strip(), printed.stderr


def test_triton_under_the_name_that_nightly_builds_give_it(monkeypatch):
    version = importlib.metadata.version

    def installed(name):
        if name == "triton":
            raise importlib.metadata.PackageNotFoundError(name)
        return "3.9.9" if name == "pytorch-triton" else version(name)

    monkeypatch.setattr(importlib.metadata, "version", installed)
    for found, there in (({"triton": ["pytorch-triton"]}, "3.9.9"), ({}, None)):
        monkeypatch.setattr(importlib.metadata, "packages_distributions", lambda found=found: found)
        info = minkernels.info()
        assert info.triton == there and bool(info.missing) == (there is None)


def test_a_lower_level_is_reported(library, monkeypatch):
    monkeypatch.setenv("MINKERNELS_CPU_LEVEL", "plain")
    assert minkernels.info().cpu_level == "plain" and "MINKERNELS_CPU_LEVEL" in minkernels.info().backends["attention"]["CPU"]
    monkeypatch.setenv("MINKERNELS_CPU_LEVEL", "sse")
    with pytest.raises(RuntimeError, match="MINKERNELS_CPU_LEVEL must be plain, avx2, avx512 or avx512_bf16, got sse"):
        minkernels.box_iou(torch.zeros(1, 4), torch.zeros(1, 4))
    with minkernels.swapped(), pytest.raises(RuntimeError, match="MINKERNELS_CPU_LEVEL"):  # nor is PyTorch called instead
        torch.nn.functional.cross_entropy(torch.zeros(1, 4), torch.full((1, 4), 0.25))
    printed = python("import runpy; runpy.run_module('minkernels', run_name='__main__')")
    assert printed.returncode == 1 and printed.stderr.startswith("error: MINKERNELS_CPU_LEVEL must be plain"), printed.stderr


def test_without_the_library_the_reference_serves_with_one_warning(tmp_path):
    code = """
import torch, minkernels
q = torch.randn(1, 1, 3, 4, requires_grad=True)
for _ in range(2):
    minkernels.attention(q, q, q).sum().backward()
    minkernels.cross_entropy(q[0, 0], torch.tensor([0, 1, 2])).backward()
    minkernels.bce_dice_loss(q, q.detach()).backward()
    minkernels.sigmoid_focal_loss(q, q.detach(), reduction="mean").backward()
print(minkernels.info())
"""
    result = python(code, path=copy_package(tmp_path, library=False))
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("UserWarning") == 1 and _library.BUILD in result.stderr
    assert re.search(rf"missing +the C\+\+ library is not built .*{_library.BUILD}", result.stdout)
    assert "reference" in result.stdout


def test_a_broken_library_raises_and_says_how_to_rebuild_it(tmp_path):
    path = copy_package(tmp_path, library=False)
    (path / "minkernels" / "_ops.so").write_bytes(b"\x7fELF, cut short")
    result = python("import torch, minkernels; minkernels.attention(*torch.zeros(3, 1, 1, 1, 1))", path=path)
    assert result.returncode == 1 and "_ops.so does not load under torch" in result.stderr and _library.BUILD in result.stderr
    printed = python("import minkernels; print(minkernels.info())", path=path)
    assert re.search(rf"missing +.*_ops.so does not load .*{_library.BUILD}", printed.stdout), printed.stderr


@pytest.mark.parametrize("call", ["nms(torch.zeros(1, 4), torch.zeros(1), 0.5)", "box_iou(torch.zeros(1, 4), torch.zeros(1, 4))"])
def test_a_library_of_another_version_raises_and_says_how_to_rebuild_it(tmp_path, host, call):
    path = copy_package(tmp_path, library=False)
    shutil.copy(PACKAGE / _build.HOST, path / "minkernels" / "_ops.so")  # it loads, and has none of the operators
    result = python(f"import torch, minkernels; minkernels.{call}", path=path)
    assert result.returncode == 1 and re.search(rf"of another version.*{_library.BUILD}", result.stderr), result.stderr


def test_what_is_too_old_or_missing_is_told_in_a_sentence():
    root = PACKAGE.parents[1]
    old = python("import torch; torch.__version__ = '2.10.1+cpu'; import minkernels")
    assert "ImportError: minkernels needs torch 2.11 or newer, this is 2.10.1+cpu" in old.stderr
    old = python("import torch; torch.__version__ = '2.10.1'; import _build; _build.build()", path=PACKAGE)
    assert "RuntimeError: it needs torch 2.11 or newer, this is 2.10.1" in old.stderr
    old = python(f"import runpy, setuptools; setuptools.__version__ = '65.5.0'; runpy.run_path({str(root / 'setup.py')!r})")
    assert old.returncode == 1 and old.stderr.startswith("minkernels needs setuptools 77 or newer, this is 65.5.0: pip install")
    resolve = "from minkernels import _library; _library._resolve('minkernels.nms._triton:nms')"
    gone = python(f"import sys; sys.modules['triton'] = None; {resolve}")
    assert "ImportError: on a GPU minkernels needs Triton, which is not installed: pip install triton" in gone.stderr


@pytest.mark.parametrize("macro, found", [("__GNUC__ 11", "g++ 11"), ("__GNUC__ 4\n#define __clang_major__ 17", "clang 17")])
def test_a_compiler_that_cannot_build_it_is_named(tmp_path, monkeypatch, macro, found):
    script = tmp_path / "cxx"
    script.write_text(f"#!/bin/sh\necho '#define {macro}'\n")
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    monkeypatch.setattr(_build, "CLANG", 18)  # that of x86-64
    message = f"{script} is {found}, and the C++ library needs g++ 12 or clang 18, or newer: name one in CXX"
    with pytest.raises(RuntimeError, match=re.escape(message)):
        _build.build(tmp_path / "_ops.so")


@pytest.mark.parametrize(
    "env, message",
    [
        ({"CXX": "false"}, "the C++ build failed"),
        ({"PATH": "/nonexistent"}, "no C++ compiler: install g++"),
        ({"CXX": "'/no where/g++' -v"}, "CXX names no program that runs: /no where/g++"),
    ],
    ids=["compiler fails", "no compiler", "no such compiler"],
)
def test_a_failed_build_says_why_and_leaves_what_was_there(tmp_path, env, message):
    path = copy_package(tmp_path, library=False)
    shutil.copytree(PACKAGE.parents[1] / "csrc", path / "minkernels" / "csrc")
    (path / "minkernels" / "_ops.so").write_bytes(b"old")
    code = "import sys, runpy; sys.argv = ['minkernels', 'build']; runpy.run_module('minkernels', run_name='__main__')"
    result = python(code, path=path, **env)
    assert result.returncode == 1 and message in result.stderr and "Traceback" not in result.stderr
    assert (path / "minkernels" / "_ops.so").read_bytes() == b"old"


def test_where_nothing_can_be_written_nothing_is_compiled(tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(RuntimeError, match=re.escape(f"cannot write {tmp_path}/none/_ops.so: {tmp_path}/none is read-only, or not there")):
        _build.build(tmp_path / "none" / "_ops.so")


def test_paths_may_hold_what_a_shell_would_split(tmp_path, monkeypatch):
    folder = tmp_path / "My $Projects"
    (folder / "ops" / "cpu").mkdir(parents=True)
    (folder / "ops" / "cpu" / "empty.cpp").write_text('#include "found.h"\n')
    (folder / "include").mkdir()
    (folder / "include" / "found.h").write_text("#ifndef ASKED\n#error\n#endif\n")
    monkeypatch.setattr("torch.utils.cpp_extension.include_paths", lambda: [str(folder / "include")])
    monkeypatch.setenv("CXXFLAGS", "-DASKED\n")
    _build._build(folder, folder / "build", folder / "_ops.so", False)
    assert (folder / "_ops.so").exists()


def test_a_source_distribution_builds(tmp_path):
    """Its files are those that git knows, without the history."""
    root = PACKAGE.parents[1]
    files = "pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE", "constraints.txt", "data.txt", "Makefile"
    ignore = shutil.ignore_patterns("__pycache__", "*.so", "*.egg-info")
    for name in (*files, "csrc", "kernels", "minmodels"):
        copy = partial(shutil.copytree, ignore=ignore) if (root / name).is_dir() else shutil.copy
        copy(root / name, tmp_path / name)
    subprocess.run([sys.executable, "setup.py", "-q", "sdist"], cwd=tmp_path, check=True, capture_output=True)
    (archive,) = (tmp_path / "dist").iterdir()
    with tarfile.open(archive) as held:
        names = {Path(*Path(name).parts[1:]) for name in held.getnames()}
    assert {path.relative_to(root) for path in (root / "csrc").rglob("*.*")} <= names


def test_a_call_that_ran_out_of_memory_leaves_nothing_behind():
    code = """
import resource, torch, minkernels as mk
torch.set_num_threads(THREADS)
def call(N):
    boxes, scores = torch.rand(2, 1, 4).expand(2, N, 4), torch.rand(2, 1).expand(2, N)
    return mk.nms_padded(boxes, scores, iou_threshold=0.5, max_output=1).counts.tolist()
call(10)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**28, -1))
try:
    call(20_000_000)
except MemoryError:
    resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
    print(call(200_000))
"""
    for threads in ("1", "2"):
        result = python(code.replace("THREADS", threads))
        assert result.stdout == "[1, 1]\n", (result.returncode, result.stderr)


def test_fresh_outputs_of_4_mb_ask_for_huge_pages(library):
    """Page faults cost more than the kernel: a fresh 64 MB gradient must not take 16,000 of them (where the system allows advice)."""
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not setting.exists() or "[never]" in setting.read_text():
        pytest.skip("this system has no transparent huge pages")
    import resource

    x, target = torch.zeros(512, 32768, requires_grad=True), torch.zeros(512, dtype=torch.int64)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    minkernels.cross_entropy(x, target).backward()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before < 4000
