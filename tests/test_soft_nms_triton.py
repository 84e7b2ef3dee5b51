"""The Triton kernels of Soft-NMS and Matrix NMS against the reference, bit for bit: interpreted on a CPU (TRITON_INTERPRET=1), as they are
on a GPU."""

import os

import pytest
import torch

from minkernels.soft_nms import reference
from soft_nms_cases import KINDS, draw

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not (INTERPRETED or torch.cuda.is_available()):
    pytest.skip("needs a CUDA device, or TRITON_INTERPRET=1 in a process of its own", allow_module_level=True)

from minkernels.soft_nms import _triton  # noqa: E402  Triton reads TRITON_INTERPRET as it is imported

pytestmark = [pytest.mark.interpret, pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")]  # NumPy on inf - inf
DEVICE = "cpu" if INTERPRETED else "cuda"
SIZES = [(0, 1, torch.float32, 3), (1, 1, torch.float32, 2), (13, 3, torch.float16, 20), (45, 1, torch.float32, 12)]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """So that few boxes take several blocks."""
    monkeypatch.setattr(_triton, "BLOCK", 16)
    monkeypatch.setattr(_triton, "COLUMNS", 32)


@pytest.mark.parametrize("op", ["soft_nms", "matrix_nms"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["linear", "gaussian"])
def test_is_the_reference(op, kind, method):
    for N, classes, dtype, max_output in SIZES:
        numbers = (0.3, 0.5, 0.25) if op == "soft_nms" else (2.0, 0.25)
        boxes, scores, class_ids = draw(kind, 3, N, classes, dtype)
        expected = getattr(reference, op)(boxes, scores, class_ids, method, *numbers, max_output)
        on_device = (None if t is None else t.to(DEVICE) for t in (boxes, scores, class_ids))
        actual = getattr(_triton, op)(*on_device, method, *numbers, max_output)
        for name, a, e in zip(("indices", "scores", "counts"), actual, expected, strict=True):
            assert a.dtype == e.dtype and torch.equal(a.cpu(), e), f"{name} of {N}: {a.tolist()} instead of {e.tolist()}"


@pytest.mark.skipif(INTERPRETED, reason="needs a CUDA device")
@pytest.mark.gpu
@pytest.mark.parametrize("op", ["soft_nms", "matrix_nms"])
@pytest.mark.parametrize("method", ["linear", "gaussian"])
def test_large(op, method, monkeypatch):
    """At the sizes of a launch, and without a wait for the device."""
    monkeypatch.undo()
    numbers = (0.3, 0.5, 0.01) if op == "soft_nms" else (2.0, 0.01)
    boxes, scores, class_ids = draw("clusters", 4, 5000, 3)
    expected = getattr(reference, op)(boxes, scores, class_ids, method, *numbers, 300)
    on_device = boxes.cuda(), scores.cuda(), class_ids.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        actual = getattr(_triton, op)(*on_device, method, *numbers, 300)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(a.cpu(), e) for a, e in zip(actual, expected, strict=True))
