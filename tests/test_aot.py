"""The configs that the tables choose, compiled ahead of time for GPUs that need not be here: no spills, no TF32, shared memory within
the target's limit, and a device assert that is really there."""

import os
import re

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("compiles, which the interpreter's process cannot", allow_module_level=True)
aot = pytest.importorskip("aot", reason="needs Triton")

from minkernels.attention import _triton as attention  # noqa: E402
from minkernels.attention import _triton_merge as merge_attention  # noqa: E402
from minkernels.attention._options import Options  # noqa: E402
from minkernels.boxes import _triton as boxes  # noqa: E402
from minkernels.cross_entropy import _triton as cross_entropy  # noqa: E402
from minkernels.cross_entropy._options import Options as SoftmaxOptions  # noqa: E402
from minkernels.nms import _triton as nms  # noqa: E402
from minkernels.segmentation import _triton as segmentation  # noqa: E402
from minkernels.soft_nms import _triton as soft_nms  # noqa: E402
from minkernels.yolo import _triton as yolo  # noqa: E402
from minkernels.yolo import _triton_loss as yolo_loss  # noqa: E402
from minkernels.yolo._options import Options as YoloOptions  # noqa: E402

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
    monkeypatch.setattr(attention, "processors", lambda device: 132)
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


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("D", [128] + [80, 576] * EVERY)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_merge_attention(target, D, dtype, tmp_path):
    """A float32 sum and parts in dtype."""
    tensors = torch.empty(1, 2, 64, D), torch.empty(1, 2, 64), torch.empty(1, 2, 64, D, dtype=dtype), torch.empty(1, 2, 64)
    with aot.compiling_for(aot.ALL_TARGETS[target][0]) as kernels:
        out, lse = merge_attention.fwd(*tensors)
        merge_attention.bwd(out, lse, *tensors)
    check(kernels, target, tmp_path, dtype, ["_fwd_kernel", "_bwd_kernel"])


@pytest.mark.parametrize("lengths", ["kv_lens", "cu_seqlens"])
def test_attention_asserts_its_lengths(lengths, monkeypatch):
    cu = torch.empty(3, dtype=torch.int32)
    packed = dict(cu_seqlens_q=cu, cu_seqlens_k=cu, max_seqlen_q=64, max_seqlen_k=64)
    options = dict(kv_lens=torch.empty(1, dtype=torch.int32)) if lengths == "kv_lens" else packed
    kernels = compile_attention("sm_90", (64, 64), torch.bfloat16, options, monkeypatch)
    for kernel in kernels:
        assert "assertfail" in kernel.asm["ptx"], f"{kernel.metadata.name} does not check {lengths}"


EVERYTHING = dict(label_smoothing=0.1, z_loss=1e-2, softcap=5.0, logit_scale=1.3)
STATS, MERGE, GRAD = "_stats_kernel", "_merge_kernel", "_grad_kernel"
CROSS_ENTROPY = {  # shape, options, whether targets are probabilities, processors, what the forward launches
    "short-rows": ((2, 1000), {}, False, 1, [STATS]),
    "whole": ((2, 32768), {}, False, 1, [STATS]),
    "two-reads": ((2, 128256), {}, False, 1, [STATS]),
    "odd": ((2, 50257), {}, False, 1, [STATS]),
    "split": ((2, 128256), {}, False, 132, [STATS, MERGE, GRAD]),
    "positions": ((2, 21, 4096), {}, False, 1, [STATS]),
    "positions-in-pieces": ((2, 1000, 4096), {}, False, 1, [STATS]),
    "everything-short": ((2, 1000), EVERYTHING, False, 1, [STATS]),
    "everything-whole": ((2, 8192), EVERYTHING, True, 1, [STATS]),
    "everything-two-reads": ((2, 128256), EVERYTHING, False, 1, [STATS]),
    "everything-probs": ((2, 128256), EVERYTHING, True, 1, [STATS]),
    "everything-split": ((2, 128256), EVERYTHING, True, 132, [STATS, MERGE, GRAD]),
    "everything-positions": ((2, 21, 4096), EVERYTHING, True, 1, [STATS]),
    "everything-in-pieces": ((2, 1000, 4096), EVERYTHING, False, 1, [STATS]),
}


