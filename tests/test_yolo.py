"""yolo_detect: the reference against a detector written box by box, the C++ kernels against the reference bit for bit at every level, the
public op's promises."""

import math
import re

import pytest
import torch
from torch.library import opcheck

from minkernels import yolo_detect
from minkernels.yolo import reference
from minkernels.yolo._options import Options
from yolo_cases import HEADS, draw, plain_detect

SIZES = {"v1": 5, "v1-planar": 5, "v8": 150, "v8-probs": 150}  # the C++ kernel works on blocks of 64 to 1024 places
flags = pytest.mark.parametrize("multi_label", [False, True], ids=["best", "multi"])
heads = pytest.mark.parametrize("head", HEADS)


def options(head, C, **changes):
    x = dict(
        head=head, boxes_per_cell=2, num_classes=C, height=60.0, width=80.0, sqrt_wh=True, score_threshold=0.3, iou_threshold=0.45,
        max_output=30, class_agnostic=False, multi_label=False, max_candidates=30000,
    )  # fmt: skip
    return Options(**{**x, **changes})


def same(actual, expected, what=""):
    """Bit for bit; a sigmoid in float64 may differ by a rounding of its own."""
    for name, a, e in zip(("boxes", "scores", "classes", "counts"), actual, expected, strict=True):
        assert a.dtype == e.dtype and a.shape == e.shape, f"{what} {name}"
        if name == "scores" and a.dtype == torch.float64:
            torch.testing.assert_close(a, e, rtol=1e-15, atol=0)
        else:
            assert torch.equal(a, e), f"{what} {name}: {a.tolist()} instead of {e.tolist()}"


