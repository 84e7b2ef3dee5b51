"""What the CUDA road does around its kernels, without a GPU: fake_cuda_worker.py on the device of fake_cuda.py."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
if torch.version.cuda:
    pytest.skip("there can be no second CUDA device beside PyTorch's own", allow_module_level=True)

HERE, TORCH = Path(__file__).parent, Path(torch.__file__).parent


@pytest.fixture(scope="module")
def fake(tmp_path_factory):
    """fake_cuda.cpp."""
    path = tmp_path_factory.mktemp("fake_cuda") / "fake_cuda.so"
    libraries = [f"-L{TORCH / 'lib'}", f"-Wl,-rpath,{TORCH / 'lib'}", "-lc10", "-ltorch_cpu"]
    flags = ["-std=c++20", "-fPIC", "-shared", f"-I{TORCH / 'include'}"]
    subprocess.run(["g++", *flags, str(HERE / "fake_cuda.cpp"), *libraries, "-o", str(path)], check=True)
    return path


NEEDS = {"itself": [], "ops": [], "models": ["matplotlib", "rich", "safetensors", "tokenizers"], "swapped": ["transformers"]}


@pytest.mark.parametrize("what", NEEDS)
def test_on_a_fake_cuda_device(what, library, fake):
    """The results of the CPU; no CPU tensor reaches a kernel, nothing unwritten is read, nothing waits for the device."""
    for name in NEEDS[what]:
        pytest.importorskip(name)
    command = [sys.executable, str(HERE / "fake_cuda_worker.py"), what]
    env = {**os.environ, "FAKE_CUDA": str(fake), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=600)
    assert done.returncode == 0, done.stdout
