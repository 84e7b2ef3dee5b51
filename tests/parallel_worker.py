"""One rank of test_parallel: the losses over classes that are split between the ranks, beside those of a single process."""

import sys

import torch
import torch.distributed as dist

from minkernels import cross_entropy, linear_cross_entropy

N, H, V = 23, 12, 34


def same(ours, theirs, what):
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, msg=lambda m: f"{what}: {m}")


def run(rank, world):
    torch.manual_seed(0)
    own = slice(rank * V // world, (rank + 1) * V // world)
    logits, input, weight, bias = torch.randn(N, V), torch.randn(N, H), torch.randn(V, H), torch.randn(V)
    logits[3, : V // 2] = float("-inf")  # a shard without a finite logit
    class_weight, target = torch.rand(V) + 0.5, torch.randint(0, V, (N,))
    target[3], target[5], target[6] = V - 1, -100, -100
    logits[5] = float("nan")
    dloss = torch.randn(N)
    plain = [dict(), dict(z_loss=0.01, logit_scale=0.7)]
    smooth = [dict(label_smoothing=0.1), dict(label_smoothing=0.1, weight=class_weight, z_loss=0.01, softcap=5.0, logit_scale=1.3)]
    for options in plain + smooth:
        x = logits if options in plain or "softcap" in options else torch.where(logits == float("-inf"), 0.0, logits)
        for reduction in ("none", "mean", "sum"):
            results = []
            for part, group in ((slice(None), None), (own, dist.group.WORLD)):
                leaf = x[:, part].clone().requires_grad_()
                loss = cross_entropy(leaf, target, reduction=reduction, group=group, **options)
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
    try:
        cross_entropy(logits[:, own], torch.full((N,), V), group=dist.group.WORLD)
    except IndexError as error:
        assert "target[0] is 34, out of range for 34 classes" in str(error)
    else:
        raise AssertionError("a label out of range passed")


if __name__ == "__main__":
    rank, world, store = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    run(rank, world)
    dist.destroy_process_group()
