"""Where the large results of CPU kernels lie: empty_like() of csrc/ops/cpu/runtime.h."""

import torch
from torch import Tensor

from minkernels._library import cpp_missing


def empty_like(x: Tensor) -> Tensor:
    """torch.empty_like(x); a large one where an earlier one lay."""
    return torch.ops.minkernels._empty_like.default(x)


def empty_cache() -> None:
    """Gives back to the system what the CPU kernels keep of large gradients of losses that are gone, to lay the next ones there; and
    the workspace of the calling thread's last attention or NMS, up to 128 MB. What the threads beside it keep, as much at most, stays.

    Of gradients that is up to 512 MB or an eighth of the machine's memory, whichever is more, or as many as the environment variable
    MINKERNELS_KEEP_MB says when it is first used; 0 keeps none. All but the newest 512 MB the system may take when it is short (MADV_FREE).
    Kept memory has its pages, which the system would zero again: loss and gradient of 1024 x 32000 logits take half the time.
    The storage of such a gradient cannot be resized. On a GPU there is torch.cuda.empty_cache().
    """
    if cpp_missing.cache_info().currsize and not cpp_missing():  # not loaded yet: nothing is kept
        torch.ops.minkernels._empty_cache.default()
