"""The Triton kernels of yolo_detect against the reference, bit for bit: interpreted on a CPU (TRITON_INTERPRET=1), as they are on a GPU."""

import os

import pytest
import torch

from minkernels.yolo import reference
from minkernels.yolo._options import Options
from yolo_cases import HEADS, draw

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not (INTERPRETED or torch.cuda.is_available()):
    pytest.skip("needs a CUDA device, or TRITON_INTERPRET=1 in a process of its own", allow_module_level=True)

from minkernels.nms import _triton as nms  # noqa: E402  Triton reads TRITON_INTERPRET as it is imported
from minkernels.yolo import _triton  # noqa: E402

pytestmark = [pytest.mark.interpret, pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")]  # NumPy on inf - inf
DEVICE = "cpu" if INTERPRETED else "cuda"


def options(head, C, **changes):
    x = dict(
        head=head, boxes_per_cell=2, num_classes=C, height=60.0, width=80.0, sqrt_wh=True, score_threshold=0.4, iou_threshold=0.45,
        max_output=10, class_agnostic=False, multi_label=False, max_candidates=30000,
    )  # fmt: skip
    return Options(**{**x, **changes})


def check(pred, x):
    expected = reference.detect(pred, *x)
    for name, a, e in zip(("boxes", "scores", "classes", "counts"), _triton.detect(pred.to(DEVICE), *x), expected, strict=True):
        assert a.dtype == e.dtype and torch.equal(a.cpu(), e), f"{name}: {a.tolist()} instead of {e.tolist()} of {x}"
    return expected


@pytest.fixture
def small_blocks(monkeypatch):
    """So that few places take several blocks."""
    for module, name, size in ((_triton, "BLOCK", 16), (_triton, "ROWS", 2), (nms, "TILE", 64), (nms, "COLUMNS", 64)):
        monkeypatch.setattr(module, name, size)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("multi_label", [False, True], ids=["best", "multi"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_is_the_reference(head, multi_label, dtype, small_blocks):
    """All candidates fit; and some of them alone, ties at the lowest score among them; and images with fewer than fit."""
    size = 3 if head.startswith("v1") else 21
    pred = draw(head, 2, size, 3, dtype, odd=True, ties=True)
    pred[1].masked_fill_(torch.rand(pred[1].shape) < 0.6, -3.0)
    plain = check(pred, options(head, 3, multi_label=multi_label, sqrt_wh=dtype == torch.float32))
    assert plain[3].max() > 2
    check(pred, options(head, 3, multi_label=multi_label, max_candidates=5, class_agnostic=True))


@pytest.mark.parametrize("multi_label", [False, True], ids=["best", "multi"])
def test_choice_of_candidates(multi_label, small_blocks):
    """Scores that differ in each of the digits of the select, of both signs; every number that may enter."""
    pred = draw("v8", 3, 19, 2)
    pred[1, 4:] = pred[1, 4:].abs() * 2.0 ** torch.randint(-40, 9, (2, 19))
    pred[2, 4:] = (1000 * pred[2, 4:]).round() / 2**16
    for most in (1, 7, 18):
        check(pred, options("v8", 2, multi_label=multi_label, score_threshold=0.1, iou_threshold=1.0, max_output=40, max_candidates=most))


def test_nothing(small_blocks):
    check(draw("v8", 0, 5, 3), options("v8", 3))
    check(draw("v8", 2, 0, 3), options("v8", 3, multi_label=True))
    check(draw("v8", 2, 5, 3), options("v8", 3, score_threshold=1.0))


def test_layouts(small_blocks):
    pred = draw("v8", 2, 21, 3)
    expected, x = check(pred, options("v8", 3)), options("v8", 3)
    strided = pred.permute(2, 0, 1).contiguous().permute(1, 2, 0).to(DEVICE)
    assert all(torch.equal(a.cpu(), e) for a, e in zip(_triton.detect(strided, *x), expected, strict=True))


@pytest.mark.parametrize("most", [5, 2])
def test_offsets_past_2_to_31(most, small_blocks):
    """The height and the score lie more than 2**31 elements from the centre; memory that is not touched costs nothing."""
    pred = draw("v8", 1, 5, 1, torch.float16)
    far = torch.empty_strided(pred.shape, (0, 2**31 // 3 + 1, 1), dtype=pred.dtype, device=DEVICE).copy_(pred)
    for x in (options("v8", 1, multi_label=multi_label, max_candidates=most) for multi_label in (False, True)):
        assert all(torch.equal(a.cpu(), e) for a, e in zip(_triton.detect(far, *x), reference.detect(pred, *x), strict=True))


@pytest.mark.skipif(INTERPRETED, reason="needs a CUDA device")
@pytest.mark.gpu
@pytest.mark.parametrize("multi_label", [False, True], ids=["best", "multi"])
def test_large(multi_label):
    """At the sizes of a launch, without a wait for the device; more candidates than enter."""
    pred = draw("v8", 4, 8400, 80)
    x = options("v8", 80, score_threshold=0.7, max_output=300, multi_label=multi_label)
    expected, on_device = reference.detect(pred, *x), pred.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        actual = _triton.detect(on_device, *x)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(a.cpu(), e) for a, e in zip(actual, expected, strict=True))
