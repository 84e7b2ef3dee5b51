"""Every kernel launched by Triton's own launcher, with the libcuda.so.1 of fake_libcuda.c, which is in TRITON_LIBCUDA_PATH: at first as
triton.jit does it, then as it was remembered. Says how long the host takes for either, the best of some calls:

    gcc -shared -fPIC -Wl,-soname,libcuda.so.1 tests/fake_libcuda.c -o build/libcuda.so.1
    TRITON_LIBCUDA_PATH=build python tests/launch_worker.py
"""

import ctypes
import os
import sys
import time

lib = ctypes.CDLL(os.path.join(os.environ["TRITON_LIBCUDA_PATH"], "libcuda.so.1"), ctypes.RTLD_GLOBAL)

import pytest  # noqa: E402
import torch  # noqa: E402
from torch import empty, ones, zeros  # noqa: E402
from triton.backends.nvidia.driver import CudaLauncher, CudaUtils  # noqa: E402
from triton.runtime import JITFunction, driver  # noqa: E402

import aot  # noqa: E402
from minkernels._triton_launch import Kernel  # noqa: E402
from minkernels.attention import _triton as attention  # noqa: E402
from minkernels.attention import _triton_merge as merge  # noqa: E402
from minkernels.attention._options import Options  # noqa: E402
from minkernels.boxes import _triton as boxes  # noqa: E402
from minkernels.cross_entropy import _triton as cross_entropy  # noqa: E402
from minkernels.cross_entropy._options import Options as SoftmaxOptions  # noqa: E402
from minkernels.nms import _triton as nms  # noqa: E402
from minkernels.segmentation import _triton as segmentation  # noqa: E402
from minkernels.soft_nms import _triton as soft_nms  # noqa: E402
from minkernels.yolo import _triton as yolo  # noqa: E402
from minkernels.yolo import _triton_loss as yolo_loss  # noqa: E402
from minkernels.yolo._options import Options as YoloOptions  # noqa: E402


class Launch(ctypes.Structure):
    _fields_ = [("name", ctypes.c_char * 64), ("sizes", ctypes.c_uint32 * 7)]  # grid, block, shared memory


class Driver(aot.Driver):
    """For launches too: Triton's own utilities and launcher."""

    def __init__(self):
        super().__init__(aot.TARGETS["sm_90"][0])
        self.utils, self.launcher_cls = CudaUtils(), CudaLauncher


def launches():
    seen = (Launch * 1024)()
    return [(seen[i].name.decode(), *seen[i].sizes) for i in range(lib.launches(seen))]


q, kv, x, ids = empty(1, 2, 64, 64), empty(1, 1, 4096, 64), empty(2, 1000), zeros(2, dtype=torch.int64)
masked = Options(key_mask=ones(1, 4096, dtype=torch.bool), right=0, scale=0.125)
biased = Options(bias=empty(1, 1, 64, 4096), left=100, kv_lens=ones(1, dtype=torch.int32), scale=0.125, softcap=3.0)
image, some, scores, labels = empty(2, 1, 8, 8), empty(2, 600, 4), empty(2, 600), zeros(2, 600, dtype=torch.int64)
detect = YoloOptions("v8", 2, 80, 640.0, 640.0, True, 0.25, 0.45, 300, False, True, 500)
CALLS = {
    "attention": lambda: attention.bwd(q, None, q, kv, kv, *attention.fwd(q, kv, kv, *masked), *masked, False),
    "attention with a bias": lambda: attention.bwd(q, None, q, kv, kv, *attention.fwd(q, kv, kv, *biased), *biased, True),
    "decoding": lambda: attention.fwd(q[:, :, :1], kv, kv, *masked),
    "merge_attention": lambda: merge.bwd(*merge.fwd(q, q[..., 0], q, q[..., 0]), q, q[..., 0], q, q[..., 0]),
    "cross_entropy": lambda: cross_entropy.fwd(x, ids, None, *SoftmaxOptions(), "mean", False, True),
    "cross_entropy of few long rows": lambda: cross_entropy.fwd(empty(2, 200000), ids, None, *SoftmaxOptions(), "mean", False, True),
    "its gradient": lambda: cross_entropy.grad(x, ids, ones(1000), empty(2, 5), *SoftmaxOptions(softcap=2.0, ignore_index=-1)),
    "its scale": lambda: cross_entropy.scale_(x, ones(())),
    "bce": lambda: segmentation.sigmoid_loss_fwd(image, image, None, None, None, -1.0, 0.0, "none", False),
    "bce_dice": lambda: segmentation.bce_dice_fwd(image, image, None, None, 1.0, 1.0, 1.0, False, False, "mean"),
    "its gradient of each entry": lambda: segmentation.bce_dice_bwd(image, image, None, None, empty(1, 3), False),
    "pairs": lambda: boxes.pairs_bwd(boxes.pairs_fwd(some, some, "iou", "xyxy", 0.0), some, some, "iou", "xyxy", 0.0, True, True),
    "match": lambda: boxes.match(some, some, "xyxy"),
    "loss": lambda: boxes.loss_bwd(boxes.loss_fwd(some[0], some[1], "giou", "xyxy", 0.0, "sum"), *some, "giou", "xyxy", 0.0, True, False),
    "nms of two tiles": lambda: nms.nms_padded(empty(2, 1500, 4), empty(2, 1500), None, 0.5, 0.1, 300, True),
    "matrix_nms": lambda: soft_nms.matrix_nms(some, scores, labels, "linear", 0.5, 0.01, 300),
    "soft_nms": lambda: soft_nms.soft_nms(some, scores, labels, "linear", 0.3, 0.5, 0.01, 300),
    "yolo_detect": lambda: yolo.detect(zeros(2, 84, 8400), *detect),
    "yolo_detect of one label": lambda: yolo.detect(zeros(2, 84, 8400), *detect._replace(multi_label=False)),
    "yolo_loss": lambda: yolo_loss.loss_fwd(empty(2, 7, 7, 30), empty(2, 7, 7, 4), zeros(2, 7, 7, dtype=torch.int64), 2, 5.0, 0.5, "sum"),
}


def main():
    driver.set_active(Driver())
    asked, launched, run, launch = [], set(), JITFunction.run, Kernel.launch

    def counted(self, *args, **kwargs):
        asked.append(self.__name__)
        return run(self, *args, **kwargs)

    def noted(self, *args, **kwargs):
        launched.add(self)
        return launch(self, *args, **kwargs)

    JITFunction.run, Kernel.launch = counted, noted
    attention._arch, attention.processors, cross_entropy.processors = lambda device: "sm_90", lambda device: 132, lambda device: 132
    for name, call in CALLS.items():
        asked.clear()
        call()
        first = launches()
        assert first and len(first) >= len(asked) > 0, f"{name}: {first}, {asked}"
        asked.clear()
        call()
        again = launches()
        assert not asked, f"{name} was not remembered: {asked}"
        assert first == again, f"{name}: {first}, and then {again}"
        remembered = best(call)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Kernel, "__getitem__", lambda self, grid: self.jit[grid])
            by_triton = best(call)
        print(f"{name}: {remembered:.1f} us, by triton.jit {by_triton:.1f}", *first, sep="\n  ")
    modules = [vars(module) for name, module in sys.modules.items() if name.startswith("minkernels.")]
    every = {k for module in modules for k in module.values() if isinstance(k, Kernel)}
    assert every == launched, f"never launched: {[k.jit for k in every - launched]}"


def best(call):
    times = []
    for _ in range(200):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
        launches()  # forgets them
    return min(times) * 1e6


main()
