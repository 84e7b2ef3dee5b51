"""Fused kernels for PyTorch: attention and cross-entropy, on GPUs (Triton) and on CPUs (C++)."""

from minkernels._info import info
from minkernels.attention.ops import attention, attention_varlen, merge_attention
from minkernels.cross_entropy.ops import cross_entropy

__version__ = "0.1.0"
__all__ = ["attention", "attention_varlen", "cross_entropy", "info", "merge_attention"]
