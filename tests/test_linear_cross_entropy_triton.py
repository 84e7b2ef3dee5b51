"""linear_cross_entropy as a GPU does it, PyTorch's products and the Triton kernels, against fp64; interpreted on a CPU."""

import os
from types import SimpleNamespace

import pytest
import torch
from torch.utils._pytree import tree_map

from cross_entropy_cases import OPTIONS, REDUCTIONS
from test_linear_cross_entropy import DTYPES, SHAPES, check

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not (INTERPRETED or torch.cuda.is_available()):
    pytest.skip("needs a CUDA device, or TRITON_INTERPRET=1 in a process of its own", allow_module_level=True)

from minkernels.linear_cross_entropy import _triton  # noqa: E402  Triton reads TRITON_INTERPRET as it is imported

pytestmark = [pytest.mark.interpret, pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")]  # NumPy on inf - inf


@pytest.mark.parametrize("name", ["plain", "weighted-smoothing", "all", "probs-all"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES[:1] if INTERPRETED else DTYPES[:3], ids=str)  # a CPU has no float32 product of 16-bit matrices
def test_triton(shape, reduction, name, dtype, device):
    def to(device, tree):
        return tree_map(lambda t: t.to(device) if isinstance(t, torch.Tensor) else t, tree)

    fwd, grad = (lambda *args, f=f: to("cpu", f(*to(device, args))) for f in (_triton.fwd, _triton.grad))
    check(SimpleNamespace(fwd=fwd, grad=grad), shape, dtype, OPTIONS[name], reduction, str(dtype))


def test_where_halves_are_summed_in_halves(device):
    """torch.backends.cuda.matmul.allow_fp16_accumulation: then no product of float16 matrices has a float32 result."""
    grads, inputs = torch.randn(2, 8, 5, dtype=torch.float16, device=device), torch.randn(2, 8, 3, dtype=torch.float16, device=device)
    total = _triton.Sum(torch.empty(5, 3, dtype=torch.float16, device=device), chunks=2)
    matmul = torch.backends.cuda.matmul
    before, matmul.allow_fp16_accumulation = matmul.allow_fp16_accumulation, True
    try:
        for grad, input in zip(grads, inputs, strict=True):
            total.add(grad, input)
    finally:
        matmul.allow_fp16_accumulation = before
    total.finish()
    expected = torch.einsum("cnv,cnh->vh", grads.float(), inputs.float()).half()
    torch.testing.assert_close(total.out, expected, rtol=5e-3, atol=5e-3)
