"""How attention is fast on a CPU: csrc/ops/cpu/attention_kernel.h and merge_kernel.h. C++ alone."""

import torch

fwd = torch.ops.minkernels.attention_fwd.default
bwd = torch.ops.minkernels.attention_bwd.default
