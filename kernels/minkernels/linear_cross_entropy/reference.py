"""What the linear layer with a softmax loss means, in plain PyTorch: any device, any float dtype, fp64 in and fp64 out."""

import torch

from minkernels.cross_entropy import reference
from minkernels.cross_entropy._options import Options, accumulator, all_ignored, coefficients, is_labels, probs_grad


def fwd(input, linear_weight, target, linear_bias, weight, *options):
    input = _hide(input, target, options[0])
    *options, reduction, empty_zero, memory_budget, dinput, dweight, dbias = options
    logits = _logits(input, linear_weight, linear_bias)
    loss, stats, _ = reference.fwd(logits, target, weight, *options, reduction, empty_zero, False)
    grads = (input.new_empty(0),) * 3
    if dinput or dweight or dbias:
        k = coefficients(torch.ones_like(loss), len(linear_weight), target, weight, stats, Options(*options), reduction, empty_zero)
        *grads, _ = grad(input, linear_weight, target, linear_bias, weight, k, None, *options, memory_budget, dinput, dweight, dbias)
    return loss, stats, *grads


def stats(input, linear_weight, target, linear_bias, weight, *options):
    *options, _ = options
    return reference.stats(_logits(_hide(input, target, options[0]), linear_weight, linear_bias), target, weight, *options)


def grad(input, linear_weight, target, linear_bias, weight, coefficients, stats, *options):
    input = _hide(input, target, options[0])
    *options, _, dinput, dweight, dbias = options
    logits, none = _logits(input, linear_weight, linear_bias), input.new_empty(0)
    g = reference.grad(logits, target, weight, coefficients, *options).flatten(1)
    W = linear_weight.flatten(0, -2)
    dtarget = None if stats is None else probs_grad(logits, target, weight, stats, coefficients, Options(*options))
    return (
        torch.empty_like(input).copy_(g @ W.to(g.dtype)) if dinput else none,
        (g.T @ input.to(g.dtype)).view(linear_weight.shape).to(linear_weight.dtype) if dweight else none,
        torch.empty_like(linear_bias).copy_(g.sum(0).view(linear_bias.shape)) if dbias else none,
        none if dtarget is None else torch.empty_like(target).copy_(dtarget),
    )


def _hide(input, target, ignore_index):
    """Zeros in the rows that are ignored: they may hold NaN, and 0 * NaN is NaN."""
    return input.masked_fill(all_ignored(target, ignore_index)[:, None], 0.0) if is_labels(target) else input


def _logits(input, linear_weight, linear_bias):
    """(N, V) or (N, V, D), in the dtype of the arithmetic."""
    acc = accumulator(input)
    logits = (input.to(acc) @ linear_weight.reshape(-1, linear_weight.shape[-1]).to(acc).T).view(-1, *linear_weight.shape[:-1])
    return logits if linear_bias is None else logits + linear_bias.to(acc)
