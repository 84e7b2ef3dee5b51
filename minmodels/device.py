"""Which device a command runs on."""

import torch

from minmodels import UserError


def pick_device(name: str) -> torch.device:
    """The device of that name; "" is the first CUDA device, or else the CPU. Raises UserError if it cannot be used."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # AssertionError: a torch built without CUDA
        raise UserError(f"device {name} cannot be used: {str(error).splitlines()[0]}") from error
