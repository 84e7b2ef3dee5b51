"""The C++ sources compiled by clang, for systems that CI does not have: where ziglang is installed, which carries clang and their headers
(`make portable`). They are compiled, not run."""

import os
import shlex
import subprocess
import sys

import pytest

from minkernels import _build

pytest.importorskip("ziglang", reason="`make portable` installs it")

SOURCES = [*sorted(_build.sources().glob("ops/cpu/*.cpp")), _build.sources() / "host/average_precision.cpp"]


@pytest.mark.parametrize("target", ["x86_64-linux-gnu -mcpu=x86_64", "aarch64-linux-gnu", "aarch64-macos"])
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_clang_compiles_it(source, target, tmp_path):
    flags = shlex.split(f"{_build.FLAGS} {_build._torch_flags()} -O0 -Werror -target {target}")
    command = [sys.executable, "-m", "ziglang", "c++", *flags, "-c", str(source), "-o", str(tmp_path / "object.o")]
    cache = {name: str(tmp_path / "cache") for name in ("ZIG_GLOBAL_CACHE_DIR", "ZIG_LOCAL_CACHE_DIR")}
    result = subprocess.run(command, env={**os.environ, **cache}, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-4000:]
