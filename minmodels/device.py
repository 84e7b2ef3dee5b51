"""Which device a command runs on."""

import torch

from minmodels import UserError


def pick_device(name: str) -> torch.device:
    """The device of that name; "" is the first CUDA device, or else the CPU. Raises UserError if it cannot be used."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.zeros(1, device=name)
        found.item()  # which meta cannot give
        return found.device
    except (RuntimeError, AssertionError, ImportError) as error:  # without CUDA an AssertionError, for others an ImportError
        there = ", ".join(["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))])
        raise UserError(f"device {name} cannot be used: not one of {there} ({str(error).splitlines()[0]})") from error
