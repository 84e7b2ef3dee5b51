"""PyTorch's functions, by their own arguments, on our kernels; None where a call wants what we lack: then PyTorch's own is to be called.

Results are PyTorch's within rounding, with the exceptions that docs/swap.md lists.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from minkernels._checks import FLOATS
from minkernels.attention.ops import MAX_HEAD_DIM, attention
from minkernels.cross_entropy.ops import cross_entropy as our_cross_entropy
from minkernels.cross_entropy.ops import usual_cross_entropy
from minkernels.nms.ops import nms as our_nms
from minkernels.segmentation.ops import bce_with_logits, usual_bce

PLAIN = Tensor, nn.Parameter, type(None)


def scaled_dot_product_attention(
    query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False
) -> Tensor | None:
    if not (type(query) is type(key) is type(value) is Tensor or _plain(query, key, value)):
        return None
    if not (query.is_cpu or query.is_cuda) or forward_ad._current_level >= 0 or query.is_nested:
        return None
    try:
        if not enable_gqa and query.size(-3) != key.size(-3) != 1:  # one head of keys is broadcast, so that it is shared as ours is
            return None
        if attn_mask is None:
            return attention(query, key, value, causal="top-left" if is_causal else False, scale=scale, dropout_p=dropout_p)
        if is_causal or not (type(attn_mask) is Tensor or _plain(attn_mask)):
            return None
        given = attn_mask.dtype
        if given == torch.bool:
            return attention(query, key, value, mask=attn_mask, scale=scale, dropout_p=dropout_p)
        if given == query.dtype or given == torch.float32:
            return attention(query, key, value, bias=attn_mask, scale=scale, dropout_p=dropout_p)
        return None
    except (IndexError, TypeError, ValueError):  # nothing was computed: everything is looked at once, there
        return _of_other_kinds(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)


def multi_head_attention_forward(query, key, value, *args, **options) -> tuple[Tensor, None] | None:
    if not (_ours(query) and _plain(key, value)) or query.is_nested:
        return None
    if query.dim() != 3 or query.stride(1) <= query.stride(0):
        return multi_head_attention(False, query, key, value, *args, **options)
    out = multi_head_attention(True, *transposed(query, key, value), *args, **options)  # projected as it lies: nothing is copied
    return out and (out[0].transpose(0, 1), None)


def multi_head_attention(
    batch_first, query, key, value, embed_dim_to_check, num_heads, in_proj_weight, in_proj_bias, bias_k, bias_v, add_zero_attn,
    dropout_p, out_proj_weight, out_proj_bias, training=True, key_padding_mask=None, need_weights=True, attn_mask=None,
    use_separate_proj_weight=False, q_proj_weight=None, k_proj_weight=None, v_proj_weight=None, static_k=None, static_v=None,
    average_attn_weights=True, is_causal=False,
) -> tuple[Tensor, None] | None:  # fmt: skip
    """F.multi_head_attention_forward, also of (B, L, E); heads are not merged with the batch, nor masks with each other."""
    E, H, shape = embed_dim_to_check, num_heads, query.shape if _ours(query) and not query.is_nested else ()
    D = E // H
    if need_weights or not 2 <= len(shape) <= 3 or shape[-1] != E or D * H != E or D > MAX_HEAD_DIM or not 0.0 <= dropout_p < 1.0:
        return None
    if static_k is not None or static_v is not None or not _plain(in_proj_weight, q_proj_weight, out_proj_weight):
        return None
    one, unbatched = query is key and key is value, len(shape) == 2
    if not (one or (_plain(key, value) and key.dim() == value.dim() == len(shape) and key.shape[:-1] == value.shape[:-1])):
        return None
    if unbatched:
        batch_first, query, key, value = True, query.unsqueeze(0), key.unsqueeze(0), value.unsqueeze(0)
        key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        shape = query.shape
    B, L, _ = shape if batch_first else (shape[1], shape[0], E)
    C, S, _ = shape if one else key.shape
    if not batch_first:
        C, S = S, C
    if B != C or (is_causal and attn_mask is None):
        return None
    if attn_mask is not None and not _hides(attn_mask, (L, S), (B * H, L, S)):
        return None
    if key_padding_mask is not None and not _hides(key_padding_mask, (B, S)):
        return None

    if one and not use_separate_proj_weight:
        qkv = F.linear(query, in_proj_weight, in_proj_bias).view(shape[0], shape[1], 3, H, D)
        q, k, v = qkv.permute((2, 0, 3, 1, 4) if batch_first else (2, 1, 3, 0, 4)).unbind()
    else:
        weights = (q_proj_weight, k_proj_weight, v_proj_weight) if use_separate_proj_weight else in_proj_weight.chunk(3)
        biases = (None, None, None) if in_proj_bias is None else in_proj_bias.chunk(3)
        q, k, v = (F.linear(t, w, b) for t, w, b in zip((query, key, value), weights, biases, strict=True))
        q, k, v = (t.unflatten(-1, (H, D)).permute((0, 2, 1, 3) if batch_first else (1, 2, 0, 3)) for t in (q, k, v))
    if bias_k is not None:
        k, v = (torch.cat([t, b.view(1, H, 1, D).expand(B, -1, -1, -1)], 2) for t, b in ((k, bias_k), (v, bias_v)))
    if add_zero_attn:
        k, v = (F.pad(t, (0, 0, 0, 1)) for t in (k, v))

    causal, key_mask, mask, bias = False, None, None, None
    if is_causal and key_padding_mask is None:  # PyTorch believes the hint in this case, too
        causal = "top-left"
    elif attn_mask is not None or key_padding_mask is not None:
        key_mask, mask, bias = _masks(attn_mask, key_padding_mask, B, H, k.shape[2] - S)
    out = attention(q, k, v, causal=causal, key_mask=key_mask, mask=mask, bias=bias, dropout_p=dropout_p if training else 0.0)
    out = F.linear(out.permute((0, 2, 1, 3) if batch_first else (2, 0, 1, 3)).flatten(2), out_proj_weight, out_proj_bias)
    return out.squeeze(0) if unbatched else out, None


def cross_entropy(
    input, target, weight=None, size_average=None, ignore_index=-100, reduce=None, reduction="mean", label_smoothing=0.0
) -> Tensor | None:
    if not (weight is size_average is reduce is None and type(input) is type(target) is Tensor):
        if input is None or target is None or size_average is not None or reduce is not None or not _plain(input, target, weight):
            return None
        if weight is not None and weight.dtype != input.dtype:
            return None
    if not (input.is_cpu or input.is_cuda) or forward_ad._current_level >= 0:
        return None
    given = target.dtype
    if given != torch.int64 and (given not in FLOATS or torch.promote_types(given, input.dtype) not in (input.dtype, torch.float32)):
        return None  # else probabilities, no wider than what the loss is computed in
    try:
        return our_cross_entropy(input, target, weight, ignore_index=ignore_index, reduction=reduction, label_smoothing=label_smoothing)
    except (TypeError, ValueError):  # nothing was computed
        return None


def binary_cross_entropy_with_logits(
    input, target, weight=None, size_average=None, reduce=None, reduction="mean", pos_weight=None
) -> Tensor | None:
    if not (weight is pos_weight is size_average is reduce is None and type(input) is type(target) is Tensor):
        if input is None or target is None or size_average is not None or reduce is not None:
            return None
        if not _plain(input, target, weight, pos_weight):
            return None
        if any(t is not None and t.dtype != input.dtype for t in (weight, pos_weight)):
            return None
    if target.dtype != input.dtype or not (input.is_cpu or input.is_cuda) or forward_ad._current_level >= 0:
        return None
    try:
        return bce_with_logits(input, target, weight, pos_weight=pos_weight, reduction=reduction)
    except (TypeError, ValueError):  # nothing was computed
        return None


def _cross_entropy(args, kwargs) -> Tensor | None:
    if not kwargs or len(args) != 2 or len(kwargs) != 6 or forward_ad._current_level >= 0:
        return None
    if not kwargs["size_average"] is kwargs["reduce"] is None:
        return None
    (input, target), weight = args, kwargs["weight"]
    if weight is not None and not (type(weight) is type(input) is Tensor and weight.dtype == input.dtype):
        return None
    return usual_cross_entropy(input, target, weight, kwargs["ignore_index"], kwargs["reduction"], kwargs["label_smoothing"])


def _binary_cross_entropy_with_logits(args, kwargs) -> Tensor | None:
    if not kwargs or len(args) != 2 or len(kwargs) != 5 or forward_ad._current_level >= 0:
        return None
    if not kwargs["size_average"] is kwargs["reduce"] is None:
        return None
    input, target = args
    return usual_bce(input, target, kwargs["weight"], kwargs["reduction"], kwargs["pos_weight"])


# The calls that most losses are, as __torch_function__ is given them: it takes longer to unpack the keywords than to look at them.
USUAL = {F.cross_entropy: _cross_entropy, F.binary_cross_entropy_with_logits: _binary_cross_entropy_with_logits}


def nms(dets, scores, iou_threshold) -> Tensor | None:
    """torchvision::nms, the operator."""
    if not (_ours(dets) and _plain(scores)) or dets.dtype != scores.dtype:
        return None
    try:
        return our_nms(dets, scores, iou_threshold)
    except (TypeError, ValueError):  # nothing was computed
        return None


def transposed(query, key, value):
    """Of one tensor given thrice, one: its projections are then one product."""
    q = query.transpose(0, 1)
    k = q if key is query else key.transpose(0, 1)
    return q, k, k if value is key else value.transpose(0, 1)


def _ours(t) -> bool:
    """A device and a dtype that we have; no forward-mode AD, which we have not."""
    if type(t) not in PLAIN and not _plain(t):
        return False
    return forward_ad._current_level < 0 and t.dtype in FLOATS and (t.is_cpu or (t.is_cuda and t.dtype != torch.float64))


def _plain(*tensors) -> bool:
    """No classes with ways of their own, but the fake tensors of torch.export."""
    for t in tensors:
        kind = type(t)
        if kind not in PLAIN and not kind.__module__.startswith("torch._subclasses."):
            return False
        if t is not None and t.layout != torch.strided:
            return False
    return True


def _of_other_kinds(query, key, value, attn_mask, *options) -> Tensor | None:
    """Fewer or more than four dimensions."""
    lead = query.shape[:-3]
    if query.dim() < 3 or query.dim() == 4 or key.shape[:-3] != lead or value.shape[:-3] != lead:
        return None
    if attn_mask is not None and attn_mask.dim() > query.dim():
        return None
    out = scaled_dot_product_attention(*(t if t is None else _four(t, lead) for t in (query, key, value, attn_mask)), *options)
    if out is None:
        return None
    return out.unflatten(0, lead) if lead else out[0]


def _four(t, lead):
    """(*lead, H, rows, columns) as (B, H, rows, columns). A mask may have fewer dimensions, which stand for all."""
    if t.dim() <= 3:
        return t.unsqueeze(0) if t.dim() == 3 and not lead else t
    return t.expand(*lead, *t.shape[-3:]).flatten(0, -4)


def _hides(mask, *shapes) -> bool:
    """Whether nn.MultiheadAttention's mask, True or -inf where nothing may be seen, has one of these shapes."""
    return _plain(mask) and mask.shape in shapes and (mask.dtype == torch.bool or mask.dtype in FLOATS)


def _masks(attn_mask, key_padding_mask, B, H, extra):
    """key_mask, mask and bias of attention, which has `extra` keys behind those of the masks, seen by every query."""
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
