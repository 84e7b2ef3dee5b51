"""The error budget that every kernel is held to: design, not taste."""

import torch


def assert_close(actual, plain, exact, dtype, what="output", cancelled=0.0, draws=1, size=0.0):
    """max|actual - exact| <= 2 max|plain - exact| + 2 eps max|exact|, where exact is fp64 and plain the textbook formula rounded to
    dtype after every step, or several tensors: the formula with its sums in several orders, of which the worst error counts.
    An fp64 kernel has no wider judge than fp64 itself: it may be off by 256 roundings of the largest value.
    Where exact is 0 because two sums cancel (a softmax over one key has no gradient), their size, `cancelled`, stands for it.
    Where it is the difference of two terms, `size` of them is no less than what max|exact| stands for: each carries its rounding.
    The plain formula's error is itself a matter of luck: a test that draws many cases may say draws=2, and is given twice the budget.
    """
    assert actual.shape == exact.shape, f"{what}: {tuple(actual.shape)} instead of {tuple(exact.shape)}"
    if exact.numel() == 0:
        return
    assert torch.equal(actual.isneginf(), exact.isneginf()), f"{what}: -inf in the wrong places"
    plains = [plain] if isinstance(plain, torch.Tensor) else plain
    actual, exact, *plains = (t.double().masked_fill(exact.isneginf(), 0.0) for t in (actual, exact, *plains))
    error, eps, largest = (actual - exact).abs().max(), torch.finfo(dtype).eps, exact.abs().max()
    largest = max(largest, torch.as_tensor(size)) if largest > 0 else torch.as_tensor(max(cancelled, size))
    budget = 256 * eps * largest if dtype == torch.float64 else 2 * max((plain - exact).abs().max() for plain in plains) + 2 * eps * largest
    budget *= draws
    assert error <= budget, f"{what}: error {error:.3g} is {error / budget:.2f} times the budget"  # NaN fails too
