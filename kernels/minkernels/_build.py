"""Builds _ops.so and _host with ninja: what setup.py and `python -m minkernels build` both call. Imports nothing of minkernels."""

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

TORCH_TARGET = "0x020b000000000000"  # the stable ABI of torch 2.11: the library loads under every torch since
FLAGS = "-O3 -std=gnu++17 -ffp-contract=fast -fPIC -fvisibility=hidden -Wall -Wextra"
FLAGS += " -Wno-maybe-uninitialized -Wno-uninitialized -Wno-unknown-warning-option"  # gcc 12 warns of its own intrinsics
GCC = 12  # the oldest that has __builtin_shufflevector
CLANG = 18 if platform.machine() == "x86_64" else 16  # the oldest that compiles everything: there 17 crashes
EXACT = {"nms", "soft_nms", "yolo"}  # sources whose decisions have the same bits everywhere: no product is contracted with a sum
SLOWEST = {"attention", "attention_16bit", "boxes", "cross_entropy", "segmentation"}  # to compile: begun first, none is left alone
ARCHES = 80, 90, 100, 120  # of the CUDA kernels, those that the nvcc here knows; the newest as PTX too, for what comes after it
CUDA_LIBRARIES = "-lcudart_static -ldl -lrt -lpthread"  # static: a library built with CUDA 13 loads beside a torch that has 12, or none
HERE = Path(__file__).resolve().parent
HOST = f"_host{sysconfig.get_config_var('EXT_SUFFIX')}"  # the only name under which this Python imports it


def sources() -> Path:
    """csrc, in a checkout or as the package carries it."""
    for csrc in (HERE.parents[1] / "csrc", HERE / "csrc"):
        if (csrc / "ops").is_dir():
            return csrc
    raise RuntimeError(f"no C++ sources beside {HERE}: install minkernels from its repository")


def build(out: Path = HERE / "_ops.so", *, verbose: bool = False) -> Path:
    """Compiles csrc/ops into `out`, which is replaced only when all went well. Raises RuntimeError saying what is missing."""
    csrc = sources()
    if csrc.parent == HERE:
        with tempfile.TemporaryDirectory() as objects:
            return _build(csrc, Path(objects), out, verbose)
    return _build(csrc, csrc.parent / "build" / f"ops-{platform.machine()}", out, verbose)  # kept: the next build is incremental


def build_host(out: Path = HERE / HOST, *, verbose: bool = False) -> Path:
    """Compiles csrc/host, the pybind11 module for this Python alone, into `out`, as build() does."""
    csrc = sources()
    if csrc.parent == HERE:
        with tempfile.TemporaryDirectory() as objects:
            return _build(csrc, Path(objects), out, verbose, _host_ninja_file, HOST)
    return _build(csrc, csrc.parent / "build" / HOST.removesuffix(".so"), out, verbose, _host_ninja_file, HOST)


