"""Soft-NMS and Matrix NMS: the reference against the papers' loops, the C++ kernels against the reference bit for bit at every level,
the public ops' promises."""

import itertools
import math
import re

import pytest
import torch
from torch.library import opcheck

from minkernels import matrix_nms, soft_nms
from minkernels.soft_nms import reference
from minkernels.soft_nms._options import below
from soft_nms_cases import KINDS, draw

both = pytest.mark.parametrize("op", [soft_nms, matrix_nms], ids=lambda op: op.__name__)
methods = pytest.mark.parametrize("method", ["linear", "gaussian"])


def same(actual, expected, what=""):
    for name, a, e in zip(("indices", "scores", "counts"), actual, expected, strict=True):
        assert a.dtype == e.dtype and torch.equal(a, e), f"{what} {name}: {a.tolist()} instead of {e.tolist()}"


# The reference is what the papers say.


def plain_iou(a, b):
    w, h = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    both = max(w, 0.0) * max(h, 0.0)
    return both / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both)


def plain_soft_nms(boxes, scores, classes, decay, min_score):
    """Algorithm 1 of arXiv:1704.04503, in Python's floats."""
    left, kept = dict(enumerate(scores)), []
    while left:
        m = max(left, key=lambda i: (left[i], -i))
        score = left.pop(m)
        if score <= min_score:
            break
        kept.append((m, score))
        left = {i: s * decay(plain_iou(boxes[m], boxes[i])) if classes[i] == classes[m] else s for i, s in left.items()}
    return kept


def plain_matrix_nms(boxes, scores, classes, f, min_score):
    """Equations 3 to 5 of arXiv:2003.10152."""
    new, worst, order = {}, {}, sorted(range(len(scores)), key=lambda i: -scores[i])
    for rank, j in enumerate(order):
        above = {i: plain_iou(boxes[i], boxes[j]) for i in order[:rank] if classes[i] == classes[j]}
        worst[j] = max(above.values(), default=0.0)
        new[j] = scores[j] * min((f(x) / f(worst[i]) for i, x in above.items()), default=1.0)
    return sorted(((i, s) for i, s in new.items() if s > min_score), key=lambda x: -x[1])


@methods
@pytest.mark.parametrize("op", ["soft_nms", "matrix_nms"])
@pytest.mark.parametrize("classes", [1, 3])
def test_reference_is_the_paper(op, method, classes):
    torch.manual_seed(1)
    boxes, scores, class_ids = draw("clusters", 2, 40, classes, torch.float64)
    if op == "soft_nms":
        decay = (lambda x: 1 - x if x > 0.3 else 1.0) if method == "linear" else (lambda x: math.exp(-(x**2) / 0.4))
        plain, options = plain_soft_nms, (method, 0.3, 0.4, 0.05, 50)
    else:
        decay = (lambda x: 1 - x) if method == "linear" else (lambda x: math.exp(-1.5 * x**2))
        plain, options = plain_matrix_nms, (method, 1.5, 0.05, 50)
    indices, new, counts = getattr(reference, op)(boxes, scores, class_ids, *options)
    for b in range(2):
        ids = [0] * 40 if class_ids is None else class_ids[b].tolist()
        expected = plain(boxes[b].tolist(), scores[b].tolist(), ids, decay, 0.05)
        assert 0 < len(expected) == counts[b] < 40
        assert indices[b].tolist() == [i for i, _ in expected] + [-1] * (50 - len(expected))
        torch.testing.assert_close(new[b, : counts[b]], torch.tensor([s for _, s in expected], dtype=torch.float64), rtol=1e-13, atol=0)
        assert not new[b, counts[b] :].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_exponential(dtype):
    u = torch.cat([torch.linspace(0, 80, 100_001, dtype=dtype), torch.tensor([0.0, 87.5, 709.0, math.inf], dtype=dtype)])
    ours, exact = reference.exp_of_minus(u), (-u.double()).exp()
    assert ours[0] == 1 and (ours[-2:] == 0).all()
    assert ((ours.double() - exact).abs() / exact)[:-4].max() < 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize("x", [0.0, 0.1, 0.2, 0.3, 0.5, 1e-3, 1.0, 1e-50, -1e-50, -0.2, -math.inf, math.inf, -1.0986122886681098])
def test_below(x):
    rounded = torch.tensor(below(x, torch.float32), dtype=torch.float32)
    assert rounded.item() == below(x, torch.float32) and rounded.item() <= x
    assert math.isinf(x) or rounded.nextafter(torch.tensor(math.inf)).item() > x
    assert below(x, torch.float64) == x


# The C++ kernels: bit for bit.


OPTIONS = {  # each ends early, late or never
    "soft_nms": [(0.3, 0.5, 0.25), (0.0, 0.05, 0.0), (0.5, 2.0, 1e-3)],
    "matrix_nms": [(2.0, 0.25), (0.5, 0.0)],
}


