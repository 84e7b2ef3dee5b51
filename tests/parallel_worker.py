"""One rank of test_parallel: the losses over classes that are split between the ranks, beside those of a single process."""

import sys

import torch
import torch.distributed as dist

from minkernels import cross_entropy, linear_cross_entropy
from minkernels.cross_entropy import _parallel

N, H = 23, 12


def same(ours, theirs, what):
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, msg=lambda m: f"{what}: {m}")


def run(rank, ends):
    """ends: where the classes of each rank end."""
    torch.manual_seed(0)
    V, own = ends[-1], slice(([0, *ends])[rank], ends[rank])
    logits, input, weight, bias = torch.randn(N, V), torch.randn(N, H), torch.randn(V, H), torch.randn(V)
    logits[3, : ends[0]] = logits[7, : ends[0]] = float("-inf")  # a shard without a finite logit
    class_weight, target = torch.rand(V) + 0.5, torch.randint(0, V, (N,))
    target[3], target[5], target[6] = V - 1, -100, -100
    logits[5] = float("nan")
    dloss = torch.randn(N)
    plain = [dict(), dict(z_loss=0.01, logit_scale=0.7)]
    smooth = [dict(label_smoothing=0.1), dict(label_smoothing=0.1, weight=class_weight, z_loss=0.01, softcap=5.0, logit_scale=1.3)]
    for options in plain + smooth:
        x = logits if options in plain or "softcap" in options else torch.where(logits == float("-inf"), 0.0, logits)
        for reduction in ("none", "mean", "sum"):
            results, labels = [], target.clone()
            labels[7] = 0 if reduction == "none" else -100  # its loss is infinite
            for part, group in ((slice(None), None), (own, dist.group.WORLD)):
                leaf = x[:, part].clone().requires_grad_()
                loss = cross_entropy(leaf, labels, reduction=reduction, group=group, **options)
                (dx,) = torch.autograd.grad(loss, leaf, dloss if reduction == "none" else torch.tensor(0.7))
                results.append((loss, dx[:, own] if group is None else dx))
            same(*results, f"cross_entropy {options} {reduction}")
            results = []
            for part, group in ((slice(None), None), (own, dist.group.WORLD)):
                leaves = [t.clone().requires_grad_() for t in (input, weight[part], bias[part])]
                chunks = dict(linear_bias=leaves[2], memory_budget=5 * 4 * V)
                loss = linear_cross_entropy(*leaves[:2], target, reduction=reduction, group=group, **chunks, **options)
                grads = torch.autograd.grad(loss, leaves, dloss if reduction == "none" else torch.tensor(0.7))
                results.append((loss, grads[0], *(g[own] if group is None else g for g in grads[1:])))
            same(*results, f"linear_cross_entropy {options} {reduction}")
    refused(rank, logits[:, own], input, weight[own], target, V)


def refused(rank, logits, input, weight, target, V):
    """On every rank, even where one alone is wrong: the others would wait for it."""
    bad = target.clone()
    bad[rank] = V
    here = f"target[{rank}] is {V}, out of range for {V} classes"
    cases = [
        (bad, None, IndexError, here, here),
        (bad if rank else target, None, (IndexError, RuntimeError), "target is out of range on rank 1 of group", here),
        (target, torch.ones(V + 1), ValueError, *[f"weight must be (V={V},), the classes of all ranks, got ({V + 1},)"] * 2),
        (target[: N - rank], None, ValueError, *[f"every rank of group must have the same rows, got {N}, {N - 1} of them"] * 2),
    ]
    for target, class_weight, kind, *said in cases:
        for op, args in ((cross_entropy, (logits,)), (linear_cross_entropy, (input, weight))):
            rows = args[0][: len(target)], *args[1:]
            try:
                op(*rows, target, weight=class_weight, group=dist.group.WORLD)
            except kind as error:
                assert said[rank] in str(error), error
            else:
                raise AssertionError(f"{said[rank]} passed")


if __name__ == "__main__":
    rank, store = int(sys.argv[1]), sys.argv[2]
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    for ends in ((17, 34), (18, 35), (30, 31)):
        run(rank, ends)
    split = _parallel.split  # what follows: as on a GPU, where nobody reads these numbers
    _parallel.split = lambda *args: (s := split(*args))._replace(first=torch.tensor(s.first), total=torch.tensor(s.total))
    run(rank, (18, 35))
    dist.destroy_process_group()
