"""What nms, batched_nms and nms_padded promise as ops: errors, compile, export, transforms."""

import pytest
import torch
from torch.library import opcheck

from bench import plain_nms
from minkernels import batched_nms, nms, nms_padded
from nms_cases import DTYPES, NAN, clusters, sparse, uniform


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
    "a scalar": (lambda: nms(S.sum(), S[0], 0.5), ValueError, r"boxes must be \(N, 4\), got \(\)"),
    "a batch": (lambda: nms(B, S, 0.5), ValueError, r"boxes must be \(N, 4\), got \(2, 5, 4\)"),
    "no batch": (lambda: nms_padded(B[0], S[0], **PADDED), ValueError, r"boxes must be \(B, N, 4\), got \(5, 4\)"),
    "scores": (lambda: nms(B[0], S[0, :4], 0.5), ValueError, r"scores must be \(5,\) to fit boxes \(5, 4\), got \(4,\)"),
    "padded scores": (lambda: nms_padded(B, S[:1], **PADDED), ValueError, r"scores must be \(2, 5\) .* got \(1, 5\)"),
    "idxs": (lambda: batched_nms(B[0], S[0], C, 0.5), ValueError, r"idxs must be \(5,\) .* got \(2, 5\)"),
    "class_ids": (lambda: nms_padded(B, S, class_ids=C[0], **PADDED), ValueError, r"class_ids must be \(2, 5\) .* got \(5,\)"),
    "float idxs": (lambda: batched_nms(B[0], S[0], S[0], 0.5), TypeError, "idxs must be int64, .* got torch.float32"),
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
    "2**63 boxes": (lambda: nms_padded(B, S, iou_threshold=0.5, max_output=2**63), ValueError, "max_output must fit 64 bits"),
    "score 10**400": (lambda: nms_padded(B, S, score_threshold=10**400, **PADDED), ValueError, "score_threshold must fit a float"),
    "suppressor": (lambda: nms_padded(B, S, return_suppressor="no", **PADDED), TypeError, "return_suppressor must be a bool, got 'no'"),
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

    for n in (torch.export.Dim.AUTO, torch.export.Dim("n")):
        exported = torch.export.export(Post(), uniform(40, 3), dynamic_shapes=({0: n},) * 3)
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
