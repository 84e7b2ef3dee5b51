"""How attention is fast on a CPU: csrc/ops/cpu/attention_kernel.h and merge_kernel.h."""

import torch

from minkernels.attention._options import merge_like

fwd = torch.ops.minkernels.attention_fwd.default  # C++ alone
bwd = torch.ops.minkernels.attention_bwd.default
_merge_fwd = torch.ops.minkernels._merge_fwd.default
_merge_bwd = torch.ops.minkernels._merge_bwd.default


def merge_fwd(out1, lse1, out2, lse2):
    out, lse = merge_like(out1, lse1)
    _merge_fwd(out1, lse1.contiguous(), out2, lse2.contiguous(), out, lse)
    return out, lse


def merge_bwd(dout, dlse, out1, lse1, out2, lse2):
    dlse = dlse if dlse is None else dlse.contiguous()
    grads = merge_like(out1, lse1, out2, lse2)
    _merge_bwd(dout, dlse, out1, lse1.contiguous(), out2, lse2.contiguous(), *grads)
    return grads
