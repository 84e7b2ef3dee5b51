"""What all ops promise of PyTorch's transforms together."""

import pytest
import torch
from torch.utils._pytree import tree_leaves, tree_map

from op_cases import OPS

DIFFERENTIABLE = {name: case for name, case in OPS.items() if case[3]}


@pytest.mark.parametrize("op, args, options, grads, _", DIFFERENTIABLE.values(), ids=DIFFERENTIABLE)
def test_a_compiled_gradient_is_the_gradient(op, args, options, grads, _, library):
    """Of its own inputs torch.compile tells a function in torch.func.grad that they require no gradient; then it was silently 0."""
    options = tree_map(lambda t: t.detach() if isinstance(t, torch.Tensor) else t, options)

    def weighed(*args):
        found = [t for t in tree_leaves(op(*args, **options)) if t.is_floating_point()]
        return sum((t * torch.linspace(0.5, 1.5, t.numel()).view(t.shape)).sum() for t in found)

    torch.compiler.reset()
    gradient = torch.func.grad(weighed, argnums=tuple(range(grads)))
    expected = gradient(*args)
    assert all(t.abs().max() > 0 for t in expected)
    torch.testing.assert_close(torch.compile(gradient, fullgraph=True, backend="aot_eager")(*args), expected, rtol=1e-4, atol=1e-5)
