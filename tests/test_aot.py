"""The configs that the tables choose, compiled ahead of time for GPUs that need not be here: no spills, no TF32, shared memory within
the target's limit, and a device assert that is really there."""

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("compiles, which the interpreter's process cannot", allow_module_level=True)
aot = pytest.importorskip("aot", reason="needs Triton")

from minkernels.attention import _triton as attention  # noqa: E402
from minkernels.cross_entropy import _triton as cross_entropy  # noqa: E402


def check(kernels, limit, folder, dtype, names):
    assert [kernel.metadata.name for kernel in kernels] == names
    for kernel in kernels:
        usage = aot.usage(kernel, folder)
        spilled = usage["STACK"] + usage.get("LOCAL", 0)
        assert spilled == 0, f"{kernel.metadata.name} spills {spilled} bytes a thread: {usage}"
        assert kernel.metadata.shared <= limit, f"{kernel.metadata.name} takes {kernel.metadata.shared} bytes of shared memory"
        if dtype == torch.float32:
            assert "tf32" not in kernel.asm["ptx"]


@pytest.mark.parametrize("target", aot.TARGETS)
@pytest.mark.parametrize("dims", [(40, 40), (64, 64), (96, 80), (128, 128), (256, 256)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_attention(target, dims, dtype, monkeypatch, tmp_path):
    """Causal and masked, the longest of the variants; the head dims are those of the table, and one between."""
    (D, Dv), (gpu, limit) = dims, aot.TARGETS[target]
    monkeypatch.setattr(attention, "_arch", lambda device: target)
    q, k, v = (torch.empty(1, 2, 64, d, dtype=dtype) for d in (D, D, Dv))
    args = torch.ones(1, 64, dtype=torch.bool), True, 0.125
    with aot.compiling_for(gpu) as kernels:
        o, lse = attention.fwd(q, k, v, *args)
        attention.bwd(torch.empty_like(o), q, k, v, o, lse, *args)
    check(kernels, limit, tmp_path, dtype, ["_fwd_kernel", "_dq_kernel", "_dkdv_kernel"])


@pytest.mark.parametrize("target", aot.TARGETS)
@pytest.mark.parametrize("V", [1000, 32768, 128256])  # a row in one block, the largest such, and one read twice
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_cross_entropy(target, V, dtype, tmp_path):
    gpu, limit = aot.TARGETS[target]
    x, labels = torch.empty(2, V, dtype=dtype), torch.zeros(2, dtype=torch.int64)
    with aot.compiling_for(gpu) as kernels:
        _, stats, grad = cross_entropy.fwd(x, labels, -100, "mean", True)
        cross_entropy.bwd(torch.empty(()), x, labels, stats, -100, "mean")
        cross_entropy.scale_(grad, torch.empty(()))
    check(kernels, limit, tmp_path, dtype, ["_fwd_kernel", "_bwd_kernel", "_scale_kernel"])
    for kernel in kernels[:2]:
        assert "assertfail" in kernel.asm["ptx"], f"{kernel.metadata.name} does not check its labels"