@pytest.fixture
def softmax(monkeypatch):
    """Its launchers, compiling for a target: call(target, processors, function) gives the kernels."""

    def compile_softmax(target, processors, function):
        monkeypatch.setattr(cross_entropy, "processors", lambda device: processors)
        with aot.compiling_for(aot.ALL_TARGETS[target][0]) as kernels:
            function()
        return kernels

    return compile_softmax


def check_asserts(kernels, labels):
    for kernel in kernels:
        if "ptx" in kernel.asm and kernel.metadata.name in (STATS, MERGE):
            assert ("assertfail" in kernel.asm["ptx"]) == labels, f"{kernel.metadata.name}: does it check its labels?"


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("case", CROSS_ENTROPY)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_cross_entropy(target, case, dtype, softmax, tmp_path):
    shape, options, probs, processors, names = CROSS_ENTROPY[case]
    x, x_options = torch.empty(shape, dtype=dtype), SoftmaxOptions(**options)
    target_rows = torch.empty_like(x) if probs else torch.zeros((shape[0], *shape[2:]), dtype=torch.int64)
    weight, k = torch.ones(shape[1]) if options else None, torch.empty(x[:, 0].numel(), 5)
    kernels = softmax(target, processors, lambda: cross_entropy.fwd(x, target_rows, weight, *x_options, "mean", False, True))
    check(kernels, target, tmp_path, dtype, names)
    check_asserts(kernels, not probs)
    kernels = softmax(target, processors, lambda: cross_entropy.grad(x, target_rows, weight, k, *x_options))
    check(kernels, target, tmp_path, dtype, [GRAD])


@pytest.mark.parametrize("target", [target for target in TARGETS if target.startswith("sm_")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_cross_entropy_in_place_waits_for_its_labels(target, dtype, softmax):
    """The gradient is written over the logits, which every warp reads its label's from: not before the last of them has. And the label's
    own gradient is written over what its tile left there: not before that."""
    x, labels = torch.empty(2, 32000, dtype=dtype), torch.zeros(2, dtype=torch.int64)
    (kernel,) = softmax(target, 1, lambda: cross_entropy.fwd(x, labels, None, *SoftmaxOptions(), "sum", False, True, out=x))
    row = max(kernel.asm["ptx"].split("\n$L__BB"), key=lambda block: block.count("st.global"))  # of one that counts
    tile, label = row.index("st.global.v4", row.rindex("ld.global")), row.rindex("st.global")
    assert "bar.sync" in row[row.rindex("ld.global") : tile] and "bar.sync" in row[row.rindex("st.global.v4") : label]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(2, 1000), (2, 128256), (2, 21, 4096), (2, 1000, 8192)], ids=str)
def test_softmax_stats(target, shape, dtype, softmax, tmp_path):
    """Entropy and all columns, or the loss alone; of a shard, whose labels may lie elsewhere, without the assert."""
    x, labels = torch.empty(shape, dtype=dtype), torch.zeros((shape[0], *shape[2:]), dtype=torch.int64)
    for processors in (1, 132):
        split = processors > 1 and shape == (2, 128256)
        for shard in (False, True):
            options = SoftmaxOptions(softcap=5.0, label_smoothing=0.1 if shard else 0.0)
            kernels = softmax(target, processors, lambda o=options, shard=shard: cross_entropy.stats(x, labels, None, *o, shard, True))
            check(kernels, target, tmp_path, dtype, [STATS] + [MERGE] * split)
            check_asserts(kernels, not shard)
        kernels = softmax(target, processors, lambda: cross_entropy.fwd(x, labels, None, *SoftmaxOptions(), "none", False, False))
        check(kernels, target, tmp_path, dtype, [STATS] + [MERGE] * split)


