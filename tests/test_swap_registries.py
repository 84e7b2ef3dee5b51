"""What other packages call by name: torchvision::nms, torch.nn.attention's flash attention, and the layers of Hugging Face's kernels.
torchvision has no library for every torch: a stand-in has its operator's schema and its Python functions' shape."""

import importlib.util
import inspect
import json
import sys
import types

import pytest
import torch
import torch.nn.attention
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import minkernels
from minkernels.__main__ import main
from minkernels.nms import reference
from minkernels.swap import layers, sdpa
from swap_cases import judged, ours

pytestmark = pytest.mark.usefixtures("library")
SCHEMA = "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


@pytest.fixture
def boxes(monkeypatch):
    """torchvision.ops.boxes: nms and batched_nms, which calls the operator for each class, or once for boxes moved apart."""
    assert "torchvision" not in sys.modules and not torch._C._jit_get_schemas_for_operator("torchvision::nms")
    with torch.library._scoped_library("torchvision", "DEF") as library:
        library.define(SCHEMA)
        library.impl("nms", lambda dets, scores, threshold: reference.nms(dets, scores, None, threshold), "CPU")
        ops, found = types.ModuleType("torchvision.ops"), types.ModuleType("torchvision.ops.boxes")

        def nms(boxes, scores, iou_threshold):
            return torch.ops.torchvision.nms(boxes, scores, iou_threshold)

        def batched_nms(boxes, scores, idxs, iou_threshold):
            if boxes.numel() > 4000:
                keep = torch.zeros_like(scores, dtype=torch.bool)
                for label in idxs.unique():
                    of_label = torch.where(idxs == label)[0]
                    keep[of_label[nms(boxes[of_label], scores[of_label], iou_threshold)]] = True
                kept = torch.where(keep)[0]
                return kept[scores[kept].sort(descending=True)[1]]
            apart = idxs.to(boxes) * (boxes.max() + 1)
            return nms(boxes + apart[:, None], scores, iou_threshold)

        nms.__module__ = batched_nms.__module__ = "torchvision.ops.boxes"
        found.nms, found.batched_nms, ops.boxes, ops.nms = nms, batched_nms, found, nms
        package = types.ModuleType("torchvision")
        package.ops = ops
        for module in (package, ops, found):
            monkeypatch.setitem(sys.modules, module.__name__, module)
        yield found


