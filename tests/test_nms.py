"""NMS: the reference against a plain greedy loop, the C++ kernels against the reference at every level, and the public ops' promises."""

import math

import pytest
import torch
from torch.library import opcheck

from bench import plain_nms
from minkernels import batched_nms, nms, nms_padded
from minkernels.nms import reference
from minkernels.nms._common import round_down
from nms_cases import DATA, THRESHOLDS, check_suppressor, clusters, fuzz, oracle, sparse, uniform

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
NAN, INF = math.nan, math.inf


def assert_same(actual, expected, what=""):
    for name, a, e in zip(("indices", "counts", "suppressor"), actual, expected, strict=True):
        assert torch.equal(a, e), f"{what}: {name} of images {(a != e).nonzero()[:, 0].unique()[:5].tolist()} ... differ"


def sweep(cases, sizes):
    """Fuzz cases, some of each size, and every option in turn."""
    for i, N in enumerate(sizes):
        dtype, t = DTYPES[i % 4], THRESHOLDS[i % len(THRESHOLDS)]
        boxes, scores, class_ids = fuzz(cases // len(sizes), N, dtype, seed=i)
        yield boxes, scores, None if i % 3 == 0 else class_ids, t, [None, -0.5, 0.3][i % 3], [N, 1, max(1, N // 2)][i // 2 % 3]


# The reference, and C++ against it


def test_reference_is_the_greedy_loop():
    for case in sweep(400, [1, 2, 5, 9, 17, 8, 12, 30]):
        boxes, scores, class_ids, t, score_threshold, max_output = case
        result = reference.nms_padded(*case, True)
        for b in range(len(boxes)):
            classes = None if class_ids is None else class_ids[b]
            kept = oracle(boxes[b], scores[b], classes, t, score_threshold, max_output)
            indices, count, suppressor = (r[b] for r in result)
            assert count == len(kept) and torch.equal(indices[:count], kept) and (indices[count:] == -1).all()
            check_suppressor((indices, count, suppressor), boxes[b], scores[b], classes, t, score_threshold)
            kept = oracle(boxes[b], scores[b], classes, t, drop=False)
            assert torch.equal(reference.nms(boxes[b], scores[b], classes, t), kept)


def test_cpu_fuzz(levels):
    """10,000 cases at every level."""
    from minkernels.nms import _cpu

    expected = {}
    for level in levels:
        for i, case in enumerate(sweep(10_000, [0, 1, 2, 3, 5, 9, 16, 17, 12, 20, 7, 30, 33, 40, 11, 25])):
            if i not in expected:
                expected[i] = reference.nms_padded(*case, True)
            assert_same(_cpu.nms_padded(*case, True), expected[i], f"{level}, sweep {i}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cpu_fuzz_of_torchvisions_rule(dtype, levels):
    """A box or a score with a NaN is not dropped."""
    from minkernels.nms import _cpu

    cases = [(b, s, c) for i, N in enumerate((13, 30)) for b, s, c in zip(*fuzz(40, N, dtype, seed=100 + i), strict=True)]
    expected = [reference.nms(*case, THRESHOLDS[i % 8]) for i, case in enumerate(cases)]
    for level in levels:
        for i, case in enumerate(cases):
            assert torch.equal(_cpu.nms(*case, THRESHOLDS[i % 8]), expected[i]), f"{level}, case {i}"


SIZES = [0, 1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 1000, 4500]  # about a register, a sort by insertion, a digit, and a task


@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cpu_sizes(data, dtype, levels):
    cases = []
    for N in SIZES:
        boxes, scores, idxs = (t.to(dtype) if t.is_floating_point() else t for t in DATA[data](N, 80))
        acc = boxes.to(torch.promote_types(dtype, torch.float32))
        for t in (0.3, 0.5, 0.7):
            cases.append((boxes, scores, idxs, t, plain_nms.nms(acc, scores, t), plain_nms.nms_per_class(acc, scores, idxs, t)))
    for level in levels:
        for boxes, scores, idxs, t, kept, kept_by_class in cases:
            assert torch.equal(nms(boxes, scores, t), kept), f"{level}, N {len(boxes)}, threshold {t}"
            assert torch.equal(batched_nms(boxes, scores, idxs, t), kept_by_class), f"{level}, N {len(boxes)}, threshold {t}"


@pytest.mark.parametrize("max_output", [1, 300, 5000])
@pytest.mark.parametrize("classes", [None, 7], ids=["one-class", "classes"])
def test_cpu_stops_early(max_output, classes, levels):
    """Work goes in waves: 1024 boxes or four times max_output, then four times as many."""
    from minkernels.nms import _cpu

    boxes, scores, class_ids = (t[None] for t in uniform(6000, 7))
    scores = (scores * 500).round()  # ties
    case = boxes, scores, class_ids if classes else None, 0.9 if max_output > 300 else 0.2, None, max_output
    expected = reference.nms_padded(*case, True)
    for level in levels:
        assert_same(_cpu.nms_padded(*case, True), expected, level)


def test_cpu_same_bits_for_any_number_of_threads(library):
    threads, results = torch.get_num_threads(), []
    one, many, few = clusters(30_000, 1), uniform(30_000, 80), [t.unflatten(0, (12, 500)) for t in clusters(6000, 5)]
    try:
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            padded = dict(iou_threshold=0.5, return_suppressor=True)
            results.append([
                nms(*one[:2], 0.5), batched_nms(*many, 0.5),
                *nms_padded(*few[:2], class_ids=few[2], max_output=200, **padded),
                *nms_padded(*(t[None] for t in many[:2]), class_ids=many[2][None], max_output=3000, **padded),
            ])  # fmt: skip
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))
    assert torch.equal(results[0][0], plain_nms.nms(*one[:2], 0.5)) and torch.equal(results[0][1], plain_nms.nms_per_class(*many, 0.5))


# Cases that must hold, on the reference and on C++ at every level


@pytest.fixture(params=["reference", "cpu"])
def roads(request, levels):
    """Yields (nms, nms_padded) of the road, at each level."""

    def each():
        if request.param == "reference":
            yield reference.nms, reference.nms_padded
            return
        from minkernels.nms import _cpu

        for _ in levels:
            yield _cpu.nms, _cpu.nms_padded

    return each()


def pair(inter, whole, dtype=torch.float32):
    """Two boxes of area `whole` together whose intersection is `inter`: one lies within the other, side by side along x."""
    return torch.tensor([[0, 0, whole, 1], [0, 0, inter, 1]], dtype=dtype), torch.tensor([2, 1], dtype=dtype)


def test_an_iou_equal_to_the_threshold_is_kept(roads):
    for road, _ in roads:
        for a, b in ((1, 2), (1, 4), (3, 4), (1, 1)):
            assert len(road(*pair(a, b), None, a / b)) == 2
            assert len(road(*pair(a, b), None, a / b - 1e-7)) == 1
        assert len(road(*pair(0, 1), None, 0.0)) == 2


def test_thresholds_between_two_floats(roads):
    """torchvision's CPU compares a float IoU with a double threshold: float(0.2) > 0.2 goes, float(0.7) < 0.7 stays."""
    for road, _ in roads:
        for a, b in ((1, 5), (7, 10), (1, 3), (2, 3), (1, 10), (3, 10), (9, 10), (5, 7)):
            iou = float(torch.tensor(float(a)) / b)
            for t in (a / b, iou, math.nextafter(iou, 0), math.nextafter(iou, 1), math.nextafter(a / b, 0), math.nextafter(a / b, 1)):
                assert len(road(*pair(a, b), None, t)) == (1 if iou > t else 2), (a, b, t)
                assert len(road(*pair(a, b, torch.float64), None, t)) == (1 if a / b > t else 2), (a, b, t)


def test_round_down():
    for x in (0.0, 0.1, 0.2, 0.5, 0.7, 1.0, -0.1, -0.7, 1e-300, -1e-300, 3e38, 1e300, -1e300, 1e-45, 2.1e-45):
        f, nearest = round_down(x), torch.tensor(x, dtype=torch.float32)
        assert f == float(torch.tensor(f, dtype=torch.float32)) and f <= x
        assert f in (float(nearest), float(torch.nextafter(nearest, torch.tensor(-INF))))
        assert float(torch.nextafter(torch.tensor(f), torch.tensor(INF))) > x


def test_equal_scores_keep_the_lowest_index(roads):
    boxes = clusters(700)[0]
    for road, padded in roads:
        for value in (0.0, 0.5, -INF, INF):
            scores = torch.full((700,), value)
            scores[::3] *= -1 if value == 0 else 1  # -0 is 0
            expected = plain_nms.nms(boxes, scores, 0.5)
            assert torch.equal(expected, expected.sort().values)
            assert torch.equal(road(boxes, scores, None, 0.5), expected)
            assert torch.equal(padded(boxes[None], scores[None], None, 0.5, None, 10, False)[0][0], expected[:10])


def test_equal_boxes_leave_one(roads):
    boxes = torch.tensor([[1.0, 2, 3, 5]]).expand(3000, 4)  # no memory of its own
    scores = torch.rand(3000)
    best = int(scores.argmax())
    for road, padded in roads:
        assert road(boxes, scores, None, 0.5).tolist() == [best]
        assert len(road(boxes, scores, None, 1.0)) == 3000
        indices, counts, suppressor = padded(boxes[None], scores[None], None, 0.5, None, 3, True)
        assert indices.tolist() == [[best, -1, -1]] and counts.tolist() == [1]
        suppressor[0, best] += best + 1
        assert (suppressor == best).all()


def test_a_chain_of_10000(roads):
    """Box i overlaps with i + 1 alone: every second one stays, each decided by the one before."""
    N, left = 10_000, torch.arange(10_000.0)
    boxes = torch.stack([left, torch.zeros(N), left + 1.8, torch.ones(N)], 1)
    scores, mix = 1 - left / N, torch.randperm(N)
    expected = torch.arange(0, N, 2)
    for road, padded in roads:
        assert torch.equal(mix[road(boxes[mix], scores[mix], None, 0.25)], expected)
        _, counts, suppressor = padded(boxes[None], scores[None], None, 0.25, None, N, True)
        assert counts.tolist() == [N // 2] and torch.equal(suppressor[0, 1::2], expected) and (suppressor[0, ::2] == -1).all()


def test_nan_and_inf(roads):
    big = [0, 0, 10, 10]
    boxes = torch.tensor([big, [NAN, 0, 10, 10], big, [0, 0, INF, 10], [-INF, -INF, INF, INF], big, [0, 0, 10, NAN]])
    scores = torch.tensor([0.5, 0.9, NAN, 0.6, 0.7, INF, -INF])
    for road, padded in roads:
        assert road(boxes, scores, None, 0.5).tolist() == plain_nms.nms(boxes, scores, 0.5).tolist() == [2, 1, 4, 3, 6]
        indices, _, suppressor = padded(boxes[None], scores[None], None, 0.5, None, 7, True)
        assert indices.tolist() == [[5, 4, 3, -1, -1, -1, -1]] and suppressor.tolist() == [[5, -2, -2, -1, -1, -1, -2]]
        for threshold, kept in ((0.6, [5, 4, 3]), (float(scores[3]), [5, 4])):  # float32(0.6) > 0.6
            indices, counts, _ = padded(boxes[None], scores[None], None, 0.5, threshold, 7, False)
            assert indices[0, : counts[0]].tolist() == kept


def test_boxes_without_area_are_kept(roads):
    flat = [[3, 3, 3, 3], [3, 3, 3, 3], [0, 0, 0, 5], [0, 0, 0, 5], [5, 5, 1, 1], [5, 5, 1, 1], [1, 5, 5, 1]]
    boxes, scores = torch.tensor([*flat, [-4, -4, -1, -1], [-4, -4, -1, -1.1]]), torch.arange(9, 0, -1.0)
    for road, _ in roads:
        for t in (0.0, 0.5):
            assert road(boxes, scores, None, t).tolist() == plain_nms.nms(boxes, scores, t).tolist() == list(range(8))


def test_subnormal_areas(roads):
    """Where t * union underflows, products lie: 1 / 3 of the smallest number is not 1 / 3 any more."""
    for unit in (2.0**-149, 2.0**-140, 2.0**-126, 2.0**-75, 2.0**-64):
        boxes = torch.rand(300, 4).mul(7).floor().cumsum(1)[:, [0, 1, 2, 3]] * torch.tensor([1, unit, 1, unit])
        scores = torch.rand(300)
        for road, _ in roads if unit == 2.0**-149 else [(reference.nms, None), (lambda *args: nms(args[0], args[1], args[3]), None)]:
            for t in (0.0, 0.2, 0.3, 0.5, 0.9):
                assert torch.equal(road(boxes, scores, None, t), plain_nms.nms(boxes, scores, t)), (unit, t)


@pytest.mark.parametrize("scale", [3, 2**31, 2**62 // 100, -(2**33)])
def test_class_ids(scale, roads):
    boxes, scores, kinds = uniform(1500, 200)
    ids = (kinds - 100) * scale
    expected = plain_nms.nms_per_class(boxes, scores, kinds, 0.5)
    for road, padded in roads:
        assert torch.equal(road(boxes, scores, ids, 0.5), expected)
        assert torch.equal(padded(boxes[None], scores[None], ids[None], 0.5, None, 1500, False)[0][0, : len(expected)], expected)


def test_class_ids_of_every_size(library):
    boxes, scores, kinds = clusters(20_000, 1203)  # LVIS
    assert torch.equal(batched_nms(boxes, scores, kinds, 0.5), plain_nms.nms_per_class(boxes, scores, kinds, 0.5))
    boxes, scores, kinds = (t[:500] for t in (boxes, scores, kinds % 100))
    expected = plain_nms.nms_per_class(boxes, scores, kinds, 0.5)
    for dtype in (torch.int32, torch.int16, torch.int8, torch.uint8):
        assert torch.equal(batched_nms(boxes, scores, kinds.to(dtype), 0.5), expected)
    ends = torch.tensor([-(2**63), 2**63 - 1, 0, -1])[kinds % 4]
    assert torch.equal(batched_nms(boxes, scores, ends, 0.5), plain_nms.nms_per_class(boxes, scores, kinds % 4, 0.5))
    own = torch.arange(500) * 2**40
    assert torch.equal(batched_nms(boxes, scores, own, 0.0), scores.argsort(descending=True, stable=True))


def test_layouts(roads):
    boxes, scores, ids = (t.unflatten(0, (3, 50)) for t in uniform(150, 4))
    expected = reference.nms_padded(boxes, scores, ids, 0.5, None, 50, True)
    apart = boxes.movedim(2, 0).contiguous().movedim(0, 2), scores.mT.contiguous().mT, ids.mT.contiguous().mT  # planes
    rows = torch.cat([ids[..., None], boxes, scores[..., None]], -1)  # as they leave a head that writes all of a box in a row
    within = rows[..., 1:5], rows[..., 5], rows[..., 0].long()
    for _, padded in roads:
        for b, s, c in (apart, within):
            assert not b.is_contiguous() and not s.is_contiguous()
            assert_same(padded(b, s, c, 0.5, None, 50, True), expected)
        shared = padded(boxes[:1].expand(3, 50, 4), scores, ids[:1].expand(3, 50), 0.5, None, 50, False)
        one = padded(boxes[:1].repeat(3, 1, 1), scores, ids[:1].repeat(3, 1), 0.5, None, 50, False)
        assert_same(shared, one)


def test_strides_beyond_2_to_31(library):
    """Memory that is not touched costs nothing."""
    boxes, scores, _ = uniform(40)
    far = torch.empty_strided((40, 4), (2**27 + 4, 1), dtype=torch.float16).copy_(boxes)
    assert torch.equal(nms(far, scores, 0.5), nms(boxes.half(), scores, 0.5))


# What the ops promise


def test_mixed_dtypes(library):
    boxes, scores, _ = clusters(500)
    for box in DTYPES:
        for score in DTYPES:
            b, s = boxes.to(box), scores.to(score)
            assert torch.equal(nms(b, s, 0.5), plain_nms.nms(b.to(torch.promote_types(box, torch.float32)), s, 0.5))


def test_torchvisions_docs_example(library):
    boxes = torch.tensor([[100, 100, 210, 210], [105, 105, 215, 215], [150, 150, 250, 250.0]])
    scores = torch.tensor([0.6, 0.9, 0.8])
    assert nms(boxes, scores, 0.5).tolist() == [1, 2] and batched_nms(boxes, scores, torch.tensor([0, 1, 0]), 0.5).tolist() == [1, 2, 0]


def test_inputs_are_left_alone_and_may_want_a_gradient(library):
    boxes, scores, idxs = uniform(300, 3)
    before = [t.clone() for t in (boxes, scores, idxs)]
    boxes.requires_grad_(), scores.requires_grad_()
    results = nms(boxes, scores, 0.5), batched_nms(boxes, scores, idxs, 0.5)
    padded = nms_padded(boxes[None], scores[None], class_ids=idxs[None], iou_threshold=0.5, max_output=9, return_suppressor=True)
    assert not any(t.requires_grad for t in (*results, *padded))
    assert all(torch.equal(a, b) for a, b in zip(before, (boxes, scores, idxs), strict=True))
    (boxes[results[0]].sum() * 2).backward()
    assert boxes.grad.sum() == 2 * 4 * len(results[0])


def test_shapes_of_padded(library):
    for B, N, K in ((0, 5, 3), (2, 0, 3), (3, 4, 9), (1, 1, 1)):
        boxes, scores = torch.rand(B, N, 4), torch.rand(B, N)
        indices, counts, suppressor = nms_padded(boxes, scores, iou_threshold=0.5, max_output=K, return_suppressor=True)
        assert indices.shape == (B, K) and counts.shape == (B,) and suppressor.shape == (B, N)
        assert all(t.dtype == torch.int64 for t in (indices, counts, suppressor)) and ((indices >= 0).sum(1) == counts).all()
    assert nms_padded(boxes, scores, iou_threshold=0.5, max_output=K).suppressor is None


def test_kept_indices_hold_no_more_memory_than_they_need(library):
    assert nms(torch.ones(10_000, 4), torch.rand(10_000), 0.5).untyped_storage().nbytes() == 80_000  # no area: all are kept
    boxes, scores, _ = clusters(10_000)
    kept = nms(boxes, scores, 0.5)
    assert kept.untyped_storage().nbytes() == 8 * len(kept)


B, S, C = torch.zeros(2, 5, 4), torch.zeros(2, 5), torch.zeros(2, 5, dtype=torch.int64)
PADDED = dict(iou_threshold=0.5, max_output=3)
BAD = {
    "boxes of three": (lambda: nms(B[0, :, :3], S[0], 0.5), ValueError, r"boxes must be \(N, 4\), got \(5, 3\)"),
    "a batch": (lambda: nms(B, S, 0.5), ValueError, r"boxes must be \(N, 4\), got \(2, 5, 4\)"),
    "no batch": (lambda: nms_padded(B[0], S[0], **PADDED), ValueError, r"boxes must be \(B, N, 4\), got \(5, 4\)"),
    "scores": (lambda: nms(B[0], S[0, :4], 0.5), ValueError, r"scores must be \(5,\) to fit boxes \(5, 4\), got \(4,\)"),
    "padded scores": (lambda: nms_padded(B, S[:1], **PADDED), ValueError, r"scores must be \(2, 5\) .* got \(1, 5\)"),
    "idxs": (lambda: batched_nms(B[0], S[0], C, 0.5), ValueError, r"idxs must be \(5,\) .* got \(2, 5\)"),
    "class_ids": (lambda: nms_padded(B, S, class_ids=C[0], **PADDED), ValueError, r"class_ids must be \(2, 5\) .* got \(5,\)"),
    "float idxs": (lambda: batched_nms(B[0], S[0], S[0], 0.5), TypeError, "idxs must be of an integer dtype, got torch.float32"),
    "integer boxes": (lambda: nms(C[0, :, None].expand(5, 4), S[0], 0.5), TypeError, "boxes must be float16, .* got torch.int64"),
    "integer scores": (lambda: nms(B[0], C[0], 0.5), TypeError, "scores must be float16, .* got torch.int64"),
    "a list": (lambda: nms(B[0].tolist(), S[0], 0.5), TypeError, "boxes must be a tensor, got list"),
    "no idxs": (lambda: batched_nms(B[0], S[0], None, 0.5), TypeError, "idxs must be a tensor, got NoneType"),
    "devices": (lambda: nms(B[0], S[0].to("meta"), 0.5), TypeError, "scores is on meta, but boxes is on cpu"),
    "class devices": (lambda: batched_nms(B[0], S[0], C[0].to("meta"), 0.5), TypeError, "idxs is on meta, but boxes is on cpu"),
    "float64": (lambda: nms(B[0].double().to("meta"), S[0].to("meta"), 0.5), TypeError, "float64 runs on the CPU only"),
    "negative": (lambda: nms(B[0], S[0], -0.1), ValueError, "iou_threshold must be 0 to 1, got -0.1"),
    "above 1": (lambda: batched_nms(B[0], S[0], C[0], 1.5), ValueError, "iou_threshold must be 0 to 1, got 1.5"),
    "nan": (lambda: nms(B[0], S[0], NAN), ValueError, "iou_threshold must be finite, got nan"),
    "a string": (lambda: nms(B[0], S[0], "0.5"), TypeError, "iou_threshold must be a number, got '0.5'"),
    "a tensor": (lambda: nms(B[0], S[0], torch.tensor(0.5)), TypeError, "iou_threshold must be a number"),
    "score_threshold": (lambda: nms_padded(B, S, score_threshold=NAN, **PADDED), ValueError, "score_threshold must be finite, got nan"),
    "no output": (lambda: nms_padded(B, S, iou_threshold=0.5, max_output=0), ValueError, "max_output must be at least 1, got 0"),
    "half a box": (lambda: nms_padded(B, S, iou_threshold=0.5, max_output=2.5), TypeError, "max_output must be an int, got 2.5"),
    "too many": (
        lambda: nms(torch.zeros(1, 4).expand(2**31, 4), torch.zeros(1).expand(2**31), 0.5), ValueError, r"fewer than 2\*\*31 an image",
    ),
}  # fmt: skip


@pytest.mark.parametrize("call, error, message", BAD.values(), ids=BAD)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


# PyTorch's machinery


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_registration(dtype, device, library):
    ops = torch.ops.minkernels
    boxes, scores, ids = (t.to(device) for t in uniform(40, 3))
    boxes, scores = boxes.to(dtype), scores.to(dtype)
    strided = boxes.mT.contiguous().mT
    opcheck(ops.nms.default, (boxes, scores, None, 0.5))
    opcheck(ops.nms.default, (strided, scores, ids, 0.5))
    for b in (boxes, strided):
        opcheck(ops.nms_padded.default, (b[None], scores[None], ids[None], 0.5, 0.1, 7, True))
    opcheck(ops.nms_padded.default, (boxes[None], scores[None], None, 0.5, None, 60, False))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile(backend, library):
    def step(boxes, scores, idxs):
        kept = nms(boxes * 2, scores, 0.5)
        by_class = batched_nms(boxes, scores, idxs, 0.4)
        options = dict(iou_threshold=0.5, max_output=len(scores), return_suppressor=True)
        padded = nms_padded(boxes[None], scores[None], class_ids=idxs[None], **options)
        return boxes[kept] + 1, scores[by_class], padded.indices, padded.counts, padded.suppressor

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=backend)
    for N in (40, 70):
        case = uniform(N, 3)
        for a, b in zip(compiled(*case), step(*case), strict=True):
            assert torch.equal(a, b)


def test_export(library):
    class Post(torch.nn.Module):
        def forward(self, boxes, scores, idxs):
            padded = nms_padded(boxes[None], scores[None], class_ids=idxs[None], iou_threshold=0.5, max_output=5)
            return boxes[nms(boxes, scores, 0.5)], batched_nms(boxes, scores, idxs, 0.5), padded.indices, padded.counts

    auto = {0: torch.export.Dim.AUTO}
    exported = torch.export.export(Post(), uniform(40, 3), dynamic_shapes=(auto, auto, auto))
    for N in (40, 70):
        case = uniform(N, 3)
        for a, b in zip(exported.module()(*case), Post()(*case), strict=True):
            assert torch.equal(a, b)


def test_autocast_does_not_cast(library):
    boxes, scores, _ = clusters(300)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(nms(boxes, scores, 0.5), plain_nms.nms(boxes, scores, 0.5))


def test_vmap_of_padded(library):
    boxes, scores, ids = (t.unflatten(0, (3, 1, 50)) for t in uniform(150, 3))

    def one(b, s, c):
        return nms_padded(b, s, class_ids=c, iou_threshold=0.5, max_output=9)[:2]

    for a, b in zip(torch.func.vmap(one)(boxes, scores, ids), one(boxes[:, 0], scores[:, 0], ids[:, 0]), strict=True):
        assert torch.equal(a[:, 0], b)


def test_meta(library):
    boxes, scores = torch.empty(2, 7, 4, device="meta"), torch.empty(2, 7, device="meta")
    result = nms_padded(boxes, scores, iou_threshold=0.5, max_output=3, return_suppressor=True)
    assert [t.shape for t in result] == [(2, 3), (2,), (2, 7)] and result.indices.device.type == "meta"


def test_sparse_boxes_at_every_threshold(levels):
    """Most are kept: where there are many, they are looked up by place."""
    cases = [(make.__name__, *make(9000)[:2], t) for make in (sparse, uniform) for t in (0.15, 0.3, 0.5, 0.9)]
    expected = [plain_nms.nms(*case) for _, *case in cases]
    for level in levels:
        for (name, *case), kept in zip(cases, expected, strict=True):
            assert torch.equal(nms(*case), kept), f"{level}, {name}, {case[-1]}"
