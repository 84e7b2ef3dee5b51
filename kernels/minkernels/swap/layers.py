"""Layers as Hugging Face's kernels package wants them, of which it takes the forward alone, and the folder in which it looks for them."""

import json
from pathlib import Path

from torch import nn

from minkernels.swap import modules


class CrossEntropyLoss(nn.Module):
    """For nn.CrossEntropyLoss."""

    can_torch_compile = True
    forward = modules.cross_entropy_loss


class BCEWithLogitsLoss(nn.Module):
    """For nn.BCEWithLogitsLoss."""

    can_torch_compile = True
    forward = modules.bce_with_logits_loss


class MultiheadAttention(nn.Module):
    """For nn.MultiheadAttention: in calls with need_weights=False."""

    can_torch_compile = True
    forward = modules.multihead_attention


LAYERS = CrossEntropyLoss, BCEWithLogitsLoss, MultiheadAttention


def plain(module: nn.Module) -> bool:
    """The condition of replace_kernel_forward_from_hub: a subclass inherits the layer's name, and may have a forward of its own."""
    return any(type(module).forward is getattr(nn, layer.__name__).forward for layer in LAYERS)


def write(folder: Path) -> list[Path]:
    """Writes what kernels.LocalLayerRepository(folder, layer_name=...) loads, for the CPU and for CUDA: thin files that import minkernels,
    which has to be installed beside them. Returns the folders written; what they held under these names is overwritten."""
    names = ", ".join(layer.__name__ for layer in LAYERS)
    written = []
    for backend in ("cpu", "cuda"):
        variant = Path(folder) / "build" / f"torch-{backend}"
        variant.mkdir(parents=True, exist_ok=True)
        (variant / "__init__.py").write_text('from . import layers\n\n__all__ = ["layers"]\n')
        (variant / "layers.py").write_text(f"from minkernels.swap.layers import {names}\n\n__all__ = {[c.__name__ for c in LAYERS]}\n")
        metadata = {
            "id": f"_minkernels_torch_{backend}",  # its key in sys.modules
            "name": "minkernels",
            "version": 1,  # of this layout
            "license": "MIT",
            "backend": {"type": backend},
            "python-depends": [],
        }
        (variant / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")
        written.append(variant)
    return written