@heads
@flags
@pytest.mark.parametrize("agnostic", [False, True], ids=["classes", "agnostic"])
def test_reference_is_the_loop(head, multi_label, agnostic):
    size = {"v1": 4, "v1-planar": 4, "v8": 40, "v8-probs": 40}[head]
    pred = draw(head, 3, size, 3, torch.float64)
    x = options(head, 3, multi_label=multi_label, class_agnostic=agnostic)
    boxes, scores, classes, counts = reference.detect(pred, *x)
    for b in range(3):
        plain = plain_detect(pred[b], head, 3, (60.0, 80.0), 0.3, 0.45, 30, agnostic=agnostic, multi=multi_label)
        n = len(plain)
        assert 2 < n == counts[b]
        torch.testing.assert_close(boxes[b, :n], torch.stack([box for box, _, _ in plain]), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(scores[b, :n], torch.tensor([s for _, s, _ in plain], dtype=torch.float64), rtol=1e-12, atol=0)
        assert classes[b].tolist() == [c for _, _, c in plain] + [-1] * (30 - n)
        assert not boxes[b, n:].any() and not scores[b, n:].any()


@heads
@flags
def test_cpu(head, multi_label, levels):
    from minkernels.yolo import _cpu

    cases = []
    for i, (size, C) in enumerate([(SIZES[head], 3), (SIZES[head], 21), (1, 1), (0, 3), (9, 2)]):
        for changes in (
            dict(score_threshold=0.0, max_output=400),  # all pass, and NMS leaves them all
            dict(score_threshold=0.6, max_output=3),
            dict(score_threshold=0.5, class_agnostic=True, sqrt_wh=False, max_candidates=7),
            dict(score_threshold=1.0),
        ):
            dtype = (torch.float32, torch.bfloat16, torch.float16, torch.float64)[(i + len(changes)) % 4]
            pred = draw(head, 3, size, C, dtype, odd=True, ties=i % 2 == 0)
            x = options(head, C, iou_threshold=1.0 if "max_output" in changes else 0.3, multi_label=multi_label, **changes)
            cases.append((pred, x, reference.detect(pred, *x)))
    assert max(int(expected[3].max()) for *_, expected in cases) > 40
    for level in levels:
        for pred, x, expected in cases:
            same(_cpu.detect(pred, *x), expected, f"{level} {tuple(pred.shape)} {pred.dtype} {x}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_cpu_in_blocks(dtype, levels):
    """Several blocks, in several threads' worth of tasks; registers that end in the middle; a class count that is no multiple of four."""
    from minkernels.yolo import _cpu

    pred = draw("v8", 2, 2111, 7, dtype, odd=True)
    for multi_label in (False, True):
        x = options("v8", 7, score_threshold=0.7, max_output=100, multi_label=multi_label)
        expected = reference.detect(pred, *x)
        for level in levels if multi_label else ["default"]:
            same(_cpu.detect(pred, *x), expected, f"{level} {dtype}")


@heads
@flags
def test_fuzz(head, multi_label, library):
    for seed in range(20):
        torch.manual_seed(seed)
        size, C = int(torch.randint(1, 7, ())), int(torch.randint(1, 30, ()))
        size = size**2 if head.startswith("v8") else size
        pred = draw(head, 4, size, C, odd=seed % 2 == 0, ties=seed % 3 == 0, boxes_per_cell=1 + seed % 3)
        t, u, n = torch.rand(3).tolist()
        x = options(
            head, C, boxes_per_cell=1 + seed % 3, score_threshold=t, iou_threshold=u, max_output=1 + int(20 * n), multi_label=multi_label,
            max_candidates=1 + seed * 3, class_agnostic=seed % 5 == 0,
        )  # fmt: skip
        same(torch.ops.minkernels.yolo_detect(pred, *x), reference.detect(pred, *x), f"seed {seed}")


def detect(pred, head, C=5, **changes):
    more = dict(score_threshold=0.5, iou_threshold=0.45, max_output=30, image_size=(60, 80))
    return yolo_detect(pred, head=head, num_classes=C, **{**more, **changes})


@heads
def test_public(head, library):
    pred = draw(head, 3, SIZES[head], 5)
    result = detect(pred, head, multi_label=True, max_candidates=100)
    same(result, reference.detect(pred, *options(head, 5, score_threshold=0.5, multi_label=True, max_candidates=100)))
    assert result._fields == ("boxes", "scores", "classes", "counts") and result.counts.min() > 5
    square = detect(pred, head, image_size=80)
    same(square, reference.detect(pred, *options(head, 5, score_threshold=0.5, height=80.0)))


@heads
def test_layouts(head, library):
    pred = draw(head, 3, SIZES[head], 5)
    expected = detect(pred, head)
    order = list(reversed(range(pred.dim())))
    same(detect(pred.permute(order).contiguous().permute(order), head), expected)
    same(detect(torch.stack([pred, pred], -1)[..., 0], head), expected)
    same(detect(pred[:1].expand(pred.shape), head).counts[1:].expand(1, 2)[None].expand(4, 1, 2), [expected.counts[:1].expand(1, 2)] * 4)


def test_planar_shapes(library):
    """darknet's output as it is, or in the shape of its grid."""
    pred = draw("v1-planar", 2, 5, 5)
    same(detect(pred.view(2, 5, 5, 15), "v1-planar"), detect(pred, "v1-planar"))


def test_threads_change_nothing(library):
    pred, threads = draw("v8", 3, 3000, 5), torch.get_num_threads()
    try:
        results = []
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            results.append(detect(pred, "v8", multi_label=True, max_candidates=500))
    finally:
        torch.set_num_threads(threads)
    same(results[1], results[0]), same(results[2], results[0])


def test_thresholds_are_not_rounded(library):
    """0.7 as float32 is below 0.7, 0.3 above it."""
    pred = torch.tensor([10.0, 10, 5, 5, 0.0]).view(1, 5, 1)
    for t, passes in ((0.7, 0), (0.3, 1), (0.5, 0)):
        pred[0, 4] = t
        assert detect(pred, "v8-probs", 1, score_threshold=t).counts == passes
    pred[0, 4] = 0.0  # a logit of 0 is a probability of 0.5
    assert detect(pred, "v8", 1, score_threshold=0.5).counts == 0
    pred[0, 4] = 1e-30
    assert detect(pred, "v8", 1, score_threshold=0.5).counts == 1
    pred[0, 4] = 40.0  # a sigmoid of 1, which is not above 1
    assert detect(pred, "v8", 1, score_threshold=1.0).counts == 0
    assert detect(pred, "v8", 1, score_threshold=0.999999).scores[0, 0] == 1


def test_logits_keep_an_order_that_sigmoids_lose(library):
    """Sigmoids of 30 and 31 are both 1 in float32."""
    pred = torch.tensor([[10.0, 10], [10, 10], [5, 5], [5, 5], [30, 31]])[None]
    assert detect(pred, "v8", 1).boxes.shape == (1, 30, 4)
    pred[0, 0, 1] = 10.5
    assert detect(pred, "v8", 1).boxes[0, 0, 0] == 8


@heads
@flags
def test_registration(head, multi_label, device):
    pred = draw(head, 2, {"v1": 3, "v1-planar": 3}.get(head, 9), 3, torch.float16).to(device)
    opcheck(torch.ops.minkernels.yolo_detect.default, (pred, *options(head, 3, multi_label=multi_label, max_output=5)))


@heads
def test_compile_and_export(head, library):
    class Model(torch.nn.Module):
        def forward(self, pred):
            return tuple(detect(pred * 1.0, head))

    torch.compiler.reset()
    compiled = torch.compile(Model(), fullgraph=True, dynamic=True, backend="aot_eager")
    B = torch.export.Dim("B", min=2, max=100)
    program = torch.export.export(Model(), (draw(head, 3, 5, 5),), dynamic_shapes=[{0: B}]).module()
    for b in (4, 5):
        pred = draw(head, b, 5, 5)
        expected = Model()(pred)
        same(compiled(pred), expected)
        same(program(pred), expected)


def test_no_gradient_and_no_autocast(library):
    pred = draw("v8", 2, 50, 5)
    expected = detect(pred, "v8")
    copy = pred.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        result = detect(copy, "v8")
    same(result, expected)
    assert not any(t.requires_grad for t in result) and torch.equal(copy, pred)


V1, V8, PLANAR = torch.rand(2, 3, 3, 15), torch.rand(2, 9, 6), torch.rand(2, 135)
BAD = {
    "not a tensor": (dict(pred=[1.0]), TypeError, "pred must be a tensor, got list"),
    "dtype": (dict(pred=V8.int()), TypeError, "pred must be float16, bfloat16, float32 or float64, got torch.int32"),
    "head": (dict(head="v3"), ValueError, "head must be one of v1, v1-planar, v8, v8-probs, got 'v3'"),
    "channels": (dict(num_classes=4), ValueError, "pred of head 'v8' must be (B, 8, A): 4 + num_classes channels, got (2, 9, 6)"),
    "rank": (dict(pred=V8[0]), ValueError, "pred of head 'v8' must be (B, 9, A): 4 + num_classes channels, got (9, 6)"),
    "cell": (
        dict(pred=V1, head="v1", boxes_per_cell=3),
        ValueError,
        "pred of head 'v1' must be (B, S, S, 20): 5 * boxes_per_cell + num_classes = 20 values a cell, got (2, 3, 3, 15)",
    ),
    "grid": (dict(pred=V1[:, :2], head="v1"), ValueError, "pred of head 'v1' must be (B, S, S, 15)"),
    "planar": (dict(pred=PLANAR[:, :30], head="v1-planar"), ValueError, "pred of head 'v1-planar' must be (B, S * S * 15)"),
    "planar cell": (dict(pred=PLANAR[:, :134], head="v1-planar"), ValueError, "values a cell, got (2, 134)"),
    "planar rank": (dict(pred=PLANAR[0], head="v1-planar"), ValueError, "values a cell, got (135,)"),
    "no image_size": (dict(pred=V1, head="v1", image_size=None), ValueError, "image_size must be given for head 'v1'"),
    "image_size": (dict(image_size=0), ValueError, "image_size must be positive, got 0"),
    "image_size pair": (dict(image_size=(640, -1)), ValueError, "image_size must be positive, got (640, -1)"),
    "image_size triple": (dict(image_size=(3, 640, 640)), ValueError, "image_size must be a number or (height, width), got (3, 640, 640)"),
    "image_size type": (dict(image_size="640"), TypeError, "image_size must be a number, got '640'"),
    "image_size nan": (dict(image_size=math.nan), ValueError, "image_size must be finite, got nan"),
    "num_classes": (dict(num_classes=0), ValueError, "num_classes must be at least 1, got 0"),
    "boxes_per_cell": (dict(boxes_per_cell=0), ValueError, "boxes_per_cell must be at least 1, got 0"),
    "score_threshold": (dict(score_threshold=1.1), ValueError, "score_threshold must be 0 to 1, got 1.1"),
    "score_threshold nan": (dict(score_threshold=math.nan), ValueError, "score_threshold must be finite, got nan"),
    "iou_threshold": (dict(iou_threshold=-0.1), ValueError, "iou_threshold must be 0 to 1, got -0.1"),
    "iou_threshold nan": (dict(iou_threshold=math.nan), ValueError, "iou_threshold must be finite, got nan"),
    "max_output": (dict(max_output=0), ValueError, "max_output must be at least 1, got 0"),
    "max_output type": (dict(max_output=3.0), TypeError, "max_output must be an int, got 3.0"),
    "max_candidates": (dict(max_candidates=0), ValueError, "max_candidates must be at least 1, got 0"),
    "multi_label": (dict(multi_label=1), TypeError, "multi_label must be a bool, got 1"),
}


@pytest.mark.parametrize("change, error, message", BAD.values(), ids=BAD)
def test_bad_input(change, error, message, library):
    good = dict(pred=V8, head="v8", num_classes=5, image_size=640, score_threshold=0.5, iou_threshold=0.5, max_output=5)
    yolo_detect(**good)
    with pytest.raises(error, match=re.escape(message)):
        yolo_detect(**good | change)
