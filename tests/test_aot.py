"""The configs that the tables choose, compiled ahead of time for GPUs that need not be here: no spills, no TF32, shared memory within
the target's limit, and a device assert that is really there."""

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("compiles, which the interpreter's process cannot", allow_module_level=True)
aot = pytest.importorskip("aot", reason="needs Triton")

from minkernels.attention import _triton as attention  # noqa: E402
from minkernels.attention._options import Options  # noqa: E402
from minkernels.cross_entropy import _triton as cross_entropy  # noqa: E402
from minkernels.segmentation import _triton as segmentation  # noqa: E402

EVERY = os.environ.get("AOT") == "all"  # `make aot`: the less common targets and head dims too
TARGETS = aot.ALL_TARGETS if EVERY else aot.TARGETS
DIMS = [(64, 64), (128, 128), (256, 256), (96, 80)] + [(40, 40), (80, 80), (192, 128), (200, 200)] * EVERY


def check(kernels, target, folder, dtype, names):
    assert [kernel.metadata.name for kernel in kernels] == names
    limit = aot.ALL_TARGETS[target][1]
    for kernel in kernels:
        usage = aot.usage(kernel, folder)
        assert usage["spilled"] == 0, f"{kernel.metadata.name} spills: {usage}"
        assert usage["shared"] <= limit, f"{kernel.metadata.name} takes more than {limit} bytes of shared memory: {usage}"
        if dtype == torch.float32 and "ptx" in kernel.asm:
            assert "tf32" not in kernel.asm["ptx"]


def compile_attention(target, dims, dtype, options, monkeypatch, heads=2, queries=64, keys=64, batch=1):
    """What forward and backward launch."""
    monkeypatch.setattr(attention, "_arch", lambda device: target)
    monkeypatch.setattr(attention, "_processors", lambda device: 132)
    (D, Dv), kv_heads = dims, 2
    q, k, v = (torch.empty(batch, h, n, d, dtype=dtype) for h, n, d in ((heads, queries, D), (kv_heads, keys, D), (kv_heads, keys, Dv)))
    x = Options(**options, scale=0.125)
    with aot.compiling_for(aot.ALL_TARGETS[target][0]) as kernels:
        o, lse = attention.fwd(q, k, v, *x)
        if queries > 1:  # decoding has no backward
            attention.bwd(torch.empty_like(o), None, q, k, v, o, lse, *x, x.bias is not None)
    return kernels


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dims", DIMS, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_attention(target, dims, dtype, monkeypatch, tmp_path):
    """Causal and masked, the longest of the plain variants; the head dims are those of the table, and some in two widths."""
    options = dict(key_mask=torch.ones(1, 64, dtype=torch.bool), right=0)
    kernels = compile_attention(target, dims, dtype, options, monkeypatch)
    check(kernels, target, tmp_path, dtype, ["_fwd_kernel", "_dq_kernel", "_dkdv_kernel"])


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dims", DIMS if EVERY else DIMS[1:2], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("heads", [2, 64] if EVERY else [2])
def test_attention_decoding(target, dims, dtype, heads, monkeypatch, tmp_path):
    """A query for each head; 32 heads that share a key head fill a larger tile than one does."""
    options = dict(key_mask=torch.ones(1, 4096, dtype=torch.bool), right=0)
    kernels = compile_attention(target, dims, dtype, options, monkeypatch, heads, 1, 4096)
    check(kernels, target, tmp_path, dtype, ["_fwd_kernel", "_merge_kernel"])


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dims", [(64, 64), (128, 128)] + [(256, 256)] * EVERY, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16] + [torch.float32] * EVERY, ids=str)
def test_attention_options(target, dims, dtype, monkeypatch, tmp_path):
    """What a tile has more to load and to compute: a bias that the batch shares, dropout, a window, lengths."""
    options = dict(
        bias=torch.empty(1, 2, 64, 64, dtype=dtype), seed=torch.tensor(0), dropout_p=0.1, left=1000, right=0,
        kv_lens=torch.empty(2, dtype=torch.int32),
    )  # fmt: skip
    kernels = compile_attention(target, dims, dtype, options, monkeypatch, batch=2)
    check(kernels, target, tmp_path, dtype, ["_fwd_kernel", "_dq_kernel", "_dkdv_kernel", "_dbias_kernel"])