def scene(N, dtype=torch.float32):
    corners = torch.rand(N, 2) * 100
    return torch.cat([corners, corners + torch.rand(N, 2) * 20], 1).to(dtype), torch.rand(N).to(dtype), torch.randint(3, (N,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("N", [0, 1, 300, 1500])
def test_nms(boxes, N, dtype):
    dets, scores, idxs = scene(N, dtype)
    expected = boxes.nms(dets, scores, 0.4), boxes.batched_nms(dets, scores, idxs, 0.4) if N else None
    for _ in range(2):  # and again, after it was taken back
        with minkernels.swapped():
            kept, names = ours(boxes.nms, dets, scores, 0.4)
            assert names == ["nms"] and torch.equal(kept, expected[0])
            if N:
                kept, names = ours(boxes.batched_nms, dets, scores, idxs, 0.4)
                assert set(names) == {"nms"} and torch.equal(kept, expected[1])
            assert ours(torch.ops.torchvision.nms.default, dets, scores, 0.4)[1] == ["nms"]
        assert ours(boxes.nms, dets, scores, 0.4)[1] == []


def test_nms_that_we_lack_is_torchvisions(boxes):
    dets, scores, _ = scene(9)
    thresholds = 1.5, True, torch.tensor(0.5)
    others = (dets, scores.double(), 0.5), (dets.as_subclass(nn.Parameter), scores[:0], 0.5)
    for args in (*others, *((dets, scores, threshold) for threshold in thresholds)):
        try:
            expected, error = boxes.nms(*args), None
        except Exception as raised:
            expected, error = None, type(raised)
        with minkernels.swapped():
            if error:
                with pytest.raises(error):
                    boxes.nms(*args)
            else:
                kept, names = ours(boxes.nms, *args)
                assert names == [] and torch.equal(kept, expected)


def test_modules_that_call_torchvision(boxes):
    class Detector(nn.Module):
        def forward(self, dets, scores, idxs):
            return boxes_module.batched_nms(dets, scores, idxs, 0.4)

    global boxes_module
    boxes_module = boxes
    args, detector = scene(200), Detector()
    expected = detector(*args)
    report = minkernels.swap(detector, strict=True)
    assert [(r.what, r.by) for r in report.replaced] == [("boxes_module.batched_nms", "nms, in its forward")]
    kept, names = ours(detector, *args)
    assert names == ["nms"] and torch.equal(kept, expected)
    minkernels.unswap(detector)
    assert ours(detector, *args)[1] == []


def test_without_torchvision():
    vars(torch.ops).pop("torchvision", None)  # left by a stand-in's end
    with minkernels.swapped():
        pass
    assert "torchvision" not in vars(torch.ops)  # asking would have left its name there


FLASH = "aten::_scaled_dot_product_flash_attention"


def cuda_kernels():
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    return [has(FLASH + end, "CUDA") for end in ("", "_backward")]


def flash_registrations():
    return [row for row in torch._C._dispatch_dump(FLASH).splitlines() if row.startswith("CUDA")]


def test_flash_is_registered_and_restored():
    attention, before = torch.nn.attention, (cuda_kernels(), flash_registrations())
    assert "minkernels" not in attention.list_flash_attention_impls()  # never on import
    sdpa.register_flash()
    try:
        assert "minkernels" in attention.list_flash_attention_impls() and attention.current_flash_attention_impl() is None
        assert (cuda_kernels(), flash_registrations()) == before
        for _ in range(2):
            attention.activate_flash_attention_impl("minkernels")
            assert attention.current_flash_attention_impl() == "minkernels"
            assert cuda_kernels() == [True, True] and "sdpa.py" in "".join(flash_registrations())
        attention.restore_flash_attention_impl()
        assert (cuda_kernels(), flash_registrations()) == before
    finally:
        attention._registry._FLASH_ATTENTION_IMPLS.pop("minkernels", None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("causal, heads, scale", [(False, 4, None), (True, 4, 0.3), (True, 2, None)])
def test_flash_wire_format(causal, heads, scale, dtype):
    """Shapes, dtypes and strides are those that PyTorch promises its compiler; gradients by hand are those of autograd."""
    shape, keys = (2, 4, 16, 32), (2, heads, 16, 32)
    q, k, v, do = (torch.randn(s).to(dtype) for s in (shape, keys, keys, shape))
    results = sdpa.forward(q, k, v, 0.0, causal, scale=scale)
    with FakeTensorMode():
        fakes = [torch.empty(t.shape, dtype=dtype, device="cuda") for t in (q, q, q)]  # PyTorch's promise knows no shared heads
        promised = torch.ops.aten._scaled_dot_product_flash_attention(*fakes, 0.0, causal, scale=scale)
    for ours_, theirs in zip(results, promised, strict=True):
        if isinstance(theirs, torch.Tensor):
            assert (ours_.shape, ours_.dtype, ours_.stride()) == (theirs.shape, theirs.dtype, theirs.stride())
        else:
            assert ours_ == theirs
    grads = sdpa.backward(do, q, k, v, *results[:4], 16, 16, 0.0, causal, *results[6:8], scale=scale)

    def plain(dtype):
        inputs = [t.to(dtype).requires_grad_() for t in (q, k, v)]
        out = F.scaled_dot_product_attention(*inputs, is_causal=causal, scale=scale, enable_gqa=heads != 4)
        return [out.detach(), *torch.autograd.grad(out, inputs, do.to(dtype))]

    judged([results[0], *grads], plain(dtype), plain(torch.float64), dtype)


def test_flash_dropout():
    q, do = torch.randn(1, 2, 64, 32).bfloat16(), torch.randn(1, 2, 64, 32).bfloat16()
    ones = torch.ones_like(q)
    out, *rest = sdpa.forward(q, q, ones, 0.5, False)
    again = sdpa.forward(q, q, ones, 0.5, False)[0]
    assert not torch.equal(out, again)  # another seed
    *_, dv = sdpa.backward(do, q, q, ones, out, *rest[:3], 64, 64, 0.5, False, *rest[5:7])
    # the backward drops what the forward dropped: <out(v), do> is linear in v, so it equals <v, dv>
    torch.testing.assert_close((ones * dv).float().sum(), (out * do).float().sum(), rtol=0.02, atol=0.3)
    with pytest.raises(ValueError, match="return_debug_mask must be False"):
        sdpa.forward(q, q, q, 0.0, False, True)


LAYERS = [layer.__name__ for layer in layers.LAYERS]


def test_layers_are_stateless():
    """What kernels asks of a layer: nn.Module's constructor, no members but forward, and the arguments of whom it stands for."""
    for name in LAYERS:
        ours_, theirs = getattr(layers, name), getattr(nn, name)
        assert ours_.__init__ is nn.Module.__init__ and {*dir(ours_)} - {*dir(nn.Module)} == {"can_torch_compile"}
        assert [*inspect.signature(ours_.forward).parameters][1:] == [*inspect.signature(theirs.forward).parameters][1:]


class Halved(nn.CrossEntropyLoss):
    def forward(self, input, target):
        return super().forward(input, target) / 2


@pytest.mark.parametrize("by", ["hand", "kernels"])
def test_kernels_layout(tmp_path, by, monkeypatch, capsys):
    """By hand, as kernels does it; and by kernels where that is installed."""
    monkeypatch.setattr(sys, "argv", ["minkernels", "kernels-layout", str(tmp_path / "new")])
    assert main() == 0 and "torch-cuda" in capsys.readouterr().out
    (tmp_path / "file").touch()
    monkeypatch.setattr(sys, "argv", ["minkernels", "kernels-layout", str(tmp_path / "file")])
    assert main() == 1 and capsys.readouterr().err == f"error: cannot write {tmp_path / 'file'}: Not a directory\n"
    modules = nn.ModuleDict({name: getattr(nn, name)(*(8, 2) if name == "MultiheadAttention" else ()) for name in LAYERS})
    modules["theirs"] = Halved()
    if by == "kernels":
        pytest.importorskip("kernels.layer")  # kernels alone may be a folder of that name
        import kernels

        for name in LAYERS:
            monkeypatch.setattr(getattr(nn, name), "kernel_layer_name", name, raising=False)
            monkeypatch.setattr(getattr(nn, name), "kernel_condition", staticmethod(layers.plain), raising=False)
        mapping = {name: {"cpu": kernels.LocalLayerRepository(tmp_path / "new", layer_name=name)} for name in LAYERS}
        with kernels.use_kernel_mapping(mapping):
            kernels.kernelize(modules, mode=kernels.Mode.TRAINING | kernels.Mode.TORCH_COMPILE, device="cpu")
    else:
        folder = tmp_path / "new" / "build" / "torch-cpu"
        metadata = json.loads((folder / "metadata.json").read_text())
        assert metadata["id"] not in sys.modules and metadata["backend"] == {"type": "cpu"}
        spec = importlib.util.spec_from_file_location(metadata["id"], folder / "__init__.py")
        package = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, metadata["id"], package)
        spec.loader.exec_module(package)
        for name, module in modules.items():
            if layers.plain(module):
                module.forward = types.MethodType(getattr(package.layers, name).forward, module)
    assert "forward" not in vars(modules["theirs"])
    x, labels = torch.randn(4, 8), torch.randint(8, (4,))
    calls = {
        "CrossEntropyLoss": (lambda m: m(x, labels), "cross_entropy_fwd"),
        "BCEWithLogitsLoss": (lambda m: m(x, x.sigmoid()), "sigmoid_loss_fwd"),
        "MultiheadAttention": (lambda m: m(x, x, x, need_weights=False)[0], "attention_fwd"),
    }
    for name, (call, op) in calls.items():
        result, names = ours(call, modules[name])
        assert names == [op]
        del modules[name].forward
        torch.testing.assert_close(result, call(modules[name]))
