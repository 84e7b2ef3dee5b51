"""The Triton kernel of yolo_loss against the reference: interpreted on a CPU (TRITON_INTERPRET=1), as it is on a GPU."""

import math
import os

import pytest
import torch

from minkernels.yolo import reference
from yolo_cases import check_responsible, check_upstream, draw_targets

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not (INTERPRETED or torch.cuda.is_available()):
    pytest.skip("needs a CUDA device, or TRITON_INTERPRET=1 in a process of its own", allow_module_level=True)

from minkernels.yolo import _triton_loss  # noqa: E402  Triton reads TRITON_INTERPRET as it is imported

pytestmark = [pytest.mark.interpret, pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")]  # NumPy on inf - inf
DEVICE = "cpu" if INTERPRETED else "cuda"


def check(pred, boxes, classes, B, weights=(3.0, 0.3)):
    N, on_device, found, expected = len(pred), [t.to(DEVICE) for t in (pred, boxes, classes)], [], []
    for reduction, shape in (("none", (N,)), ("mean", ()), ("sum", ())):
        upstream = torch.linspace(-0.5, 1.5, max(N, 1))[:N] if shape else torch.tensor(1.3)
        args = *weights, reduction
        found.append(_triton_loss.loss_fwd(*on_device, B, *args))
        expected.append(reference.loss_fwd(pred, boxes, classes, B, *args))
        found.append(_triton_loss.loss_bwd(upstream.to(DEVICE), *on_device, B, *args))
        expected.append(reference.loss_bwd(upstream, pred, boxes, classes, B, *args))
        assert found[-1].stride() == torch.empty_like(on_device[0]).stride()
    for a, e in zip(found, expected, strict=True):
        eps, finite = torch.finfo(e.dtype).eps, e[e.isfinite()].abs()
        largest = finite.max().item() if finite.numel() else 0.0
        torch.testing.assert_close(a.cpu(), e, rtol=16 * eps, atol=8 * eps * largest, equal_nan=True)
    return expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(2, 4, 2, 5), (2, 9, 1, 1), (1, 1, 3, 17), (3, 2, 2, 40)], ids=str)  # N, K, B, C
def test_is_the_reference(shape, dtype):
    """One program an image, and two; classes in one tile, and three."""
    N, K, B, C = shape
    losses, *_ = check(torch.rand(N, K, K, 5 * B + C).to(dtype), *draw_targets(N, K, C), B)
    assert losses.min() > 0


def test_odd_values():
    """NaN and infinities make the same losses NaN, and no others; two equal boxes: the first."""
    pred, (boxes, classes) = torch.rand(12, 3, 3, 13), draw_targets(12, 3, 3)
    for value in (math.nan, math.inf, -math.inf):
        pred[torch.rand(pred.shape) < 0.004] = value
    losses, *_ = check(pred, boxes, classes, 2)
    assert 0 < losses.isnan().sum() < 12
    pred = torch.rand(2, 3, 3, 13)
    pred[..., 5:9] = pred[..., :4]
    check(pred, boxes[:2], classes[:2], 2)


def on_device(kernel):
    return lambda *args: kernel(*(t.to(DEVICE) if isinstance(t, torch.Tensor) else t for t in args)).cpu()


def test_the_responsible_box_and_upstreams():
    check_responsible(on_device(_triton_loss.loss_fwd), on_device(_triton_loss.loss_bwd))
    check_upstream(on_device(_triton_loss.loss_fwd), on_device(_triton_loss.loss_bwd))


def test_layouts_and_nothing():
    pred, (boxes, classes) = torch.rand(2, 4, 4, 13), draw_targets(2, 4, 3)
    strided = pred.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    check(strided, boxes.mT.contiguous().mT, classes.int().mT.contiguous().mT, 2)
    for shape in ((0, 4, 4, 13), (2, 0, 0, 13)):
        check(torch.rand(shape), torch.rand(*shape[:3], 4), torch.zeros(shape[:3], dtype=torch.int64), 2)


@pytest.mark.skipif(INTERPRETED, reason="needs a CUDA device")
@pytest.mark.gpu
def test_large():
    """At the sizes of a launch, without a wait for the device."""
    pred, (boxes, classes) = torch.rand(64, 28, 28, 90, device="cuda"), (t.cuda() for t in draw_targets(64, 28, 80))
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss = _triton_loss.loss_fwd(pred, boxes, classes, 2, 5.0, 0.5, "mean")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    exact = reference.loss_fwd(pred.cpu().double(), boxes.cpu().double(), classes.cpu(), 2, 5.0, 0.5, "mean")
    assert loss.item() == pytest.approx(exact.item(), rel=1e-5)