@pytest.mark.parametrize("target", TARGETS)
def test_scale(target, softmax, tmp_path):
    kernels = softmax(target, 1, lambda: cross_entropy.scale_(torch.empty(2, 1000, dtype=torch.bfloat16), torch.ones(())))
    check(kernels, target, tmp_path, torch.bfloat16, ["_scale_kernel"])


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


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kind", ["iou", "ciou"] + ["giou", "diou"] * EVERY)
def test_box_pairs(target, kind, tmp_path):
    """Large sets; and few boxes beside many, whose gradient is summed in parts. IEEE division, nothing contracted."""
    for N, M in ((4000, 4000), (3, 9000)):
        a, b, dout = torch.empty(2, N, 4), torch.empty(2, M, 4), torch.empty(2, N, M)
        with aot.compiling_for(aot.ALL_TARGETS[target][0]) as kernels:
            boxes.pairs_fwd(a, b, kind, "cxcywh", 1e-7)
            boxes.pairs_bwd(dout, a, b, kind, "cxcywh", 1e-7, True, True)
        check(kernels, target, tmp_path, torch.float32, ["_pairs_kernel"] + ["_pairs_grad_kernel"] * 2)
        check_exact(kernels[:1], ["_pairs_kernel"])


@pytest.mark.parametrize("target", TARGETS)
def test_iou_match(target, tmp_path):
    with aot.compiling_for(aot.ALL_TARGETS[target][0]) as kernels:
        boxes.match(torch.empty(2, 9000, 4), torch.empty(2, 100, 4), "xyxy")
    check(kernels, target, tmp_path, torch.float32, ["_match_kernel"] * 2)
    check_exact(kernels, ["_match_kernel"])


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kind", ["giou", "ciou"] + ["iou", "diou"] * EVERY)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_iou_loss(target, kind, dtype, tmp_path):
    a, b = torch.empty(9000, 4, dtype=dtype), torch.empty(9000, 4, dtype=dtype)
    with aot.compiling_for(aot.ALL_TARGETS[target][0]) as kernels:
        boxes.loss_fwd(a, b, kind, "cxcywh", 1e-7, "mean")
        boxes.loss_bwd(torch.empty(9000), a, b, kind, "cxcywh", 1e-7, True, True)
    check(kernels, target, tmp_path, dtype, ["_loss_kernel", "_loss_grad_kernel"])


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("classes, dtype", [(False, torch.float32), (True, torch.bfloat16)], ids=["one-class", "classes"])
def test_nms(target, classes, dtype, tmp_path):
    """The quotient that decides is rounded as IEEE has it, and no product is contracted with a sum; the first kernel alone sees dtypes."""
    boxes, scores = torch.empty(2, nms.TILE + 1, 4, dtype=dtype), torch.zeros(2, nms.TILE + 1, dtype=dtype)
    ids = torch.zeros(2, nms.TILE + 1, dtype=torch.int64) if classes else None
    with aot.compiling_for(aot.ALL_TARGETS[target][0]) as kernels:
        nms.nms_padded(boxes, scores, ids, 0.5, 0.1, 300, True)
    names = ["_rank_kernel", "_bits_kernel", "_resolve_kernel", "_push_kernel", "_resolve_kernel", "_suppressor_kernel"]
    check(kernels, target, tmp_path, dtype, names)
    assert len(names) == nms.launches(nms.TILE + 1, True)
    for kernel in kernels:
        if "ptx" in kernel.asm:
            assert not re.search(r"\bfma\.", kernel.asm["ptx"]), f"{kernel.metadata.name} contracts"
            assert ("div.rn.f32" in kernel.asm["ptx"]) == (kernel.metadata.name in ("_bits_kernel", "_push_kernel"))
            assert not re.search(r"div\.(full|approx)", kernel.asm["ptx"])


