"""The linear layer and the softmax losses a chunk of rows at a time, so that the logits never exist whole: the same on every device, which
brings its kernels and its way to sum the gradient of the weight. A chunk's gradient is written over its logits."""

import torch

from minkernels.cross_entropy._options import Options, accumulator, divisor, is_labels, new_stats, probs_grad, weighted


def logits(input, weight, bias, out):
    if bias is None:
        torch.mm(input, weight.T, out=out)
    else:
        torch.addmm(bias, input, weight.T, out=out)


class Chunks:
    """The logits of input (N, H) and linear_weight (V, H) or (V, D, H), chunks of one size, each over the memory of the last."""

    def __init__(self, kernels, input, linear_weight, linear_bias, memory_budget):
        self.kernels, self.input, self.classes = kernels, input, linear_weight.shape[:-1]
        self.weight = linear_weight.flatten(0, -2)
        self.bias = None if linear_bias is None else linear_bias.reshape(-1)
        row_bytes = len(self.weight) * input.element_size()
        most = max(1, memory_budget // row_bytes if memory_budget else max(kernels.CHUNK_BYTES // row_bytes, kernels.CHUNK_ROWS))
        self.count = -(-len(input) // most)
        self.rows = -(-len(input) // max(1, self.count))

    def __iter__(self):
        buffer = self.input.new_empty(self.rows, len(self.weight))
        for start in range(0, len(self.input), max(1, self.rows)):
            rows = slice(start, min(start + self.rows, len(self.input)))
            logits = buffer[: rows.stop - start]
            self.kernels.logits(self.input[rows], self.weight, self.bias, out=logits)
            yield rows, logits.view(-1, *self.classes)


class Gradients:
    """Of input, linear_weight and linear_bias, those that are wanted, from the gradient of each chunk of logits."""

    def __init__(self, kernels, chunks, linear_weight, linear_bias, dinput, dweight, dbias):
        self.chunks, self.like = chunks, linear_bias
        self.dinput = torch.empty_like(chunks.input) if dinput else None
        self.dweight = torch.empty_like(linear_weight, memory_format=torch.contiguous_format) if dweight else None
        self.dbias = torch.zeros_like(chunks.bias, dtype=accumulator(chunks.bias)) if dbias else None
        self.sum = kernels.Sum(self.dweight.view(chunks.weight.shape), chunks.count) if dweight else None

    def add(self, rows, grad):
        grad = grad.flatten(1)
        if self.dinput is not None:
            self.chunks.kernels.dinput(grad, self.chunks.weight, out=self.dinput[rows])
        if self.sum is not None:
            self.sum.add(grad, self.chunks.input[rows])
        if self.dbias is not None:
            self.dbias += grad.sum(0, dtype=self.dbias.dtype)

    def result(self, kept, input):
        """Empty where none was wanted. kept: which rows of input the chunks have; None for all."""
        if self.sum is not None:
            self.sum.finish()
        if self.dinput is not None and kept is not None:
            self.dinput = torch.zeros_like(input).index_copy_(0, kept, self.dinput)
        dbias = None if self.dbias is None else torch.empty_like(self.like).copy_(self.dbias.view(self.like.shape))
        return tuple(self.chunks.input.new_empty(0) if t is None else t for t in (self.dinput, self.dweight, dbias))


@torch.no_grad()  # an exported graph calls the operators with gradients on, and products into `out` refuse them
def fwd(kernels, input, linear_weight, target, linear_bias, weight, *options):
    *x, reduction, empty_zero, memory_budget, dinput, dweight, dbias = options
    x, V, N = Options(*x), len(linear_weight), len(input)
    kernels.check_labels(target, V, x.ignore_index)
    total = weighted(divisor(target, V, weight, x.ignore_index, accumulator(input)), empty_zero)
    all_input, (kept, (input, target)) = input, kernels.compact(target, x.ignore_index, input, target)
    chunks = Chunks(kernels, input, linear_weight, linear_bias, memory_budget)
    grads = Gradients(kernels, chunks, linear_weight, linear_bias, dinput, dweight, dbias)
    some, losses, stats = dinput or dweight or dbias, [], [new_stats(input, 0, 2 if is_labels(target) else 3)]
    for rows, logits in chunks:
        out = logits if some else None
        loss, part, _ = kernels.fwd(logits, target[rows], weight, *x, reduction, empty_zero, some, divisor=total, out=out)
        losses.append(loss)
        stats.append(part)
        if some:
            grads.add(rows, logits)
    stats = torch.cat(stats)
    if reduction == "none":
        loss = expand(torch.cat([stats.new_empty(0, *linear_weight.shape[1:-1]), *losses]), kept, N)
    else:
        loss = sum(losses, stats.new_zeros(()))
        loss = loss / total if reduction == "mean" and not losses else loss  # 0 / 0
    return loss, expand(stats, kept, N), *grads.result(kept, all_input)


@torch.no_grad()
def stats(kernels, input, linear_weight, target, linear_bias, weight, *options):
    *x, shard, entropy, memory_budget = options
    if not shard:
        kernels.check_labels(target, len(linear_weight), x[0])
    N = len(input)
    kept, (input, target) = kernels.compact(target, x[0], input, target)
    stats, argmax = [new_stats(input, 0, 6 if entropy else 5)], [target.new_empty(0, *target.shape[1:], dtype=torch.int64)]
    for rows, logits in Chunks(kernels, input, linear_weight, linear_bias, memory_budget):
        part, best = kernels.stats(logits, target[rows], weight, *x, shard, entropy)
        stats.append(part)
        argmax.append(best)
    argmax = torch.cat(argmax) if entropy else argmax[0].flatten()
    return expand(torch.cat(stats), kept, N), expand(argmax, kept, N, -1) if entropy else argmax


@torch.no_grad()
def grad(kernels, input, linear_weight, target, linear_bias, weight, coefficients, stats, *options):
    """stats: where the gradient of a target that is probabilities is wanted."""
    *x, memory_budget, dinput, dweight, dbias = options
    positions = max(1, linear_weight.shape[1:-1].numel())
    all_input, (kept, (input, target, coefficients)) = input, kernels.compact(target, x[0], input, target, coefficients)
    chunks = Chunks(kernels, input, linear_weight, linear_bias, memory_budget)
    grads = Gradients(kernels, chunks, linear_weight, linear_bias, dinput, dweight, dbias)
    dtarget = input.new_empty(0) if stats is None else torch.empty_like(target)
    for rows, logits in chunks:
        part = slice(rows.start * positions, rows.stop * positions)
        k = coefficients[part]
        if stats is not None:
            dtarget[rows] = probs_grad(logits, target[rows], weight, stats[part], k, Options(*x))
        if dinput or dweight or dbias:
            grads.add(rows, kernels.grad(logits, target[rows], weight, k, *x, out=logits))
    return *grads.result(kept, all_input), dtarget


def expand(t, kept, N, fill=0):
    """Rows back in their places, where some were left out."""
    return t if kept is None else t.new_full((N, *t.shape[1:]), fill).index_copy_(0, kept, t)
