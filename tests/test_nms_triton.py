"""The Triton kernels of NMS against the reference, bit for bit: interpreted on a CPU (TRITON_INTERPRET=1), as they are on a GPU."""

import os

import pytest
import torch

from minkernels.nms import reference
from nms_cases import THRESHOLDS, clusters, fuzz, uniform

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not (INTERPRETED or torch.cuda.is_available()):
    pytest.skip("needs a CUDA device, or TRITON_INTERPRET=1 in a process of its own", allow_module_level=True)

from minkernels.nms import _triton  # noqa: E402  Triton reads TRITON_INTERPRET as it is imported

pytestmark = [pytest.mark.interpret, pytest.mark.filterwarnings("ignore::RuntimeWarning")]  # NumPy on inf - inf
DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture
def small(monkeypatch):
    """Small tiles, so that small inputs take every path."""
    for name, size in (("TILE", 64), ("AHEAD", 2), ("WORDS", 1), ("COLUMNS", 32), ("ROWS", 8)):
        monkeypatch.setattr(_triton, name, size)


def check(case, what=""):
    expected = reference.nms_padded(*case, True)
    on_device = [t.to(DEVICE) if isinstance(t, torch.Tensor) else t for t in case]
    for name, a, e in zip(("indices", "counts", "suppressor"), _triton.nms_padded(*on_device, True), expected, strict=True):
        assert torch.equal(a.cpu(), e), f"{what}: {name} of images {(a.cpu() != e).nonzero()[:, 0].unique()[:5].tolist()} ... differ"


@pytest.mark.parametrize("N", [1, 7, 64, 65, 130])
def test_fuzz(N, small):
    """500 cases."""
    for i in range(4):
        boxes, scores, class_ids = fuzz(25, N, DTYPES[i % len(DTYPES)], seed=N + i)
        options = THRESHOLDS[(N + i) % 8], [None, 0.0][i % 2], [N, max(1, N // 3)][i // 2]
        check((boxes, scores, None if i == 0 else class_ids, *options), f"{N}, {i}")


@pytest.mark.parametrize("max_output", [3, 60])
def test_tiles_as_they_are(max_output):
    """Two tiles of 1024, whose boxes come from clusters; the second is not full."""
    boxes, scores, class_ids = (t[None] for t in clusters(1200, 3))
    check((boxes, (scores * 50).round(), class_ids, 0.5, None, max_output))


def test_chain(small):
    """Box i suppresses i + 1 alone: as many rounds as there are rows, and through every tile."""
    N, left = 150, torch.arange(150.0)
    boxes = torch.stack([left, torch.zeros(N), left + 1.8, torch.ones(N)], 1)
    check((boxes[None], (1 - left / N)[None], None, 0.25, None, N))


def test_torchvisions_rule(small):
    """Nothing is dropped: a box with a NaN is kept, a NaN score sorts first."""
    for i in range(3):
        boxes, scores, class_ids = (t.flatten(0, 1) for t in fuzz(2, 30, seed=i))
        boxes[::9, i] = scores[::7] = torch.nan
        expected = reference.nms(boxes, scores, class_ids, 0.3)
        assert torch.equal(_triton.nms(*(t.to(DEVICE) for t in (boxes, scores, class_ids)), 0.3).cpu(), expected)


def test_nan_of_either_sign_sorts_first(small, monkeypatch):
    """Where the sort goes by bits, as radix sorts on a GPU may: it would put a NaN with the sign bit last."""

    def sort(t, dim, descending, stable):
        bits = t.view(torch.int32)
        order = torch.argsort(torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits), dim=dim, descending=True, stable=True)
        return torch.return_types.sort((t.gather(dim, order), order))

    boxes, scores, _ = uniform(20)
    scores[[3, 11]] = torch.tensor([-1, 0x7FC00000], dtype=torch.int32).view(torch.float32)
    expected = reference.nms(boxes, scores, None, 0.3)
    if INTERPRETED:
        monkeypatch.setattr(torch.Tensor, "sort", sort)
    assert torch.equal(_triton.nms(boxes.to(DEVICE), scores.to(DEVICE), None, 0.3).cpu(), expected)


def test_layouts_and_wide_classes(small):
    boxes, scores, ids = (t.unflatten(0, (2, 30)) for t in uniform(60, 4))
    apart = boxes.movedim(2, 0).contiguous().movedim(0, 2), scores.mT.contiguous().mT, (ids * 2**33).mT.contiguous().mT
    check((*apart, 0.4, None, 30))


def test_offsets_past_2_to_31(small):
    """The last coordinates lie more than 2**31 elements from the first; memory that is not touched costs nothing."""
    boxes, scores, _ = (t[None].to(DEVICE) for t in clusters(20, 1))
    far = torch.empty_strided(boxes.shape, (0, 1, 2**31 // 3 + 1), dtype=torch.float16, device=DEVICE).copy_(boxes)
    assert torch.equal(*(_triton.nms_padded(t, scores, None, 0.3, None, 20, False)[0] for t in (far, boxes.half())))


def test_nothing():
    for B, N in ((0, 3), (2, 0)):
        check((torch.empty(B, N, 4), torch.empty(B, N), None, 0.5, None, 4))


def test_launches(small, monkeypatch):
    """As many as launches() says, whatever the data."""
    counted = []
    for name in ("_rank_kernel", "_bits_kernel", "_resolve_kernel", "_push_kernel", "_suppressor_kernel"):
        kernel = getattr(_triton, name)
        proxy = type("Counted", (), {"__getitem__": lambda self, grid, k=kernel, n=name: counted.append(n) or k[grid]})()
        monkeypatch.setattr(_triton, name, proxy)
    for N in (5, 64, 65, 130):
        boxes, scores, _ = (t[None].to(DEVICE) for t in uniform(N))
        for wanted in (False, True):
            counted.clear()
            _triton.nms_padded(boxes, scores, None, 0.5, None, 2, wanted)
            assert len(counted) == _triton.launches(N, wanted) and counted.count("_resolve_kernel") == -(-N // 64)
