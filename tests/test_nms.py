"""NMS: the reference against a plain greedy loop, the C++ kernels against the reference at every level, and the public ops' promises."""

import math

import pytest
import torch

from bench import plain_nms
from minkernels import batched_nms, nms, nms_padded
from minkernels.nms import reference
from minkernels.nms._common import round_down
from nms_cases import DATA, DTYPES, INF, NAN, THRESHOLDS, check_suppressor, clusters, fuzz, oracle, uniform


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


@pytest.mark.parametrize("t", [0.03, 0.05, 0.1, 0.2, 0.25, 0.6])
def test_cpu_cells(t, levels):
    """Where so many boxes are kept that they are looked for by place: sides of every size, many of them close to the same place."""
    corner = torch.rand(1700, 2).repeat(10, 1) * 12_000
    corner += torch.randn(corner.shape) * 9
    boxes, scores = torch.cat([corner, corner + torch.exp(torch.rand(corner.shape) * 6 - 1)], 1), torch.rand(17_000)
    expected = plain_nms.nms(boxes, scores, t)
    for level in levels:
        assert torch.equal(nms(boxes, scores, t), expected), level


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


def test_no_product_is_contracted_with_a_sum(roads):
    """Pairs whose IoU would be another with inter = w h fused into the union, at the threshold that tells."""
    corner, side = torch.rand(2, 4000, 2) * 3, 4 + torch.rand(2, 4000, 2)
    a, b = torch.cat([corner, corner + side], -1)
    (w, h), (s, t) = (torch.minimum(a, b)[:, 2:] - torch.maximum(a, b)[:, :2]).T, ((x[:, 2:] - x[:, :2]).prod(1) for x in (a, b))
    iou = w * h / (s + t - w * h)
    fused = w * h / ((s + t).double() - w.double() * h.double()).float()
    differ = (iou != fused).nonzero()[:, 0][:100]
    assert len(differ) == 100 and (iou[differ] < fused[differ]).any()
    for road, _ in roads:
        for i in differ.tolist():
            pair, scores = torch.stack([a[i], b[i]]), torch.tensor([2.0, 1.0])
            assert len(road(pair, scores, None, float(iou[i]))) == 2
            assert len(road(pair, scores, None, math.nextafter(float(iou[i]), 0))) == 1


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
