"""Our attention as PyTorch's flash attention on CUDA, for the whole process, by torch.nn.attention's own registry."""

import torch
from torch import Tensor
from torch.nn.attention import register_flash_attention_impl

from minkernels.attention import ops
from minkernels.attention._options import Options

NAME = "minkernels"


def register_flash():
    """Makes "minkernels" known to torch.nn.attention; nothing runs on it until a user says so:

        from minkernels.swap import sdpa

        sdpa.register_flash()
        torch.nn.attention.activate_flash_attention_impl("minkernels")
        ...
        torch.nn.attention.restore_flash_attention_impl()

    In between, F.scaled_dot_product_attention runs on our kernels wherever PyTorch chooses flash attention, in every thread: float16 and
    bfloat16 CUDA tensors without a mask. minkernels.swapped() takes masks and float32 too. No GPU has run this yet.
    """
    register_flash_attention_impl(NAME, register_fn=_Overrides)


class _Overrides:
    """Lives while the implementation is active: torch.nn.attention keeps it, and calls remove()."""

    def __init__(self):
        self.library = torch.library.Library("aten", "IMPL", "CUDA")
        self.library.impl("_scaled_dot_product_flash_attention", forward, allow_override=True)
        self.library.impl("_scaled_dot_product_flash_attention_backward", backward, allow_override=True)

    def remove(self):
        self.library._destroy()


def forward(
    query: Tensor, key: Tensor, value: Tensor, dropout_p: float = 0.0, is_causal: bool = False, return_debug_mask: bool = False, *,
    scale: float | None = None,
) -> tuple:  # fmt: skip
    """aten::_scaled_dot_product_flash_attention: (B, H, L, D) as F.scaled_dot_product_attention has them, D padded to a multiple of 8.

    Returns: (output, logsumexp (B, H, L) float32, None, None, L, S, rng_state (2,) uint64, unused () uint64, debug mask (0,)). The first
    of rng_state is our seed, where there is dropout.
    """
    if return_debug_mask:
        raise ValueError("return_debug_mask must be False: minkernels keeps no dropout mask")
    seed = torch.randint(2**62, (), device=query.device) if dropout_p else None
    out, lse = ops._fwd(query, key, value, *_options(query, seed, dropout_p, is_causal, scale))
    state = query.new_empty(2, dtype=torch.uint64)
    if seed is not None:
        state.view(torch.int64).copy_(seed)
    return out, lse, None, None, query.shape[2], key.shape[2], state, query.new_empty((), dtype=torch.uint64), query.new_empty(0)


def backward(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, logsumexp: Tensor, cum_seq_q: None, cum_seq_k: None,
    max_q: int, max_k: int, dropout_p: float, is_causal: bool, rng_state: Tensor, unused: Tensor, *, scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """aten::_scaled_dot_product_flash_attention_backward: the gradients of query, key and value."""
    seed = rng_state.view(torch.int64)[0] if dropout_p else None
    options = _options(query, seed, dropout_p, is_causal, scale)
    return ops._bwd(grad_out, None, query, key, value, out, logsumexp, *options, False)[:3]


def _options(query, seed, dropout_p, is_causal, scale) -> Options:
    """Causal masks of F.scaled_dot_product_attention are aligned to the top left."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return Options(seed=seed, right=0 if is_causal else None, top_left=is_causal, scale=scale, dropout_p=dropout_p)
