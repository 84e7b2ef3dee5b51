"""NMS beside torchvision's greedy loop (plain_nms.cpp) and the peers that are installed, on the boxes of tests/nms_cases.py."""

import sys
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import minkernels
from bench import plain_nms
from bench.timing import installed
from minkernels.nms import _cuda

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))
from nms_cases import DATA

IOU = 0.5
LONG = 50_000  # boxes; for more of them, only the loop and ours are worth the time


class Case(NamedTuple):
    data: str
    N: int
    classes: int
    images: int = 1

    def __str__(self):
        return f"{self.data}-{f'{self.images}x' if self.images > 1 else ''}{self.N}-{self.classes}-classes"


def torchvision():
    from torchvision import ops

    return lambda boxes, scores, idxs: ops.nms(boxes, scores, IOU) if idxs is None else ops.batched_nms(boxes, scores, idxs, IOU)


def opencv():
    import cv2

    def call(boxes, scores, idxs):
        rects = torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], 1).double().numpy()
        if idxs is None:
            kept = cv2.dnn.NMSBoxes(rects, scores.tolist(), 0.0, IOU)
        else:
            kept = cv2.dnn.NMSBoxesBatched(rects, scores.numpy(), idxs.int().numpy(), 0.0, IOU)
        return torch.as_tensor(kept).long()

    return call


def onnxruntime():
    import onnx
    import onnxruntime as ort
    from onnx import TensorProto, helper

    names = {"boxes": (TensorProto.FLOAT, 3), "scores": (TensorProto.FLOAT, 3), "most": (TensorProto.INT64, 1)}
    names |= {"iou": (TensorProto.FLOAT, 1), "low": (TensorProto.FLOAT, 1)}
    inputs = [helper.make_tensor_value_info(name, kind, [None] * dims) for name, (kind, dims) in names.items()]
    output = helper.make_tensor_value_info("kept", TensorProto.INT64, [None, 3])
    graph = helper.make_graph([helper.make_node("NonMaxSuppression", list(names), ["kept"])], "nms", inputs, [output])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 11)], ir_version=8)
    onnx.checker.check_model(model)
    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])

    def call(boxes, scores, idxs):
        rows = 1 if idxs is None else int(idxs.max()) + 1
        table = torch.full((rows, len(scores)), -2.0)  # a score for each class: below the threshold where the box is of another
        table[0 if idxs is None else idxs, torch.arange(len(scores))] = scores
        one = torch.tensor([IOU]).numpy(), torch.tensor([-1.0]).numpy()
        feed = dict(boxes=boxes[None].numpy(), scores=table[None].numpy(), most=torch.tensor([len(scores)]).numpy(), iou=one[0], low=one[1])
        kept = torch.from_numpy(session.run(None, feed)[0])[:, 2]
        return kept[scores[kept].argsort(descending=True, stable=True)]

    return call


def ours(boxes, scores, idxs):
    return minkernels.nms(boxes, scores, IOU) if idxs is None else minkernels.batched_nms(boxes, scores, idxs, IOU)


def cuda_cpp(name):
    if not _cuda.built():
        raise ImportError("the library was built without nvcc")
    return getattr(_cuda, name)


def greedy(boxes, scores, idxs):
    if boxes.is_cuda:
        pytest.skip("runs on the CPU")
    return plain_nms.nms(boxes, scores, IOU) if idxs is None else plain_nms.nms_with_offsets(boxes, scores, idxs, IOU)


IMPLS = {"minkernels": ours, "greedy-loop": greedy, "torchvision": installed("torchvision", torchvision)}
IMPLS |= {"opencv": installed("opencv", opencv), "onnxruntime": installed("onnxruntime", onnxruntime)}
CUDA_IMPLS = {"minkernels-cuda-cpp": installed("csrc/ops/cuda", lambda: partial(cuda_cpp("nms"), iou_threshold=IOU))}
SIZES = [("clusters", 1000, 80), ("clusters", 10_000, 1), ("clusters", 10_000, 80), ("clusters", 50_000, 80), ("uniform", 50_000, 80)]
CASES = {
    "cpu": [*(Case(*size) for size in SIZES), Case("sparse", 50_000, 1), Case("clusters", 200_000, 1)],
    "cuda": [*(Case(*size) for size in SIZES), Case("clusters", 200_000, 1), Case("clusters", 200_000, 80)],
    "tiny": [Case("clusters", 70, 1), Case("uniform", 90, 5)],
}


