"""What every road of NMS agrees on."""

import struct

import torch

KEPT, FILTERED, CUT = -1, -2, -3  # in suppressor, where there is no index


def round_down(x: float) -> float:
    """The largest float32 that is no larger than x: a float32 is above the one exactly when it is above the other."""
    try:
        (bits,) = struct.unpack("<i", struct.pack("<f", x))
    except OverflowError:  # beyond the largest float32
        return struct.unpack("<f", struct.pack("<i", 0x7F7FFFFF))[0] if x > 0 else float("-inf")
    (rounded,) = struct.unpack("<f", struct.pack("<i", bits))
    if rounded <= x:
        return rounded
    bits += 1 if bits < 0 else -1
    return struct.unpack("<f", struct.pack("<i", bits if rounded != 0 else -0x7FFFFFFF))[0]  # below 0 lies the smallest negative number


def new_outputs(scores, max_output: int, with_suppressor: bool):
    """indices, counts and suppressor, whose elements are not set; an empty suppressor where none is wanted."""
    B, N = scores.shape
    return tuple(scores.new_empty(shape, dtype=torch.int64) for shape in ((B, max_output), (B,), (B, N) if with_suppressor else (0,)))
