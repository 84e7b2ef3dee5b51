"""Fused kernels for PyTorch: attention, the losses of language models and of segmentation, IoU and NMS; on GPUs Triton, on CPUs C++."""

from minkernels._info import info
from minkernels._memory import empty_cache
from minkernels.attention.merge import merge_attention
from minkernels.attention.ops import attention, attention_varlen
from minkernels.boxes.ops import IoUMatch, box_iou, complete_box_iou, distance_box_iou, generalized_box_iou, iou_loss, iou_match
from minkernels.cross_entropy.ops import TokenLogprobs, cross_entropy, token_logprobs
from minkernels.linear_cross_entropy.ops import linear_cross_entropy, linear_token_logprobs
from minkernels.nms.ops import PaddedNMS, batched_nms, nms, nms_padded
from minkernels.segmentation.ops import bce_dice_loss, bce_with_logits, sigmoid_focal_loss
from minkernels.soft_nms.ops import RescoredNMS, matrix_nms, soft_nms
from minkernels.swap.api import swap, swapped, unswap
from minkernels.swap.changes import SwapReport
from minkernels.yolo.ops import Detections, yolo_detect, yolo_loss

__version__ = "0.1.0"
__all__ = [
    "Detections",
    "IoUMatch",
    "PaddedNMS",
    "RescoredNMS",
    "SwapReport",
    "TokenLogprobs",
    "attention",
    "attention_varlen",
    "batched_nms",
    "bce_dice_loss",
    "bce_with_logits",
    "box_iou",
    "complete_box_iou",
    "cross_entropy",
    "distance_box_iou",
    "empty_cache",
    "generalized_box_iou",
    "info",
    "iou_loss",
    "iou_match",
    "linear_cross_entropy",
    "linear_token_logprobs",
    "matrix_nms",
    "merge_attention",
    "nms",
    "nms_padded",
    "sigmoid_focal_loss",
    "soft_nms",
    "swap",
    "swapped",
    "token_logprobs",
    "unswap",
    "yolo_detect",
    "yolo_loss",
]