@pytest.mark.parametrize("op", OPTIONS)
@pytest.mark.parametrize("kind", KINDS)
@methods
def test_cpu(op, kind, method, levels):
    """N: none, one, less than a register, more, many; max_output 1, some, more than there are."""
    from minkernels.soft_nms import _cpu

    cases = []
    for i, (N, classes) in enumerate([(0, 1), (1, 1), (2, 3), (17, 1), (65, 3), (130, 1)]):
        dtype = (torch.float32, torch.float64, torch.bfloat16, torch.float16)[i % 4] if N != 130 else torch.float32
        boxes, scores, class_ids = draw(kind, 7, N, classes, dtype)
        for numbers, max_output in zip(OPTIONS[op], (N + 3, 7, 1), strict=False):
            args = boxes, scores, class_ids, method, *numbers, max_output
            cases.append((args, getattr(reference, op)(*args)))
    for level in levels:
        for args, expected in cases:
            same(getattr(_cpu, op)(*args), expected, f"{level} {args[3:]} of {args[0].shape} {args[0].dtype}")


@both
@methods
def test_fuzz(op, method, library):
    """Many small images, as they differ most."""
    for seed, kind in itertools.product(range(8), KINDS):
        torch.manual_seed(seed)
        N, dtype = int(torch.randint(1, 40, ())), torch.float64 if seed == 7 else torch.float32
        boxes, scores, class_ids = draw(kind, 40, N, 1 + seed % 3, dtype)
        numbers = dict(min_score=float(torch.rand(()) / 4), sigma=float(0.1 + torch.rand(())), max_output=1 + N // (1 + seed % 2))
        threshold = float(torch.randint(0, 5, ()) / 4) if op is soft_nms else None
        options = (method, *([threshold] if op is soft_nms else []), numbers["sigma"], numbers["min_score"], numbers["max_output"])
        more = dict(iou_threshold=threshold) if op is soft_nms else {}
        actual = op(boxes, scores, class_ids=class_ids, method=method, **numbers, **more)
        same(actual, getattr(reference, op.__name__)(boxes, scores, class_ids, *options), f"{kind}, seed {seed}")


@both
def test_threads_change_nothing(op, library):
    boxes, scores, class_ids = draw("clusters", 9, 300, 3)
    results, threads = [], torch.get_num_threads()
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            results.append(op(boxes, scores, class_ids=class_ids, min_score=0.01, max_output=300))
    finally:
        torch.set_num_threads(threads)
    assert results[0].counts.min() > 50
    same(results[1], results[0]), same(results[2], results[0])


@both
def test_layouts(op, library):
    boxes, scores, class_ids = draw("clusters", 3, 50, 3)
    expected = op(boxes, scores, class_ids=class_ids, min_score=0.01, max_output=50)
    strided = boxes.permute(2, 1, 0).contiguous().permute(2, 1, 0), scores.T.contiguous().T, class_ids.repeat_interleave(2, 1)[:, ::2]
    same(op(strided[0], strided[1], class_ids=strided[2], min_score=0.01, max_output=50), expected)
    narrow = (class_ids % 5).to(torch.uint8)
    wide = op(boxes, scores, class_ids=narrow.long(), min_score=0.01, max_output=50)
    same(op(boxes, scores, class_ids=narrow, min_score=0.01, max_output=50), wide)


def test_thresholds_are_not_rounded(library):
    """0.2 as float32 is above 0.2: an IoU of float32(0.2) is above the threshold, and so is such a score."""
    boxes = torch.tensor([[0.0, 0, 3, 1], [2.0, 0, 5, 1]])[None]  # 1 / 5
    assert soft_nms(boxes, torch.tensor([[0.9, 0.8]]), iou_threshold=0.2, max_output=2).scores[0, 1] == 0.8 * (1 - torch.tensor(0.2))
    exactly = boxes.double()
    assert soft_nms(exactly, torch.tensor([[0.9, 0.8]], dtype=torch.float64), iou_threshold=0.2, max_output=2).scores[0, 1] == 0.8
    assert soft_nms(boxes, torch.tensor([[0.2, 0.1]]), min_score=0.2, max_output=2).counts == 1
    assert soft_nms(boxes, torch.tensor([[0.25, 0.1]]), min_score=0.25, max_output=2).counts == 0


def test_matrix_nms_of_copies(library):
    """The second of three equal boxes has c = 1 and lowers nothing: the first one puts out both."""
    boxes = torch.tensor([[0.0, 0, 10, 10]]).expand(3, 4)[None]
    result = matrix_nms(boxes, torch.tensor([[0.7, 0.9, 0.8]]), method="linear", min_score=0.0, max_output=3)
    assert result.indices.tolist() == [[1, -1, -1]] and result.counts.tolist() == [1]


# The public ops under PyTorch's machinery.


@both
@methods
@pytest.mark.parametrize("classes", [1, 3])
def test_registration(op, method, classes, device):
    boxes, scores, class_ids = (None if t is None else t.to(device) for t in draw("clusters", 2, 20, classes, torch.float16))
    numbers = (0.3, 0.5, 0.01) if op is soft_nms else (2.0, 0.01)
    opcheck(getattr(torch.ops.minkernels, op.__name__).default, (boxes, scores, class_ids, method, *numbers, 9))


@both
def test_compile_and_export(op, library):
    class Model(torch.nn.Module):
        def forward(self, boxes, scores):
            return tuple(op(boxes * 2, scores, min_score=0.01, max_output=9))

    torch.compiler.reset()
    compiled = torch.compile(Model(), fullgraph=True, dynamic=True, backend="aot_eager")
    N = torch.export.Dim("N", min=2, max=100)
    program = torch.export.export(Model(), draw("clusters", 2, 20, 1)[:2], dynamic_shapes=[{1: N}] * 2).module()
    for n in (20, 31):
        boxes, scores, _ = draw("clusters", 2, n, 1)
        expected = Model()(boxes, scores)
        same(compiled(boxes, scores), expected)
        same(program(boxes, scores), expected)


@both
def test_no_gradient_and_no_autocast(op, library):
    boxes, scores, _ = draw("clusters", 2, 20, 1)
    expected = op(boxes, scores, min_score=0.01, max_output=9)
    with torch.autocast("cpu", torch.bfloat16):
        result = op(boxes.clone().requires_grad_(), scores.clone().requires_grad_(), min_score=0.01, max_output=9)
    same(result, expected)
    assert not result.scores.requires_grad


@both
def test_inputs_stay(op, library):
    boxes, scores, class_ids = draw("odd", 2, 20, 3)
    copies = boxes.clone(), scores.clone(), class_ids.clone()
    op(boxes, scores, class_ids=class_ids, min_score=0.01, max_output=9)
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip((boxes, scores, class_ids), copies, strict=True))


