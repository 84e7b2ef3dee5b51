"""The machine behind the numbers: what it is, and how fast its matrix products and copies really are."""

import dataclasses
import os
import subprocess
from functools import partial

import torch

import minkernels
from bench import timing


def describe(device: str, *, with_peaks: bool = True) -> dict:
    """What the JSON says of the machine, beside pytest-benchmark's own machine_info."""
    about = {
        "device": device,
        "device_name": torch.cuda.get_device_name() if device == "cuda" else None,
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,  # processes that wanted a CPU in the minute before
        "torch": torch.__version__,
        "triton": _triton_version(),
        "minkernels": minkernels.__version__,
        "info": dataclasses.asdict(minkernels.info()),
        "peaks": peaks(device) if with_peaks else {},
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        about |= {
            "driver": _driver(),
            "capability": list(torch.cuda.get_device_capability()),
            "multiprocessors": properties.multi_processor_count,
            "l2_bytes": properties.L2_cache_size,
            "memory_bytes": properties.total_memory,
        }
    return about


def peaks(device: str) -> dict[str, float]:
    """Best of a few runs on random data: GFLOP/s of a matrix product by dtype, GB/s of a copy (read plus written)."""
    sides, copy_bytes = ([8192], 1 << 30) if device == "cuda" else ([256, 512, 1024, 2048], 256 << 20)
    time_rounds = timing.cuda_rounds if device == "cuda" else timing.cpu_rounds
    rates = {}
    for dtype in (torch.float32, torch.bfloat16):
        for side in sides:
            a, b = torch.randn(2, side, side, device=device).to(dtype)
            seconds = min(time_rounds([partial(torch.matmul, a, b)], 8)[0])
            rates[str(dtype).removeprefix("torch.")] = 2 * side**3 / seconds / 1e9
            if seconds > 0.1:  # where a CPU has no instructions for a dtype, larger products take minutes
                break
    source = torch.randint(0, 256, (copy_bytes,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    rates["copy"] = 2 * copy_bytes / min(time_rounds([partial(target.copy_, source)], 8)[0]) / 1e9
    return rates


def _triton_version():
    try:
        import triton
    except ImportError:
        return None
    return triton.__version__


def _driver():
    try:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(query, capture_output=True, text=True, check=True, timeout=30).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return None
