"""NMS in CUDA C++, without a GPU: the decision code on a CPU, thread by thread, and the whole source through nvcc."""

import ctypes
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from minkernels import _build
from minkernels.nms import _cuda, reference
from minkernels.nms._common import new_outputs, round_down
from nms_cases import THRESHOLDS, clusters, fuzz, sparse, uniform

SOURCES = _build.sources() / "ops" / "cuda"
TYPES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}
FLAGS = ["-O2", "-std=c++17", "-fPIC", "-shared", "-ffp-contract=off"]


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    """nms_cuda_host.cpp."""
    path = tmp_path_factory.mktemp("nms") / "host.so"
    subprocess.run(["g++", *FLAGS, str(Path(__file__).with_name("nms_cuda_host.cpp")), "-o", str(path)], check=True)
    library = ctypes.CDLL(str(path))
    library.nms_on_host.restype = None
    for function in (library.plan_launches, library.plan_bytes):
        function.restype, function.argtypes = ctypes.c_int64, [ctypes.c_int64] * 2 + [ctypes.c_bool] * 2
    return library


def run(host, boxes, scores, class_ids, iou_threshold, score_threshold, max_output, drop=True, backwards=False):
    B, N = scores.shape
    boxes, scores = boxes.contiguous(), scores.contiguous()
    outputs = new_outputs(scores, max_output, True)
    classes = None if class_ids is None else class_ids.contiguous()
    pointer, low = ctypes.c_void_p, 0.0 if score_threshold is None else round_down(score_threshold)
    host.nms_on_host(
        pointer(boxes.data_ptr()), pointer(scores.data_ptr()), pointer(None if classes is None else classes.data_ptr()), TYPES[boxes.dtype],
        B, N, ctypes.c_float(round_down(iou_threshold)), drop, score_threshold is not None, ctypes.c_float(low), ctypes.c_int64(max_output),
        backwards, *(pointer(t.data_ptr()) for t in outputs),
    )  # fmt: skip
    return outputs


def check(host, *case):
    expected = reference.nms_padded(*case, True)
    for backwards in (False, True):
        for name, a, e in zip(("indices", "counts", "suppressor"), run(host, *case, backwards=backwards), expected, strict=True):
            assert torch.equal(a, e), f"{name} of images {(a != e).nonzero()[:, 0].unique()[:5].tolist()} ... differ"


