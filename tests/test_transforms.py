"""What all ops promise of PyTorch's transforms together."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.func import grad, vmap
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import minkernels
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


@pytest.mark.parametrize("op", [minkernels.cross_entropy, minkernels.bce_with_logits])
def test_logits_written_to_before_the_backward(op, library):
    """As eagerly, and as PyTorch's cross-entropy: the graph keeps what its backward reads."""
    x, target = torch.randn(5, 7), torch.rand(5, 7)

    def step(x):
        logits = x * 1
        loss = op(logits, target)
        logits.mul_(2)
        return loss

    torch.compiler.reset()
    eager, compiled = (torch.autograd.grad(f(leaf := x.clone().requires_grad_()), leaf)[0]
                       for f in (step, torch.compile(step, fullgraph=True, backend="aot_eager")))  # fmt: skip
    torch.testing.assert_close(compiled, eager)


@pytest.mark.parametrize("name", ["cross_entropy", "linear_cross_entropy", "bce_with_logits"])
def test_compiled_autograd(name, library):
    """Each backward gives the same: what the forward has written is not taken, and scaled, again."""
    op, args, options, grads, _ = OPS[name]
    leaves = [t.clone().requires_grad_() for t in args[:grads]]
    loss = op(*leaves, *args[grads:], **options) * 3
    expected = torch.autograd.grad(op(*leaves, *args[grads:], **options) * 3, leaves)
    torch.compiler.reset()
    with torch._dynamo.config.patch(compiled_autograd=True):
        backward = torch.compile(lambda: loss.backward(retain_graph=True), backend="eager")
        for _ in range(3):
            for leaf in leaves:
                leaf.grad = None
            backward()
            torch.testing.assert_close(tuple(leaf.grad for leaf in leaves), expected)


def test_batched_gradients_of_probabilities(library):
    x, target = torch.randn(2, 5, 7), torch.rand(5, 7)
    ours, theirs = (vmap(grad(op, (0, 1)), (0, None))(x, target) for op in (minkernels.cross_entropy, F.cross_entropy))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("op, args, options, grads, _", DIFFERENTIABLE.values(), ids=DIFFERENTIABLE)
@pytest.mark.parametrize("saved", [False, True], ids=["recomputed", "saved"])
def test_a_checkpoint(saved, op, args, options, grads, _, library):
    """Around all of it, or with our results saved: PyTorch refuses what was saved and is then written to."""

    def policy(context, op, *args, **kwargs):
        return CheckpointPolicy.MUST_SAVE if saved and op.namespace == "minkernels" else CheckpointPolicy.PREFER_RECOMPUTE

    def step(*args):
        found = tree_leaves(op(*(t * torch.ones_like(t) for t in args[:grads]), *args[grads:], **options))
        return sum(t.sum() for t in found if t.is_floating_point())

    leaves = [t.clone().requires_grad_() for t in args[:grads]]
    context = partial(create_selective_checkpoint_contexts, policy)
    actual = checkpoint(step, *leaves, *args[grads:], use_reentrant=False, context_fn=context)
    expected = torch.autograd.grad(step(*leaves, *args[grads:]) / 3, leaves)
    torch.testing.assert_close(torch.autograd.grad(actual / 3, leaves), expected)


@pytest.mark.parametrize("name", ["cross_entropy", "linear_cross_entropy", "sigmoid_focal_loss"])
def test_a_checkpoint_keeps_no_gradient(name, library):
    op, args, options, grads, _ = OPS[name]
    leaves = [t.clone().requires_grad_() for t in args[:grads]]

    def kept(run):
        losses = []
        run(lambda *leaves: losses.append(op(*leaves, *args[grads:], **options)) or losses[0], *leaves)
        node = losses[0].grad_fn
        return node.early

    assert kept(lambda f, *args: f(*args)) is not None
    assert kept(partial(checkpoint, use_reentrant=False)) is None