def _build(csrc: Path, objects: Path, out: Path, verbose: bool, ninja_file=None, product: str = "_ops.so") -> Path:
    rules = (ninja_file or _ninja_file)(csrc, objects)
    if not os.access(out.parent, os.W_OK):  # now, not after minutes of compiling
        raise RuntimeError(f"cannot write {out}: {out.parent} is read-only, or not there")
    try:
        objects.mkdir(parents=True, exist_ok=True)
        (objects / "build.ninja").write_text(rules)
    except OSError as error:
        raise RuntimeError(f"cannot write {objects}: {error}") from error
    command = [*_ninja(), "-C", str(objects), *(["-v"] if verbose else [])]
    result = subprocess.run(command, stdout=None if verbose else subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if result.returncode:
        raise RuntimeError(f"the C++ build failed:\n{result.stdout or '(see above)'}")
    beside = out.with_name(f"{out.name}.{os.getpid()}")
    try:
        shutil.copyfile(objects / product, beside)
        os.replace(beside, out)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise RuntimeError(f"cannot write {out}: {error}") from error
    return out


def nvcc() -> str | None:
    """The CUDA compiler: in CUDA_HOME, or on the PATH."""
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc", path=str(Path(home, "bin"))) if home else shutil.which("nvcc")


def nvcc_flags(nvcc: str) -> str:
    known = subprocess.run([nvcc, "--list-gpu-arch"], check=True, capture_output=True, text=True).stdout.split()
    arches = [arch for arch in ARCHES if f"compute_{arch}" in known]
    if not arches:
        raise RuntimeError(f"{nvcc} compiles for none of {', '.join(f'sm_{arch}' for arch in ARCHES)}")
    code = [f"-gencode arch=compute_{arch},code=sm_{arch}" for arch in arches]
    code.append(f"-gencode arch=compute_{arches[-1]},code=compute_{arches[-1]}")
    return f"-O3 -std=c++17 -fmad=false -Xcompiler -fPIC,-fvisibility=hidden -DUSE_CUDA {' '.join(code)} {_torch_flags()}"


def _torch_flags() -> str:
    from torch.utils import cpp_extension

    return f"-DTORCH_TARGET_VERSION={TORCH_TARGET} " + " ".join(f"-isystem {_quote(path)}" for path in cpp_extension.include_paths())


def link_flags(nvcc: str | None) -> str:
    from torch.utils import cpp_extension

    libraries = " ".join(f"-L{_quote(path)}" for path in cpp_extension.library_paths())
    every = "" if sys.platform == "darwin" else "-Wl,--no-as-needed"
    flags = f"-shared {libraries} {every} -ltorch -ltorch_cpu -lc10"
    if nvcc is None:
        return flags
    dry = subprocess.run([nvcc, "-dryrun", "-E", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
    found = [line.split("=", 1)[1] for line in dry.splitlines() if line.startswith("#$ LIBRARIES=")]  # it may be a script: it knows best
    return " ".join([flags, *(_quote(option) for line in found for option in shlex.split(line)), CUDA_LIBRARIES])


def _ninja_file(csrc: Path, objects: Path) -> str:
    import torch

    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 11):
        raise RuntimeError(f"it needs torch 2.11 or newer, this is {torch.__version__}")
    cuda = nvcc() if torch.version.cuda else None
    cu = [Path(os.path.relpath(path, objects)) for path in sorted((csrc / "ops" / "cuda").glob("*.cu"))] if cuda else []
    paths = sorted((csrc / "ops" / "cpu").glob("*.cpp"), key=lambda path: (path.stem not in SLOWEST, path.stem))
    cpp = [Path(os.path.relpath(path, objects)) for path in paths]  # the checkout may move
    return "\n".join([
        f"cxx = {_compiler()}",
        f"flags = {FLAGS} {_torch_flags()} {_own_flags()}",
        "rule compile",
        "  command = $cxx $flags -MD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        *([] if cuda is None else ["rule compile_cuda", f"  command = {_quote(cuda)} {nvcc_flags(cuda)} -MD -MF $out.d -c $in -o $out"]),
        *([] if cuda is None else ["  depfile = $out.d", "  deps = gcc"]),
        "rule link",
        f"  command = $cxx $in -o $out {link_flags(cuda)}",
        *(f"build {path.stem}.o: compile {_escape(path)}" + "\n  flags = $flags -ffp-contract=off" * (path.stem in EXACT) for path in cpp),
        *(f"build {path.stem}_cuda.o: compile_cuda {_escape(path)}" for path in cu),  # nms.cpp and nms.cu have a name in common
        f"build _ops.so: link {' '.join([path.stem + '.o' for path in cpp] + [path.stem + '_cuda.o' for path in cu])}",
        f"# torch {torch.__version__}",
        "",
    ])


def _host_ninja_file(csrc: Path, objects: Path) -> str:
    try:
        import pybind11
    except ImportError:
        raise RuntimeError("no pybind11: pip install pybind11") from None
    headers = sysconfig.get_path("include")
    if not Path(headers, "Python.h").exists():
        raise RuntimeError(f"no Python.h in {headers}: install Python's headers (Debian, Ubuntu: apt install python3-dev)")
    includes = " ".join(f"-isystem {_quote(path)}" for path in (headers, pybind11.get_include()))
    cpp = [Path(os.path.relpath(path, objects)) for path in sorted((csrc / "host").glob("*.cpp"))]
    return "\n".join([
        f"cxx = {_compiler()}",
        f"flags = {FLAGS} -ffp-contract=off {includes} {_own_flags()}",  # decisions are compared bit for bit
        "rule compile",
        "  command = $cxx $flags -MD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        "  command = $cxx -shared $in -o $out -pthread",
        *(f"build {path.stem}.o: compile {_escape(path)}" for path in cpp),
        f"build {HOST}: link {' '.join(path.stem + '.o' for path in cpp)}",
        "",
    ])


def _escape(path) -> str:
    """As ninja takes a path."""
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def _quote(path) -> str:
    """As a shell takes a word of a command that ninja gives it."""
    return shlex.quote(str(path)).replace("$", "$$")


def _compiler() -> str:
    asked = shlex.split(os.environ.get("CXX", ""))
    for command in [asked] if asked else (["g++"], ["c++"]):
        if shutil.which(command[0]):
            _check_compiler(command)
            return " ".join(map(_quote, command))
    if asked:
        raise RuntimeError(f"CXX names no program that runs: {asked[0]}")
    raise RuntimeError(f"no C++ compiler: install g++ {GCC} or newer (Debian, Ubuntu: apt install g++), or name one in CXX")


def _check_compiler(command: list[str]):
    """The kernels are in the vectors and shuffles of these two. What does not say what it is, the build itself may judge."""
    known = subprocess.run([*command, "-dM", "-E", "-x", "c++", os.devnull], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    macros = dict(re.findall(r"^#define (__GNUC__|__clang_major__) (\d+)", known.stdout, re.MULTILINE))
    for macro, name, oldest in ("__clang_major__", "clang", CLANG), ("__GNUC__", "g++", GCC):  # clang has both
        if macro in macros:
            if int(macros[macro]) >= oldest:
                return
            found = f"{' '.join(command)} is {name} {macros[macro]}"
            raise RuntimeError(f"{found}, and the C++ library needs g++ {GCC} or clang {CLANG}, or newer: name one in CXX")


def _own_flags() -> str:
    return " ".join(os.environ.get("CXXFLAGS", "").split()).replace("$", "$$")


def _ninja() -> list[str]:
    try:
        import ninja  # noqa: F401

        return [sys.executable, "-m", "ninja"]
    except ImportError:
        if shutil.which("ninja"):
            return ["ninja"]
    raise RuntimeError("no ninja: pip install ninja")
