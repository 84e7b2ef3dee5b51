"""Launches of Triton kernels: what is remembered of them, and that Triton's own launcher takes it."""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter has launches of its own", allow_module_level=True)
aot = pytest.importorskip("aot", reason="needs Triton")

import triton.language as tl  # noqa: E402
from triton.runtime import JITFunction, driver  # noqa: E402

from minkernels import _triton_launch as launch  # noqa: E402

HERE = Path(__file__).parent


@launch.kernel(do_not_specialize=["n"])
def _kernel(X, Y, n, scale, strides, BLOCK: tl.constexpr):
    pass


class Compiled:
    def __init__(self):
        self.launches = []

    def __getitem__(self, grid):
        return lambda *args: self.launches.append((grid, args))


@pytest.fixture
def asked(monkeypatch):
    """The compilations that triton.jit was asked for, launched once each."""
    compiled = []

    def run(self, *args, grid, warmup, **kwargs):
        assert not warmup
        compiled.append(Compiled())
        return compiled[-1]

    monkeypatch.setattr(JITFunction, "run", run)
    monkeypatch.setattr(_kernel, "forms", {})
    driver.set_active(aot.Driver(aot.TARGETS["sm_90"][0]))
    yield compiled
    driver.set_active(None)


def call(x, y=None, n=5, scale=1.0, strides=(1, 2), grid=(3,), **more):
    _kernel[grid](x, y, n, strides=strides, scale=scale, **{"BLOCK": 16, "num_warps": 4} | more)


def test_a_launch_is_remembered(asked):
    """Whatever lies in the tensors, at whatever address of the same alignment; a size may be any, and so may the grid."""
    x, other = torch.zeros(8), torch.ones(3, 5)
    call(x)
    call(other, n=100, grid=(4, 5))
    assert len(asked) == 1
    assert asked[0].launches[0] == ((4, 5, 1), (other, None, 100, 1.0, (1, 2), 16)), "all parameters in their order, options none"


@pytest.mark.parametrize(
    "change",
    [
        dict(x=torch.zeros(8, dtype=torch.float16)), dict(x=torch.zeros(9)[1:]), dict(y=torch.zeros(8)), dict(n=2**31), dict(n=None),
        dict(scale=2.0), dict(scale=1), dict(scale=True), dict(scale=None), dict(strides=(1, 16)), dict(strides=(2, 2)), dict(BLOCK=32),
        dict(num_warps=8), dict(num_stages=2),
    ],
    ids=str,
)  # fmt: skip
def test_what_may_compile_otherwise_is_asked_for(change, asked):
    call(**dict(x=torch.zeros(8)) | change)
    call(torch.zeros(8))
    assert len(asked) == 2
    call(**dict(x=torch.zeros(8)) | change)
    call(torch.zeros(8))
    assert [len(compiled.launches) for compiled in asked] == [1, 1]


def test_devices_do_not_share(asked):
    call(torch.zeros(8))
    driver.set_active(aot.Driver(aot.TARGETS["sm_80"][0]))
    call(torch.zeros(8))
    assert len(asked) == 2


def test_not_all_is_remembered(asked, monkeypatch):
    monkeypatch.setattr(launch, "MOST", 3)
    for stride in range(10):
        call(torch.zeros(8), strides=(1, stride))
        (remembered,) = [compiled for *_, compiled in _kernel.forms.values()]
        assert len(remembered) <= 3
    assert len(asked) == 10


def test_on_amd_triton_decides(asked, monkeypatch):
    """There the size of a tensor's memory counts too."""
    monkeypatch.setattr(torch.version, "hip", "6")
    call(torch.zeros(8))
    call(torch.zeros(8))
    assert len(asked) == 2 and not _kernel.forms


@pytest.mark.parametrize("n", [0, 1, 2, 3, 4, 5, 127, 128, 129])
def test_sizes(n):
    power = launch.next_power_of_2(n)
    assert power >= n and power & (power - 1) == 0 and (power // 2 < n or power == 1)
    assert launch.cdiv(n, 4) * 4 >= n > launch.cdiv(n, 4) * 4 - 4


@pytest.mark.skipif(not Path(sysconfig.get_path("include"), "Python.h").exists(), reason="Triton's launcher is compiled, against Python.h")
def test_by_tritons_own_launcher(tmp_path):
    """Each kernel twice, with a libcuda that runs nothing."""
    flags = ["-shared", "-fPIC", "-O1", "-Wl,-soname,libcuda.so.1"]
    subprocess.run(["gcc", *flags, str(HERE / "fake_libcuda.c"), "-o", str(tmp_path / "libcuda.so.1")], check=True)
    env = {**os.environ, "TRITON_LIBCUDA_PATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(HERE / "launch_worker.py")]
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=600)
    assert done.returncode == 0, done.stdout
