"""Attention as transformers asks for it: a mask function and an attention function, registered while a swapped model uses them.

What the mask function returns says what the attention function has to do, whatever flags the module hands on (some are wrong where
a mask has always said it):
    (0,)           causal from the bottom right, over every key
    (B, N)         the same over the keys that are True
    (B, 1, N)      the same within the config's sliding window
    (B, 1, 1, N)   the keys that are True
    (B, 1, M, N)   all said by the mask: packed sequences, chunks, what a static cache has not filled
The last two are what F.scaled_dot_product_attention takes, too. None is every key; from models that ask for no mask, or ask with another
config, it may be causal by their flag, and then from the top left, as transformers has it for F.scaled_dot_product_attention.
"""

import sys
import weakref

import torch
from torch.autograd import forward_ad

from minkernels._library import autocast_dtype
from minkernels.attention.ops import attention

NAME = "minkernels"
IGNORED = frozenset(  # what models hand on to every attention function, and the eager one does not look at
    {
        "position_ids", "cache_position", "use_cache", "output_hidden_states", "output_router_logits", "return_dict", "num_items_in_batch",
        "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx", "target_dtype", "deterministic", "position_embeddings",
        "past_key_values", "logits_to_keep",
    }
)  # fmt: skip
_live = weakref.WeakSet()  # Implementations in force, copies and pickled ones too


class Implementation:
    """config asks for our attention, and the registries have it, until it is taken back."""

    def __init__(self, config):
        self.config = config

    @property
    def key(self):
        return id(self.config), "_attn_implementation_internal"

    def apply(self):
        others = [x.before for x in _live if x.config is self.config]  # another model with the same config was swapped before
        self.before = others[0] if others else self.config._attn_implementation
        self._register()
        self.config._attn_implementation_internal = NAME

    def in_force(self):
        return self.config._attn_implementation == NAME

    def revert(self):
        _live.discard(self)
        _restore(self.config, self.before)

    def __setstate__(self, state):
        vars(self).update(state)
        if "before" in state:  # a copy of a swapped model is one
            self._register()

    def _register(self):
        _live.add(self)
        weakref.finalize(self, _restore, self.config, self.before).atexit = False  # a model that is dropped as it is
        for interface, function in zip(_interfaces(), (attend, mask), strict=True):
            interface.register(NAME, function)


def _restore(config, before):
    used = any(x.config is config for x in _live)
    if not used and config._attn_implementation == NAME:  # else somebody has set another since
        config._attn_implementation_internal = before
    if not any(True for _ in _live):
        for interface in _interfaces():
            interface._global_mapping.pop(NAME, None)


def _interfaces():
    from transformers.masking_utils import AttentionMaskInterface
    from transformers.modeling_utils import AttentionInterface

    return AttentionInterface, AttentionMaskInterface


def mask(
    batch_size, kv_length, q_length=None, q_offset=0, kv_offset=0, mask_function=None, attention_mask=None, *, cache_position=None,
    config=None, device=None, local_size=None, allow_is_causal_skip=True, allow_is_bidirectional_skip=False, **more,
):  # fmt: skip
    """The smallest mask that says it; see above. Nothing waits for what is in a tensor.

    transformers 5 gives q_length and q_offset (a tensor for static caches); 4.57 and the first of 5 give cache_position instead.
    allow_is_causal_skip: plain causal or a plain window, and a cache that grows; allow_is_bidirectional_skip: nothing but padding.
    """
    from transformers import masking_utils

    if attention_mask is not None and attention_mask.dtype == torch.bool:
        shape = attention_mask.shape
        # generate() slides every layer of a config without layer_types, whatever its model asks for: Moshi's forward for no window
        slides = local_size is not None or (getattr(config, "sliding_window", None) is not None and not hasattr(config, "layer_types"))
        if shape == (0,) or (len(shape) == 3 and shape[1] == 1 and slides):  # ours, from generate(), which prepared it
            return attention_mask
    if cache_position is not None:
        aligned = cache_position.shape[0] == kv_length
    else:
        ints = isinstance(q_offset, int | torch.SymInt) and isinstance(kv_offset, int | torch.SymInt)
        aligned = ints and q_offset - kv_offset == kv_length - q_length
    if getattr(config, "num_kv_shared_layers", 0) and config.model_type != "gemma3n_text":  # Gemma 4 cuts the last rows out of its masks
        allow_is_causal_skip = False
    device = attention_mask.device if attention_mask is not None else device if cache_position is None else cache_position.device
    keys = attention_mask is None or attention_mask.dim() == 2  # or a mask that only they understand
    if keys and allow_is_bidirectional_skip and mask_function is masking_utils.bidirectional_mask_function and local_size is None:
        if attention_mask is not None:
            return _keys(attention_mask, kv_length, kv_offset)[:, None, None]
        if getattr(config, "is_causal", True):
            return None
        return torch.ones(batch_size, 1, 1, kv_length, dtype=torch.bool, device=device)  # its modules would say causal
    if keys and allow_is_causal_skip and aligned and _plain(mask_function, local_size, config, masking_utils):
        if attention_mask is not None:
            keys = _keys(attention_mask, kv_length, kv_offset)
        else:
            keys = torch.ones((0,) if local_size is None else (batch_size, kv_length), dtype=torch.bool, device=device)
        return keys if local_size is None else keys[:, None]
    places = {"cache_position": cache_position} if cache_position is not None else {"q_length": q_length, "q_offset": q_offset}
    return masking_utils.sdpa_mask(
        batch_size=batch_size, kv_length=kv_length, kv_offset=kv_offset, mask_function=mask_function, attention_mask=attention_mask,
        local_size=local_size, allow_is_causal_skip=allow_is_causal_skip and not keys,
        allow_is_bidirectional_skip=allow_is_bidirectional_skip and not keys, **places,
        **({} if device is None else {"device": device}), **more,
    )  # fmt: skip