def make(case, device):
    images = [DATA[case.data](case.N, case.classes) for _ in range(case.images)]
    boxes, scores, idxs = (torch.stack(tensors).to(device) for tensors in zip(*images, strict=True))
    return boxes, scores, idxs if case.classes > 1 else None


def different(kept, exact):
    """Boxes of one list that are not in the other, a part of the whole; 2 % is what offsets and other arithmetic may cost a peer."""
    part = len(set(kept.tolist()) ^ set(exact.tolist())) / max(1, len(exact))
    if part > 0.02:
        raise AssertionError(f"wrong result: {part:.1%} of the boxes differ from the greedy loop's")
    return part


def bench_nms(timed, device, case, impl):
    def build():
        args = [t if t is None else t[0] for t in make(case, device)]

        @cache
        def exact():
            on_cpu = [t if t is None else t.cpu() for t in args]
            return plain_nms.nms(*on_cpu[:2], IOU) if case.classes == 1 else plain_nms.nms_per_class(*on_cpu, IOU)

        table = {name: partial(f, *args) for name, f in (IMPLS | CUDA_IMPLS).items()}
        if device == "cuda" or case.N > LONG or case.data == "sparse":
            table |= {"opencv": slow, "onnxruntime": slow}
        return table, lambda kept: different(kept, exact())

    rounds = {"min_rounds": 2} if case.N > LONG else {}
    timed("nms", build, shape=(case.N, case.classes), dtype=torch.float32, bytes=case.N * 24, **rounds)


def slow():
    pytest.skip("takes minutes, or runs on the CPU alone")


def padded(boxes, scores, class_ids):
    return minkernels.nms_padded(boxes, scores, class_ids=class_ids, iou_threshold=IOU, score_threshold=0.25, max_output=300).indices


def loop(nms, boxes, scores, class_ids):
    """What there is to do without nms_padded: image by image."""
    out = scores.new_full((len(boxes), 300), -1, dtype=torch.int64)
    for b in range(len(boxes)):
        own = (scores[b] > 0.25).nonzero()[:, 0]
        kept = own[nms(boxes[b, own], scores[b, own], class_ids[b, own])[:300]]
        out[b, : len(kept)] = kept
    return out


def bench_padded(timed, device, case, impl):
    def build():
        args = make(case, device)

        @cache
        def exact():
            return loop(lambda *one: plain_nms.nms_per_class(*one, IOU), *(t.cpu() for t in args))

        table = {name: partial(loop, f, *args) for name, f in (IMPLS | CUDA_IMPLS).items()}
        cuda = installed("csrc/ops/cuda", lambda: cuda_cpp("nms_padded"))
        table |= {"minkernels": partial(padded, *args), "minkernels-cuda-cpp": lambda: cuda(*args, IOU, 0.25, 300, False)[0]}
        return table, lambda indices: different(numbered(indices), numbered(exact()))

    timed("nms_padded", build, shape=(case.images, case.N, case.classes), dtype=torch.float32, bytes=case.images * case.N * 32)


def numbered(indices):
    """Indices of several images as those of one."""
    b, k = (indices >= 0).nonzero(as_tuple=True)
    return indices[b, k] + b * 1_000_000


bench_padded.cases = {
    "cpu": [Case("clusters", 8400, 80, 8), Case("clusters", 1000, 80, 32)],
    "cuda": [Case("clusters", 8400, 80, 32), Case("clusters", 1000, 80, 32)],
    "tiny": [Case("uniform", 50, 4, 3)],
}