def check_exact(kernels, divides=()):
    """No product is contracted with a sum; quotients that decide are rounded as IEEE has it."""
    for kernel in kernels:
        if "ptx" in kernel.asm:
            assert not re.search(r"\bfma\.\w+\.f32", kernel.asm["ptx"]), f"{kernel.metadata.name} contracts"
            assert not re.search(r"div\.(full|approx)", kernel.asm["ptx"])
            assert ("div.rn.f32" in kernel.asm["ptx"]) == (kernel.metadata.name in divides)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("method, classes", [("linear", False), ("gaussian", True)], ids=["linear", "gaussian-classes"])
def test_soft_nms(target, method, classes, tmp_path):
    N = soft_nms.BLOCK + 1
    boxes, scores = torch.empty(2, N, 4), torch.zeros(2, N)
    ids = torch.zeros(2, N, dtype=torch.int64) if classes else None
    with aot.compiling_for(aot.ALL_TARGETS[target][0]) as kernels:
        soft_nms.soft_nms(boxes, scores, ids, method, 0.3, 0.5, 0.01, 300)
        soft_nms.matrix_nms(boxes, scores, ids, method, 2.0, 0.01, 300)
    names = ["_soft_kernel", "_matrix_kernel", "_matrix_kernel"]
    check(kernels, target, tmp_path, torch.float32, names)
    check_exact(kernels, names)


NMS = "_rank_kernel", "_bits_kernel", "_resolve_kernel", "_push_kernel"


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("head, dtype", [("v8", torch.bfloat16), ("v1", torch.float32)] + [("v8", torch.float32)] * EVERY, ids=str)
def test_yolo(target, head, dtype, tmp_path):
    """Best classes, all of which enter; and all classes, more than enter: what is launched in both, and the NMS in between."""
    pred = torch.zeros((2, 84, 8400) if head == "v8" else (2, 7, 7, 90), dtype=dtype)
    for multi_label in (False, True):
        x = YoloOptions(head, 2, 80, 640.0, 640.0, True, 0.25, 0.45, 300, False, multi_label, 30000 if head == "v8" else 500)
        with aot.compiling_for(aot.ALL_TARGETS[target][0]) as kernels:
            yolo.detect(pred, *x)
        own = [kernel for kernel in kernels if kernel.metadata.name not in NMS]
        choice = ["_count_kernel", *["_histogram_kernel", "_digit_kernel"] * 3, "_count_kernel", "_write_kernel"]
        first = choice if multi_label else ["_best_kernel"]
        check(own, target, tmp_path, dtype, [*first, "_candidate_kernel", "_result_kernel"])
        check_exact(own, ["_candidate_kernel"] if head == "v1" else [])


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("B", [2] + [8] * EVERY)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_yolo_loss(target, B, dtype, tmp_path):
    """The responsible box is one of several by IEEE quotients; the classes are checked. As convolutions give it, in both memory formats."""
    boxes, classes, channels = torch.empty(2, 28, 28, 4), torch.zeros(2, 28, 28, dtype=torch.int64), 5 * B + 80
    for pred in (torch.empty(2, 28, 28, channels, dtype=dtype), torch.empty(2, channels, 28, 28, dtype=dtype).permute(0, 2, 3, 1)):
        with aot.compiling_for(aot.ALL_TARGETS[target][0]) as kernels:
            yolo_loss.loss_fwd(pred, boxes, classes, B, 5.0, 0.5, "mean")
            yolo_loss.loss_bwd(torch.empty(()), pred, boxes, classes, B, 5.0, 0.5, "mean")
        check(kernels, target, tmp_path, dtype, ["_loss_kernel"] * 2)
        check_exact(kernels, ["_loss_kernel"])
        for kernel in kernels:
            if "ptx" in kernel.asm:
                assert "assertfail" in kernel.asm["ptx"] and "sqrt.approx" not in kernel.asm["ptx"]
