"""What is active on this machine, and why: minkernels.info()."""

import importlib.metadata
import importlib.util
import os
import platform
from dataclasses import dataclass, field

import torch

from minkernels import _library

FAMILIES = "attention", "cross_entropy", "linear_cross_entropy", "segmentation", "boxes", "nms", "soft_nms", "yolo"


@dataclass(frozen=True)
class Info:
    """What `python -m minkernels` prints. missing: what would make this machine faster, each with its remedy."""

    version: str
    python: str
    torch: str
    triton: str | None
    cpu: str
    cpu_features: str | None  # None without the library
    cpu_level: str | None  # the instruction set that the C++ kernels use; None without the library
    threads: int
    gpus: tuple[str, ...]
    library: str  # the path of _ops.so and how it was built, or why it is not there
    host: str  # the path of _host, which average precision needs, or how to get it
    backends: dict[str, dict[str, str]] = field(default_factory=dict)  # op -> device -> what serves it
    missing: tuple[str, ...] = ()

    def __str__(self) -> str:
        rows = [
            ("minkernels", f"{self.version}  (Python {self.python}, torch {self.torch}, Triton {self.triton or 'not installed'})"),
            ("CPU", f"{self.cpu}, threads: {self.threads}; {self.cpu_features or 'features unknown without the C++ library'}"),
            ("GPU", ", ".join(self.gpus) or "none visible to torch"),
            ("C++ library", self.library),
            ("NumPy module", self.host),
            *((op, "; ".join(f"{device}: {what}" for device, what in devices.items())) for op, devices in self.backends.items()),
            *(("missing", text) for text in self.missing),
        ]
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {text}" for name, text in rows)


def info() -> Info:
    """Versions, devices, CPU features, and which backend serves each op on each device and why.

    Raises: RuntimeError if MINKERNELS_CPU_LEVEL names no level.
    """
    import minkernels

    missing = []
    try:
        reason = _library.cpp_missing()
        if reason:
            missing.append(f"{reason}. To build it: {_library.BUILD}")
    except ImportError as error:  # it is there, but broken
        reason = str(error)
        missing.append(reason)
    level = None if reason else torch.ops.minkernels._cpu_level()
    cpu = "the reference, slow, for want of the C++ library" if reason else f"C++ for {level}, the best level of this CPU"
    if level and os.environ.get("MINKERNELS_CPU_LEVEL") == level:
        cpu = f"C++ for {level}, as MINKERNELS_CPU_LEVEL asks"
    host = importlib.util.find_spec("minkernels._host")
    triton = _version("triton")
    if triton is None:  # nightly builds of torch bring it as pytorch-triton
        triton = next(map(_version, importlib.metadata.packages_distributions().get("triton", ())), None)
    gpus = tuple(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
    if triton is None:
        missing.append("Triton, which the GPU kernels need: pip install triton")
    cuda = f"Triton {triton}" if triton else "none: no Triton"
    if triton and not gpus:
        built = torch.version.cuda or torch.version.hip
        cuda = f"{cuda}, once there is a device" if built else "none: this torch is built without CUDA"
    devices = {"CPU": cpu, "CUDA": cuda}
    return Info(
        version=minkernels.__version__,
        python=platform.python_version(),
        torch=torch.__version__,
        triton=triton,
        cpu=_cpu_name(),
        cpu_features=None if reason else torch.ops.minkernels._cpu_features(),
        cpu_level=level,
        threads=torch.get_num_threads(),
        gpus=gpus,
        library=reason or f"{_library.PATH} ({torch.ops.minkernels._build_info()})",
        host=host.origin if host else f"not built for this Python: pip install pybind11, then {_library.BUILD}",
        backends=dict.fromkeys(FAMILIES, devices),
        missing=tuple(missing),
    )


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