@pytest.mark.parametrize("N", [0, 1, 9, 63, 64, 65, 150])
def test_small_images(N, host):
    """One CTA an image; blocks of 64."""
    for i in range(8):
        boxes, scores, class_ids = fuzz(10, N, list(TYPES)[i % 3], seed=N + i)
        max_output = [max(1, N), 1, 70, max(1, N // 3)][i % 4]
        check(host, boxes, scores, class_ids if i % 2 else None, THRESHOLDS[i], [None, 0.0][i % 2], max_output)


@pytest.mark.parametrize("N", [1024, 1025, 2300])
@pytest.mark.parametrize("max_output", [2300, 500, 3])
def test_large_images(N, max_output, host):
    """A tile that is full; then tiles, and what each pushes to the later ones; an image that ends early beside one that does not."""
    for make in (clusters, uniform, sparse):
        boxes, scores, class_ids = (t.unflatten(0, (2, N)) for t in make(2 * N, 3))
        scores[1] -= 0.9
        check(host, boxes, (scores * 300).round(), class_ids if make is not sparse else None, 0.3, -20.0, max_output)


def test_torchvisions_rule(host):
    boxes, scores, class_ids = fuzz(6, 200, seed=5)
    boxes[:, ::9, 1] = scores[:, ::7] = torch.nan
    indices, counts, _ = run(host, boxes, scores, class_ids, 0.3, None, 200, drop=False)
    for b in range(6):
        assert torch.equal(indices[b, : counts[b]], reference.nms(boxes[b], scores[b], class_ids[b], 0.3))


def test_chain(host):
    N, left = 3000, torch.arange(3000.0)
    boxes = torch.stack([left, torch.zeros(N), left + 1.8, torch.ones(N)], 1)
    _, counts, suppressor = run(host, boxes[None], (1 - left / N)[None], None, 0.25, None, N)
    assert counts.tolist() == [N // 2] and torch.equal(suppressor[0, 1::2], torch.arange(0, N, 2))


def test_launches_and_scratch(host):
    """Known before the data is: one launch up to 1024 boxes, then two a tile; scratch of 60 bytes a box at most."""
    cases = (1, 1000, True, 1), (32, 1000, True, 1), (1, 10_000, False, 2 + 10 + 9), (1, 200_000, True, 2 + 196 + 195)
    for B, N, classes, expected in cases:
        assert host.plan_launches(B, N, classes, False) == expected
        assert host.plan_launches(B, N, classes, True) == expected + (N > 1024)
        bytes = host.plan_bytes(B, N, classes, True)
        assert bytes == 0 if N <= 1024 else bytes <= 60 * B * N
    assert host.plan_launches(0, 5, True, True) == 0


needs_nvcc = pytest.mark.skipif(not _build.nvcc(), reason="needs nvcc")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """nms.cu, as the build compiles it, against the headers of this torch, which need not have CUDA."""
    path = tmp_path_factory.mktemp("cuda") / "nms.o"
    nvcc = _build.nvcc()
    subprocess.run([nvcc, *shlex.split(_build.nvcc_flags(nvcc)), "-c", str(SOURCES / "nms.cu"), "-o", str(path)], check=True)
    return path


@needs_nvcc
def test_compiles_for_every_architecture(compiled):
    from aot import CUOBJDUMP

    listed = subprocess.run([CUOBJDUMP, "--list-elf", compiled], check=True, capture_output=True, text=True).stdout
    assert all(f"sm_{arch}" in listed for arch in _build.ARCHES), listed
    usage = subprocess.run([CUOBJDUMP, "--dump-resource-usage", compiled], check=True, capture_output=True, text=True).stdout
    ours = re.findall(r"Function \S*nms_cuda\S*:\n(.*)", usage)
    assert len(ours) == 6 * len(_build.ARCHES), "kernels"
    for line in ours:
        shared = int(re.search(r"SHARED:(\d+)", line)[1])
        assert "STACK:0 " in line and "LOCAL:0 " in line and shared <= 48 << 10, line


@needs_nvcc
def test_links_where_torch_has_no_cuda(compiled, tmp_path):
    """One library for every torch: what is CUDA's is found as it runs, or is not used."""
    library = tmp_path / "nms.so"
    subprocess.run(["g++", str(compiled), "-o", str(library), *shlex.split(_build.link_flags(_build.nvcc()))], check=True)
    code = "import sys, torch; torch.ops.load_library(sys.argv[1]); print(torch.ops.minkernels._nms_cuda.default)"
    result = subprocess.run([sys.executable, "-c", code, str(library)], capture_output=True, text=True)
    assert result.returncode == 0 and "minkernels._nms_cuda" in result.stdout, result.stderr


@needs_nvcc
def test_decides_without_contraction(tmp_path):
    """IEEE divisions and no fused multiply-add, whatever the flags."""
    source = tmp_path / "decide.cu"
    source.write_text(
        f'#include "{SOURCES / "nms_tile.h"}"\nusing namespace minkernels::nms_cuda;\n'
        "__global__ void decide(const Box* a, bool* out, float t) { *out = suppresses(a[0], a[1], t); }\n"
    )
    subprocess.run([_build.nvcc(), "-ptx", "-O3", "-std=c++17", "-arch=sm_90", "-o", str(tmp_path / "x.ptx"), str(source)], check=True)
    ptx = (tmp_path / "x.ptx").read_text()
    assert "div.rn.f32" in ptx and "fma" not in ptx and ".approx" not in ptx and ".ftz" not in ptx


def test_without_nvcc_or_cuda_nothing_of_it_is_built(monkeypatch, tmp_path):
    for version, path, expected in (("13.0", "/usr/bin/nvcc", True), (None, "/usr/bin/nvcc", False), ("13.0", None, False)):
        monkeypatch.setattr(torch.version, "cuda", version)
        monkeypatch.setattr(_build, "nvcc", lambda path=path: path)
        monkeypatch.setattr(_build, "nvcc_flags", lambda nvcc: "FLAGS")
        monkeypatch.setattr(_build, "link_flags", lambda nvcc: f"LINK {nvcc}")
        text = _build._ninja_file(_build.sources(), tmp_path)
        assert ("nms_cuda.o" in text) == ("compile_cuda" in text) == expected
        assert f"LINK {path if expected else None}" in text


gpu = pytest.mark.skipif(not (torch.cuda.is_available() and _cuda.built()), reason="needs a CUDA device, and a library built with nvcc")


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("N", [1, 65, 1024, 1025, 5000])
def test_on_the_device(N):
    for i in range(8):
        boxes, scores, class_ids = fuzz(9, N, list(TYPES)[i % 3], seed=N + i)
        case = boxes, scores, class_ids if i % 2 else None, THRESHOLDS[i], [None, 0.0][i % 2], [N, 1, max(1, N // 3)][i % 3]
        actual = _cuda.nms_padded(*(t.cuda() if isinstance(t, torch.Tensor) else t for t in case), True)
        assert all(torch.equal(a.cpu(), e) for a, e in zip(actual, reference.nms_padded(*case, True), strict=True))


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("N", [1000, 3000])
def test_cuda_graph(N):
    """Replayed over other boxes, of which others are kept."""
    boxes, scores, class_ids = (t[None].cuda() for t in clusters(N, 5))
    args = boxes, scores, class_ids, 0.5, None, N
    _cuda.nms_padded(*args, True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = _cuda.nms_padded(*args, True)
    for make in (uniform, clusters):
        for t, new in zip((boxes, scores, class_ids), make(N, 5), strict=True):
            t.copy_(new[None])
        graph.replay()
        expected = reference.nms_padded(*(t.cpu() for t in (boxes, scores, class_ids)), 0.5, None, N, True)
        assert all(torch.equal(a.cpu(), e) for a, e in zip(outputs, expected, strict=True))
