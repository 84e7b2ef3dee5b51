"""What the tests of several models share."""

import torch


def scaled(model, scale):
    """With weights so large that what comes before matters."""
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(scale) if p.dim() == 2 else p.add_(0.1 * torch.randn_like(p))
    return model
