"""How attention is fast on a CPU: csrc/ops/cpu/attention_kernel.h and merge_kernel.h."""

import torch

from minkernels.attention._options import grads_like, merge_like, row_deltas, sinks_grad

fwd = torch.ops.minkernels.attention_fwd.default  # C++ alone
_bwd = torch.ops.minkernels._attention_bwd.default
_merge_fwd = torch.ops.minkernels._merge_fwd.default
_merge_bwd = torch.ops.minkernels._merge_bwd.default


def bwd(do, dlse, q, k, v, o, lse, *options):
    *options, bias_grad = options
    bias, sinks, dlse = *options[:2], dlse if dlse is None else dlse.contiguous()
    grads = grads_like(q, k, v, bias, sinks, bias_grad)
    dbias = None
    if bias_grad:  # where all keys share it, a sum for each query: the kernel's tasks are blocks of keys
        shape = bias.shape if bias.shape[3] != 1 else (*q.shape[:3], 1)
        dbias = torch.zeros(shape, dtype=torch.promote_types(q.dtype, torch.float32))
    _bwd(do, dlse, q, k, v, o, lse, *options, *grads[:3], dbias)
    if bias_grad:
        grads[3].copy_(dbias.sum_to_size(bias.shape))
    if sinks is not None:
        grads[4].copy_(sinks_grad(row_deltas(do, o, dlse, sinks.dtype), lse, sinks))
    return grads


def merge_fwd(out1, lse1, out2, lse2):
    out, lse = merge_like(out1, lse1)
    _merge_fwd(out1, lse1.contiguous(), out2, lse2.contiguous(), out, lse)
    return out, lse


def merge_bwd(dout, dlse, out1, lse1, out2, lse2):
    dlse = dlse if dlse is None else dlse.contiguous()
    grads = merge_like(out1, lse1, out2, lse2)
    _merge_bwd(dout, dlse, out1, lse1.contiguous(), out2, lse2.contiguous(), *grads)
    return grads