@pytest.mark.parametrize("lengths", ["kv_lens", "cu_seqlens"])
def test_attention_asserts_its_lengths(lengths, monkeypatch):
    cu = torch.empty(3, dtype=torch.int32)
    packed = dict(cu_seqlens_q=cu, cu_seqlens_k=cu, max_seqlen_q=64, max_seqlen_k=64)
    options = dict(kv_lens=torch.empty(1, dtype=torch.int32)) if lengths == "kv_lens" else packed
    kernels = compile_attention("sm_90", (64, 64), torch.bfloat16, options, monkeypatch)
    for kernel in kernels:
        assert "assertfail" in kernel.asm["ptx"], f"{kernel.metadata.name} does not check {lengths}"


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
@pytest.mark.parametrize("V", [1000, 32768, 128256])  # a row in one block, the largest such, and one read twice
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_cross_entropy(target, V, dtype, tmp_path):
    x, labels = torch.empty(2, V, dtype=dtype), torch.zeros(2, dtype=torch.int64)
    with aot.compiling_for(aot.ALL_TARGETS[target][0]) as kernels:
        _, stats, grad = cross_entropy.fwd(x, labels, -100, "mean", True)
        cross_entropy.bwd(torch.empty(()), x, labels, stats, -100, "mean")
        cross_entropy.scale_(grad, torch.empty(()))
    check(kernels, target, tmp_path, dtype, ["_fwd_kernel", "_bwd_kernel", "_scale_kernel"])
    for kernel in kernels[:2]:
        assert "assertfail" in kernel.asm["ptx"], f"{kernel.metadata.name} does not check its labels"


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("gamma", [0.0, 2.0] + [1.0, 1.5] * EVERY)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_sigmoid_loss(target, gamma, dtype, tmp_path):
    """Plain, and with every operand in a layout of its own."""
    x, labels = torch.empty(2, 3, 64, 64, dtype=dtype), torch.zeros(2, 3, 64, 64, dtype=torch.uint8)
    weights = x[0, 0, 0].expand(x.shape), x[0, :, :1, :1].expand(x.shape), (x[:, :1, :, :1] > 0).expand(x.shape)
    for tensors in ((x, x.clone(), None, None, None), (x.mT, labels, *weights)):
        with aot.compiling_for(aot.ALL_TARGETS[target][0]) as kernels:
            _, scale, _ = segmentation.sigmoid_loss_fwd(*tensors, 0.25, gamma, "sum", True)
            segmentation.sigmoid_loss_bwd(torch.empty(()), *tensors, scale, 0.25, gamma)
        check(kernels, target, tmp_path, dtype, ["_pointwise_kernel"] * 2)
        if "ptx" in kernels[0].asm:
            assert ("assertfail" in kernels[0].asm["ptx"]) == (tensors[1] is labels), "integer targets are checked, others are not"


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("class_map", [False, True], ids=["dense", "map"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_bce_dice(target, class_map, dtype, tmp_path):
    x = torch.empty(2, 3, 64, 64, dtype=dtype)
    labels = torch.zeros(2, 64, 64, dtype=torch.int64) if class_map else x.clone()
    mask = torch.ones(2, 1, 64, 64, dtype=torch.bool).expand(x.shape)
    for shared in (None, mask):
        with aot.compiling_for(aot.ALL_TARGETS[target][0]) as kernels:
            _, factors = segmentation.bce_dice_fwd(x, labels, torch.empty(3), shared, 1.0, 1.0, 1.0, True, True, "mean")
            segmentation.bce_dice_bwd(x, labels, torch.empty(3), shared, factors, True)
        check(kernels, target, tmp_path, dtype, ["_dice_sums_kernel", "_dice_finish_kernel", "_dice_grad_kernel"])
        if "ptx" in kernels[0].asm:
            assert ("assertfail" in kernels[0].asm["ptx"]) == class_map, "classes are checked"
