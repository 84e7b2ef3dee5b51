"""PyTorch's functions, by their own arguments, on our kernels; None where a call wants what we lack: then PyTorch's own is to be called.

Results are PyTorch's within rounding, except that the loss of 16-bit logits is float32, a query that sees no key gives zeros, and
second derivatives raise.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from minkernels._checks import FLOATS, REDUCTIONS
from minkernels.attention.ops import MAX_HEAD_DIM, attention
from minkernels.cross_entropy.ops import cross_entropy as our_cross_entropy
from minkernels.nms.ops import nms as our_nms
from minkernels.segmentation.ops import bce_with_logits


def scaled_dot_product_attention(
    query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False
) -> Tensor | None:
    if not (_ours(query) and _plain(key, value, attn_mask)) or query.is_nested or key.is_nested or value.is_nested:
        return None
    shape, keys = query.shape, key.shape
    lead, D = shape[:-3], shape[-1]
    if not 3 <= len(shape) == len(keys) == value.dim() or keys[:-3] != lead or keys[-1] != D or value.shape[:-1] != keys[:-1]:
        return None
    if keys[-3] != shape[-3] and not (enable_gqa and keys[-3] and shape[-3] % keys[-3] == 0):
        return None
    if not (1 <= D <= MAX_HEAD_DIM >= value.shape[-1] >= 1 and 0.0 <= dropout_p < 1.0):
        return None
    mask = bias = None
    if attn_mask is not None:
        if is_causal or not _broadcasts(attn_mask, (*shape[:-1], keys[-2])):
            return None
        if attn_mask.dtype == torch.bool:
            mask = attn_mask
        elif attn_mask.dtype in (query.dtype, torch.float32):
            bias = attn_mask
        else:
            return None
    if len(lead) != 1:
        query, key, value, mask, bias = (t if t is None else _four(t, lead) for t in (query, key, value, mask, bias))
    out = _attention(query, key, value, "top-left" if is_causal else False, None, mask, bias, scale, dropout_p)
    if len(lead) == 1:
        return out
    return out.unflatten(0, lead) if lead else out[0]


def multi_head_attention_forward(
    query, key, value, embed_dim_to_check, num_heads, in_proj_weight, in_proj_bias, bias_k, bias_v, add_zero_attn, dropout_p,
    out_proj_weight, out_proj_bias, training=True, key_padding_mask=None, need_weights=True, attn_mask=None,
    use_separate_proj_weight=False, q_proj_weight=None, k_proj_weight=None, v_proj_weight=None, static_k=None, static_v=None,
    average_attn_weights=True, is_causal=False,
) -> tuple[Tensor, None] | None:  # fmt: skip
    """Batch, heads and padding are neither merged nor copied, as PyTorch does to them; a bool mask stays one."""
    E, H = embed_dim_to_check, num_heads
    if need_weights or static_k is not None or static_v is not None or (is_causal and attn_mask is None) or dropout_p >= 1.0:
        return None
    if not (_ours(query) and _plain(key, value, key_padding_mask, attn_mask, in_proj_weight, q_proj_weight, bias_k, out_proj_weight)):
        return None
    if query.is_nested or key.is_nested or value.is_nested or not 2 <= query.dim() == key.dim() == value.dim() <= 3:
        return None
    if query.shape[-1] != E or E % H or E // H > MAX_HEAD_DIM or key.shape[:-1] != value.shape[:-1]:
        return None
    packed, unbatched = query is key is value and not use_separate_proj_weight, query.dim() == 2
    if unbatched:
        query, key, value = (t.unsqueeze(1) for t in (query, key, value))
        key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
    (L, B), S = query.shape[:2], key.shape[0]
    if key.shape[1] != B or not _hides(attn_mask, ((L, S), (B * H, L, S))) or not _hides(key_padding_mask, ((B, S),)):
        return None

    batch_first = query.stride(1) > query.stride(0)  # projected as they lie: nothing is copied
    if batch_first:
        query, key, value = (t.transpose(0, 1) for t in (query, key, value))
    if packed:
        q, k, v = F.linear(query, in_proj_weight, in_proj_bias).chunk(3, -1)
    else:
        weights = (q_proj_weight, k_proj_weight, v_proj_weight) if use_separate_proj_weight else in_proj_weight.chunk(3)
        biases = (None,) * 3 if in_proj_bias is None else in_proj_bias.chunk(3)
        q, k, v = (F.linear(t, w, b) for t, w, b in zip((query, key, value), weights, biases, strict=True))
    if bias_k is not None:
        one = (B, 1, E) if batch_first else (1, B, E)
        k, v = (torch.cat([t, more.expand(one)], 1 if batch_first else 0) for t, more in ((k, bias_k), (v, bias_v)))
    q, k, v = (t.unflatten(-1, (H, E // H)) for t in (q, k, v))
    q, k, v = (t.transpose(1, 2) if batch_first else t.permute(1, 2, 0, 3) for t in (q, k, v))
    if add_zero_attn:
        k, v = (F.pad(t, (0, 0, 0, 1)) for t in (k, v))

    if is_causal and key_padding_mask is None:
        out = _attention(q, k, v, "top-left", dropout_p=dropout_p if training else 0.0)
    else:
        masks = _merged(attn_mask, key_padding_mask, B, H, (bias_k is not None) + bool(add_zero_attn))
        out = _attention(q, k, v, False, *masks, dropout_p=dropout_p if training else 0.0)
    out = (out.transpose(1, 2) if batch_first else out.permute(2, 0, 1, 3)).flatten(2)
    out = F.linear(out, out_proj_weight, out_proj_bias)
    out = out.transpose(0, 1) if batch_first else out
    return out.squeeze(1) if unbatched else out, None


def cross_entropy(
    input, target, weight=None, size_average=None, ignore_index=-100, reduce=None, reduction="mean", label_smoothing=0.0
) -> Tensor | None:
    if not (_ours(input) and _plain(target, weight)) or size_average is not None or reduce is not None or reduction not in REDUCTIONS:
        return None
    shape = input.shape
    classes = shape[1:2] or shape
    if not classes or classes[0] == 0 or not 0.0 <= label_smoothing <= 1.0:
        return None
    if target.dtype == torch.int64:
        if target.shape != (shape[:1] + shape[2:] if len(shape) > 1 else ()):
            return None
    else:  # probabilities, no wider than what the loss is computed in
        wide = torch.promote_types(target.dtype, input.dtype) not in (input.dtype, torch.float32)
        if wide or target.shape != shape or target.dtype not in FLOATS or ignore_index >= 0:
            return None
    if weight is not None and (weight.dtype != input.dtype or weight.shape != classes or weight.requires_grad):
        return None
    return our_cross_entropy(input, target, weight, ignore_index=ignore_index, reduction=reduction, label_smoothing=label_smoothing)


def binary_cross_entropy_with_logits(
    input, target, weight=None, size_average=None, reduce=None, reduction="mean", pos_weight=None
) -> Tensor | None:
    if not (_ours(input) and _plain(target, weight, pos_weight)) or size_average is not None or reduce is not None:
        return None
    if target.shape != input.shape or reduction not in REDUCTIONS:
        return None
    for t in (target, weight, pos_weight):
        if t is not None and (t.dtype != input.dtype or t.requires_grad or not _broadcasts(t, input.shape)):
            return None
    return bce_with_logits(input, target, weight, pos_weight=pos_weight, reduction=reduction)


def nms(dets, scores, iou_threshold) -> Tensor | None:
    """torchvision::nms, the operator."""
    if not (_ours(dets) and _plain(scores)) or dets.dtype != scores.dtype or not 0.0 <= iou_threshold <= 1.0:
        return None
    if dets.dim() != 2 or dets.shape[1] != 4 or scores.shape != dets.shape[:1]:
        return None
    return our_nms(dets, scores, iou_threshold)


def _ours(t) -> bool:
    """A device and a dtype that we have; no forward-mode AD, which we have not."""
    if not _plain(t) or t.dtype not in FLOATS or forward_ad._current_level >= 0:
        return False
    return t.is_cpu or (t.is_cuda and t.dtype != torch.float64)


def _plain(*tensors) -> bool:
    """No classes with ways of their own, but the fake tensors of torch.export."""
    for t in tensors:
        if type(t) not in (Tensor, nn.Parameter, type(None)) and not type(t).__module__.startswith("torch._subclasses."):
            return False
    return True


def _broadcasts(t, shape) -> bool:
    own = t.shape
    return len(own) <= len(shape) and all(n in (1, size) for n, size in zip(reversed(own), reversed(shape), strict=False))


def _four(t, lead):
    """(*lead, H, rows, columns) as (B, H, rows, columns). A mask may have fewer dimensions, which stand for all."""
    if t.dim() <= 3:
        return t.unsqueeze(0) if t.dim() == 3 and not lead else t
    return t.expand(*lead, *t.shape[-3:]).flatten(0, -4)


def _attention(q, k, v, causal, key_mask=None, mask=None, bias=None, scale=None, dropout_p=0.0):
    if not q.dtype == k.dtype == v.dtype and torch.is_autocast_enabled(q.device.type):
        q, k, v = (t.to(torch.get_autocast_dtype(q.device.type)) for t in (q, k, v))
    return attention(q, k, v, causal=causal, key_mask=key_mask, mask=mask, bias=bias, scale=scale, dropout_p=dropout_p)


def _hides(mask, shapes) -> bool:
    """Whether nn.MultiheadAttention's mask, True or -inf where nothing may be seen, has one of these shapes."""
    return mask is None or (mask.shape in shapes and (mask.dtype == torch.bool or mask.dtype in FLOATS))


def _merged(attn_mask, key_padding_mask, B, H, extra):
    """(key_mask, mask, bias) of attention, which has `extra` keys behind those of the masks, seen by every query."""
    key_mask = mask = bias = None
    if attn_mask is not None:
        attn_mask = F.pad(attn_mask, (0, extra)) if extra else attn_mask
        attn_mask = attn_mask.unflatten(0, (B, H)) if attn_mask.dim() == 3 else attn_mask
        mask, bias = (~attn_mask, None) if attn_mask.dtype == torch.bool else (None, attn_mask)
    if key_padding_mask is not None:
        hidden = F.pad(key_padding_mask, (0, extra)) if extra else key_padding_mask
        if hidden.dtype == torch.bool:
            key_mask = ~hidden
        else:
            bias = hidden[:, None, None] if bias is None else bias + hidden[:, None, None]
    return key_mask, mask, bias