def _plain(mask_function, local_size, config, masking_utils):
    """Causal, or causal within config's window: a window and a chunk say the same by local_size, and only config tells them apart."""
    if local_size is None:
        return mask_function is masking_utils.causal_mask_function
    return getattr(config, "sliding_window", None) == local_size and getattr(config, "attention_chunk_size", None) is None


def _keys(attention_mask, kv_length, kv_offset):
    """(B, kv_length): which keys of the cache are no padding. What the mask does not reach yet is hidden."""
    missing = kv_length + kv_offset - attention_mask.shape[1]
    if missing > 0:
        attention_mask = torch.nn.functional.pad(attention_mask, (0, missing))
    return attention_mask[:, kv_offset : kv_offset + kv_length]


def attend(
    module, query, key, value, attention_mask, dropout=0.0, scaling=None, is_causal=None, sliding_window=None, softcap=None, s_aux=None,
    position_bias=None, **kwargs,
):  # fmt: skip
    """query (B, H, M, D), key (B, Hkv, N, D), value (B, Hkv, N, Dv) -> (B, M, H, Dv), None: minkernels.attention."""
    keys = seen = window = None
    bias, causal = position_bias, True
    if attention_mask is None:
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        causal = "top-left" if causal and query.shape[2] > 1 else False
    elif (dims := attention_mask.dim()) == 2:
        keys = attention_mask
    elif dims == 3:
        keys, window = attention_mask.squeeze(1), ((module.config.sliding_window if sliding_window is None else sliding_window) - 1, None)
    elif dims != 1:
        causal = False
        if attention_mask.dtype != torch.bool:  # additive, made by the model or its user
            bias = attention_mask if bias is None else bias + attention_mask
        else:
            _, heads, queries, N = attention_mask.shape
            if heads == queries == 1:
                keys = attention_mask.view(-1, N)
                if N > key.shape[2]:  # the unconditioned half of guidance attends to one state, with a mask that grows
                    keys = keys[:, : key.shape[2]]
            else:
                seen = attention_mask
    served = forward_ad._current_level < 0  # forward-mode AD, which we lack
    for name, given in kwargs.items():
        if given is not None and given is not False and name not in IGNORED:  # output_attentions, a head_mask, what we do not know
            served = False
    if served:
        try:
            out = attention(
                query, key, value, causal=causal, key_mask=keys, mask=seen, bias=bias, window=window, softcap=softcap, sinks=s_aux,
                scale=scaling, dropout_p=dropout,
            )  # fmt: skip
            return out.transpose(1, 2).contiguous(), None
        except (TypeError, ValueError):  # what it does not take: a head of 300, dropout of 1, q and v of two dtypes
            pass
    low = autocast_dtype(query)
    if low is not None and not query.dtype == key.dtype == value.dtype:  # q and k were rotated in fp32; matrix products cast
        query, key, value = (t.to(low) for t in (query, key, value))
        return attend(
            module, query, key, value, attention_mask, dropout, scaling, is_causal, sliding_window, softcap, s_aux, position_bias, **kwargs
        )
    return _library(
        module, query, key, value, attention_mask, causal, window, dropout=dropout, scaling=scaling, sliding_window=sliding_window,
        softcap=softcap, s_aux=s_aux, position_bias=position_bias, **kwargs,
    )  # fmt: skip


def _library(module, query, key, value, attention_mask, causal, window, *, cache=None, **options):
    """The same by the model's own eager function, where it has one, else by transformers' on F.scaled_dot_product_attention."""
    M, N = query.shape[2], key.shape[2]
    if causal:
        last = torch.arange(M, device=query.device)[:, None] + (0 if causal == "top-left" else N - M)  # of the keys that query i sees
        at = torch.arange(N, device=query.device)
        seen = at <= last
        if window is not None:
            seen = seen & (at >= last - window[0])
        whole = attention_mask is None or attention_mask.dim() == 1
        attention_mask = seen[None, None] if whole else seen & attention_mask.reshape(-1, 1, 1, N)
    function = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    if function is None or cache is not None:
        function = _interfaces()[0]._global_mapping["sdpa"]
        options |= {"is_causal": False, "cache": cache}
    elif attention_mask is not None and attention_mask.dtype == torch.bool:
        low = torch.finfo(query.dtype).min
        attention_mask = torch.zeros(attention_mask.shape, dtype=query.dtype, device=query.device).masked_fill(~attention_mask, low)
    given = {name: x for name, x in options.items() if x is not None or name in ("dropout", "scaling")}
    return function(module, query, key, value, attention_mask, **given)
