"""Fixtures: the device, the instruction-set levels of the C++ kernels, a fixed seed. No environment variable is set for good."""

import os
from pathlib import Path

import pytest
import torch

from minkernels import _build, _library

LOST = pytest.StashKey[str]()
LEVELS = ["plain", "avx2", "avx512", "avx512_bf16"]  # csrc/ops/cpu/levels.h, worst first


def pytest_configure():
    if os.environ.get("TRITON_INTERPRET") == "1":
        import interpreted

        interpreted.mend()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if call.excinfo is not None and call.excinfo.errisinstance(torch.AcceleratorError):
        item.config.stash[LOST] = item.nodeid
    return report


def pytest_runtest_setup(item):
    """After an error of the device, every call to it fails in this process: another worker takes over, or the run ends."""
    if LOST in item.config.stash:
        if "PYTEST_XDIST_WORKER" in os.environ:
            os._exit(1)
        pytest.exit(f"the device is lost to this process since {item.config.stash[LOST]}", 1)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def device():
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="session")
def library():
    """The C++ library: `make test` builds it, so that a test never passes for want of what it tests."""
    assert not _library.cpp_missing(), f"{_library.cpp_missing()}: run {_library.BUILD}"
    return torch.ops.minkernels


@pytest.fixture(scope="session")
def host():
    """The C++ side of minmodels.metrics, built by `make test` too."""
    assert (Path(_library.__file__).parent / _build.HOST).exists(), f"minkernels._host is not built: run {_library.BUILD}"


@pytest.fixture
def levels(library, monkeypatch):
    """Iterates over the levels that this CPU has, each in force while its turn lasts."""

    def each():
        for level in LEVELS:
            monkeypatch.setenv("MINKERNELS_CPU_LEVEL", level)
            if library._cpu_level() == level:
                yield level
        monkeypatch.delenv("MINKERNELS_CPU_LEVEL")

    return each()