BOXES, SCORES = torch.rand(2, 5, 4), torch.rand(2, 5)
BAD = {
    "not a tensor": (dict(boxes=[1.0]), TypeError, "boxes must be a tensor, got list"),
    "boxes dtype": (dict(boxes=BOXES.int()), TypeError, "boxes must be float16, bfloat16, float32 or float64, got torch.int32"),
    "boxes rank": (dict(boxes=BOXES[0]), ValueError, "boxes must be (B, N, 4), got (5, 4)"),
    "five numbers": (dict(boxes=torch.rand(2, 4, 5)), ValueError, "boxes must be (B, N, 4), got (2, 4, 5)"),
    "scores dtype": (dict(scores=SCORES.long()), TypeError, "scores must be float16, bfloat16, float32 or float64, got torch.int64"),
    "scores shape": (dict(scores=SCORES[:1]), ValueError, "scores must be (2, 5) to fit boxes (2, 5, 4), got (1, 5)"),
    "scores device": (dict(scores=SCORES.to("meta")), TypeError, "scores is on meta, but boxes is on cpu"),
    "class_ids dtype": (dict(class_ids=SCORES), TypeError, "class_ids must be int64, int32, int16, int8 or uint8, got torch.float32"),
    "class_ids shape": (dict(class_ids=torch.zeros(5).long()), ValueError, "class_ids must be (2, 5) to fit boxes (2, 5, 4), got (5,)"),
    "class_ids device": (dict(class_ids=SCORES.long().to("meta")), TypeError, "class_ids is on meta, but boxes is on cpu"),
    "method": (dict(method="hard"), ValueError, "method must be one of linear, gaussian, got 'hard'"),
    "sigma": (dict(sigma=0.0), ValueError, "sigma must be 1e-30 to 1e30, got 0.0"),
    "sigma nan": (dict(sigma=math.nan), ValueError, "sigma must be finite, got nan"),
    "min_score": (dict(min_score=-0.1), ValueError, "min_score must be 0 to 1, got -0.1"),
    "min_score nan": (dict(min_score=math.nan), ValueError, "min_score must be finite, got nan"),
    "max_output": (dict(max_output=0), ValueError, "max_output must be at least 1, got 0"),
    "max_output type": (dict(max_output=1.0), TypeError, "max_output must be an int, got 1.0"),
}
BAD_SOFT = {
    "iou_threshold": (dict(iou_threshold=1.5), ValueError, "iou_threshold must be 0 to 1, got 1.5"),
    "iou_threshold type": (dict(iou_threshold="a"), TypeError, "iou_threshold must be a number, got 'a'"),
}
BAD_CASES = [(op, *case) for op, cases in ((soft_nms, BAD | BAD_SOFT), (matrix_nms, BAD)) for case in cases.values()]
BAD_IDS = [f"{name}-{case}" for name, cases in (("soft", BAD | BAD_SOFT), ("matrix", BAD)) for case in cases]


@pytest.mark.parametrize("op, change, error, message", BAD_CASES, ids=BAD_IDS)
def test_bad_input(op, change, error, message, library):
    good = dict(boxes=BOXES, scores=SCORES, min_score=0.01, max_output=5)
    op(**good)
    with pytest.raises(error, match=re.escape(message)):
        op(**good | change)
