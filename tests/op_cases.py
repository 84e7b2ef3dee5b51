"""Every public op on small tensors, for tests of what all of them promise."""

import torch

import minkernels as mk

torch.manual_seed(0)
randn, rand, randint = torch.randn, torch.rand, torch.randint


def qkv(M=20, N=20):
    return randn(2, 4, M, 16), randn(2, 2, N, 16), randn(2, 2, N, 24)


def boxes(*shape):
    corner = rand(*shape, 2) * 100
    return torch.cat((corner, corner + 1 + rand(*shape, 2) * 40), -1)


def labels(*shape):
    target = randint(37, shape)
    return torch.where(rand(shape) < 0.2, -100, target)


def packed():
    cu = torch.tensor([0, 5, 5, 12, 20], dtype=torch.int32)
    return randn(20, 4, 16), randn(20, 2, 16), randn(20, 2, 16), cu, cu


LINEAR, NONE = (randn(30, 16), randn(37, 16), labels(30)), dict(reduction="none", linear_bias=randn(37), label_smoothing=0.1)
NMS = dict(iou_threshold=0.5, max_output=20)
CELLS = rand(2, 4, 4, 13), rand(2, 4, 4, 4), randint(-1, 3, (2, 4, 4))
YOLO = dict(num_classes=3, score_threshold=0.1, **NMS)
W64 = torch.linspace(0.5, 1.5, 37, dtype=torch.float64)  # as NumPy's weights of classes come
OPS = {  # op, arguments, options, how many of the first arguments have a gradient, how often the host may wait
    "attention": (mk.attention, qkv(), dict(causal=True), 3, 0),
    "attention, bf16": (mk.attention, tuple(t.bfloat16() for t in qkv()), dict(causal=True), 3, 0),
    "attention, key_mask": (mk.attention, qkv(), dict(key_mask=rand(2, 20) > 0.3), 3, 0),
    "attention, kv_lens": (mk.attention, qkv(), dict(kv_lens=torch.tensor([3, 20])), 3, 0),
    "attention, mask": (mk.attention, qkv(), dict(mask=rand(2, 1, 20, 20) > 0.3), 3, 0),
    "attention, mask of keys": (mk.attention, qkv(), dict(mask=rand(2, 1, 1, 20) > 0.3), 3, 0),
    "attention, bias": (mk.attention, qkv(), dict(bias=randn(1, 4, 20, 20).requires_grad_()), 3, 0),
    "attention, window": (mk.attention, qkv(), dict(window=(4, 0), softcap=3.0, sinks=randn(4).requires_grad_(), return_lse=True), 3, 0),
    "attention, decoding": (mk.attention, qkv(1, 2100), dict(kv_lens=torch.tensor([300, 2100])), 0, 0),
    "attention_varlen": (mk.attention_varlen, packed(), dict(causal=True, max_seqlen_q=8, max_seqlen_k=8), 3, 0),
    "merge_attention": (mk.merge_attention, (randn(2, 4, 8, 16), randn(2, 4, 8)) * 2, {}, 4, 0),
    "cross_entropy": (mk.cross_entropy, (randn(30, 37), labels(30)), {}, 1, 0),
    "cross_entropy, bf16": (mk.cross_entropy, (randn(30, 37).bfloat16(), labels(30)), {}, 1, 0),
    "cross_entropy, none": (mk.cross_entropy, (randn(30, 37), labels(30)), dict(reduction="none", weight=W64, z_loss=0.1), 1, 0),
    "cross_entropy, probabilities": (mk.cross_entropy, (randn(30, 37), randn(30, 37).softmax(-1)), {}, 2, 0),
    "cross_entropy, positions": (mk.cross_entropy, (randn(2, 5, 6, 7), randint(5, (2, 6, 7))), dict(label_smoothing=0.1), 1, 0),
    "token_logprobs": (mk.token_logprobs, (randn(30, 37), labels(30)), {}, 1, 0),
    "linear_cross_entropy": (mk.linear_cross_entropy, LINEAR, {}, 2, 0),
    "linear_cross_entropy, none": (mk.linear_cross_entropy, LINEAR, NONE, 2, 0),
    "linear_token_logprobs": (mk.linear_token_logprobs, LINEAR, {}, 2, 0),
    "bce_with_logits": (mk.bce_with_logits, (randn(4, 3, 8, 8), rand(4, 3, 8, 8)), dict(pos_weight=W64[:3, None, None]), 1, 0),
    "bce_dice_loss": (mk.bce_dice_loss, (randn(4, 1, 8, 8), rand(4, 1, 8, 8) > 0.5), {}, 1, 0),
    "bce_dice_loss, class map": (mk.bce_dice_loss, (randn(4, 3, 8, 8), randint(3, (4, 8, 8))), dict(pos_weight=W64[:3]), 1, 0),
    "sigmoid_focal_loss": (mk.sigmoid_focal_loss, (randn(4, 3, 8, 8), rand(4, 3, 8, 8).round()), dict(reduction="mean"), 1, 0),
    "box_iou": (mk.box_iou, (boxes(7), boxes(9)), {}, 2, 0),
    "generalized_box_iou": (mk.generalized_box_iou, (boxes(2, 7), boxes(2, 9)), {}, 2, 0),
    "distance_box_iou": (mk.distance_box_iou, (boxes(7), boxes(9)), {}, 2, 0),
    "complete_box_iou": (mk.complete_box_iou, (boxes(2, 7), boxes(2, 9)), {}, 2, 0),
    "iou_match": (mk.iou_match, (boxes(2, 7), boxes(2, 9)), {}, 0, 0),
    "iou_loss": (mk.iou_loss, (boxes(7), boxes(7)), dict(kind="ciou"), 2, 0),
    "nms": (mk.nms, (boxes(50), rand(50), 0.5), {}, 0, 1),  # how many are kept, the shape of the result tells
    "batched_nms": (mk.batched_nms, (boxes(50), rand(50), randint(3, (50,)), 0.5), {}, 0, 1),
    "nms_padded": (mk.nms_padded, (boxes(2, 50), rand(2, 50)), dict(return_suppressor=True, **NMS), 0, 0),
    "soft_nms": (mk.soft_nms, (boxes(2, 50), rand(2, 50)), dict(max_output=20), 0, 0),
    "matrix_nms": (mk.matrix_nms, (boxes(2, 50), rand(2, 50)), dict(max_output=20, min_score=0.01), 0, 0),
    "yolo_detect, v1": (mk.yolo_detect, (rand(2, 4, 4, 13),), dict(head="v1", boxes_per_cell=2, image_size=64, **YOLO), 0, 0),
    "yolo_loss": (mk.yolo_loss, CELLS, {}, 1, 0),
    "yolo_detect, v8": (mk.yolo_detect, (randn(2, 7, 60),), dict(head="v8", multi_label=True, **YOLO), 0, 0),
}
