"""torchvision's CPU algorithm for nms and batched_nms, written plainly: plain_nms.cpp, compiled at its first use."""

import ctypes
import functools
import os
import subprocess
import tempfile
from pathlib import Path

import torch

SOURCE = Path(__file__).with_name("plain_nms.cpp")
FLAGS = ["-O3", "-std=c++17", "-fPIC", "-shared", "-ffp-contract=off"]


def nms(boxes, scores, iou_threshold):
    """Boxes float32 or float64. The order is PyTorch's own sort, as torchvision's."""
    boxes, order = boxes.contiguous(), scores.sort(stable=True, descending=True).indices
    kept = torch.empty_like(order)
    loop = _library()[boxes.dtype]
    count = loop(boxes.data_ptr(), order.data_ptr(), len(boxes), iou_threshold, kept.data_ptr())
    return kept[:count]


def nms_with_offsets(boxes, scores, idxs, iou_threshold):
    """One class beside the other in the plane, so far apart that they do not meet: quick, and not exact."""
    if len(boxes) == 0:
        return torch.empty(0, dtype=torch.int64)
    return nms(boxes + (idxs.to(boxes) * (boxes.max() + 1))[:, None], scores, iou_threshold)


def nms_per_class(boxes, scores, idxs, iou_threshold):
    """Exact."""
    keep = torch.zeros(len(scores), dtype=torch.bool)
    for value in idxs.unique():
        own = (idxs == value).nonzero()[:, 0]
        keep[own[nms(boxes[own], scores[own], iou_threshold)]] = True
    order = scores.sort(stable=True, descending=True).indices
    return order[keep[order]]


@functools.cache
def _library():
    folder = tempfile.TemporaryDirectory(prefix="plain_nms_")
    path = Path(folder.name) / "plain_nms.so"
    subprocess.run([os.environ.get("CXX", "g++"), *FLAGS, str(SOURCE), "-o", str(path)], check=True)
    library = ctypes.CDLL(str(path))
    loops = {torch.float32: library.plain_nms_f32, torch.float64: library.plain_nms_f64}
    for loop in loops.values():
        loop.restype = ctypes.c_int64
        loop.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_double, ctypes.c_void_p]
    folder.cleanup()  # loaded: the file may go
    return loops
