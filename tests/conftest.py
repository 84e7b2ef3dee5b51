"""Fixtures: the device, the instruction-set levels of the C++ kernels, a fixed seed. No environment variable is set for good."""

import os
import random
from pathlib import Path

import pytest
import torch

from minkernels import _build, _library

LEVELS = ["plain", "avx2", "avx512", "avx512_bf16"]  # csrc/ops/cpu/levels.h, worst first


def pytest_configure():
    """Interpreted, the programs of a launch run one after another: here in random order, so that none may count on another's results."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        return
    from triton.runtime.interpreter import interpreter_builder as grid

    set_grid_dim, set_grid_idx, order = grid.set_grid_dim, grid.set_grid_idx, {}

    def shuffle(nx, ny, nz):
        programs = [(x, y, z) for x in range(nx) for y in range(ny) for z in range(nz)]
        order.update(zip(programs, random.Random(0).sample(programs, len(programs)), strict=True))
        set_grid_dim(nx, ny, nz)

    grid.set_grid_dim, grid.set_grid_idx = shuffle, lambda *program: set_grid_idx(*order[program])


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
