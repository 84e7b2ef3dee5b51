"""What surrounds the kernels: the import, the report, the build, and life without the C++ library."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import minkernels
from minkernels import _library

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


def test_a_lower_level_is_reported(library, monkeypatch):
    monkeypatch.setenv("MINKERNELS_CPU_LEVEL", "plain")
    assert minkernels.info().cpu_level == "plain" and "MINKERNELS_CPU_LEVEL" in minkernels.info().backends["attention"]["CPU"]


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


@pytest.mark.parametrize(
    "env, message",
    [({"CXX": "false"}, "the C++ build failed"), ({"PATH": "/nonexistent"}, "no C++ compiler: install g++")],
    ids=["compiler fails", "no compiler"],
)
def test_a_failed_build_says_why_and_leaves_what_was_there(tmp_path, env, message):
    path = copy_package(tmp_path, library=False)
    shutil.copytree(PACKAGE.parents[1] / "csrc", path / "minkernels" / "csrc")
    (path / "minkernels" / "_ops.so").write_bytes(b"old")
    code = "import sys, runpy; sys.argv = ['minkernels', 'build']; runpy.run_module('minkernels', run_name='__main__')"
    result = python(code, path=path, **env)
    assert result.returncode == 1 and message in result.stderr and "Traceback" not in result.stderr
    assert (path / "minkernels" / "_ops.so").read_bytes() == b"old"


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
