"""Compiles what the launchers would launch, for a GPU that need not be here: a call on CPU tensors yields its kernels."""

import contextlib
import re
import subprocess
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

TARGETS = {  # name: target, bytes of shared memory that a program may take
    "sm_80": (GPUTarget("cuda", 80, 32), 163 * 1024),
    "sm_90": (GPUTarget("cuda", 90, 32), 227 * 1024),
    "sm_100": (GPUTarget("cuda", 100, 32), 227 * 1024),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 64 * 1024),
}
MORE_TARGETS = {  # compiled by `make aot` alone
    "sm_86": (GPUTarget("cuda", 86, 32), 99 * 1024),
    "sm_89": (GPUTarget("cuda", 89, 32), 99 * 1024),
    "sm_120": (GPUTarget("cuda", 120, 32), 99 * 1024),
    "gfx950": (GPUTarget("hip", "gfx950", 64), 160 * 1024),
}
ALL_TARGETS = TARGETS | MORE_TARGETS
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


class Driver:
    """All that a JITFunction asks of a driver in order to compile."""

    def __init__(self, target):
        self.target = target

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return self.target.arch  # compilations are cached by device

    def get_current_stream(self, device):
        return 0


@contextlib.contextmanager
def compiling_for(target):
    """Inside, a launch compiles and does not run. Yields the list that the compiled kernels are added to."""
    kernels, run, hip = [], JITFunction.run, torch.version.hip

    def compile_only(self, *args, grid, warmup, **kwargs):
        assert "enable_fp_fusion" in kwargs, f"{self.__name__}: not said whether products and sums may be fused, and the default changes"
        kernels.append(run(self, *args, grid=grid, warmup=True, **kwargs))

    driver.set_active(Driver(target))
    JITFunction.run = compile_only
    torch.version.hip = "6" if target.backend == "hip" else None  # launchers ask it
    try:
        yield kernels
    finally:
        JITFunction.run, torch.version.hip = run, hip
        driver.set_active(None)


def usage(kernel, folder):
    """Registers a thread, bytes a thread that did not fit into them, bytes of shared memory: "registers", "spilled", "shared"."""
    if "amdgcn" in kernel.asm:
        names = r"\.(vgpr_count|vgpr_spill_count|private_segment_fixed_size): +(\d+)"
        found = {name: int(n) for name, n in re.findall(names, kernel.asm["amdgcn"])}
        registers, spilled = found["vgpr_count"], found["private_segment_fixed_size"] + found["vgpr_spill_count"]
    else:
        cubin = folder / f"{kernel.metadata.name}.cubin"
        cubin.write_bytes(kernel.asm["cubin"])
        text = subprocess.run([CUOBJDUMP, "--dump-resource-usage", cubin], check=True, capture_output=True, text=True).stdout
        found = {name: int(n) for name, n in re.findall(r"(\w+):(\d+)", text.split("Function")[-1])}
        registers, spilled = found["REG"], found["STACK"] + found.get("LOCAL", 0)
    return dict(registers=registers, spilled=spilled, shared=kernel.metadata.shared)
