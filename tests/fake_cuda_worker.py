"""What test_fake_cuda runs: every public op, the models and swapped models, on the device of fake_cuda.py beside
the same on the CPU."""

import fake_cuda  # before torch

# isort: split
import os
import sys
import warnings
from collections import Counter

import torch
from torch.utils._pytree import tree_leaves, tree_map

import minkernels as mk
from op_cases import LINEAR, OPS

torch.manual_seed(0)
warnings.filterwarnings("ignore", category=RuntimeWarning)  # NumPy on inf - inf
randn, randint = torch.randn, torch.randint
LINEAR = tuple(t.bfloat16() if t.is_floating_point() else t for t in LINEAR)
CHUNKS = {"linear_cross_entropy, bf16, eight rows a chunk": (mk.linear_cross_entropy, LINEAR, dict(memory_budget=8 * 37 * 2), 2, 0)}


def results(device, op, args, options, grads):
    """The tensors that the op returns, and the gradients of the first arguments and of what else wants one."""
    args, options = tree_map(
        lambda t: t.detach().to(device).requires_grad_(t.requires_grad) if isinstance(t, torch.Tensor) else t, (args, options)
    )
    leaves = [t.requires_grad_() for t in args[:grads]] + [t for t in options.values() if getattr(t, "requires_grad", False)]
    fake_cuda.syncs.clear(), fake_cuda.launches.clear()
    found = [t for t in tree_leaves(op(*args, **options)) if isinstance(t, torch.Tensor)]
    if leaves:
        weighed = (t * torch.linspace(0.5, 1.5, t.numel(), device=device).view(t.shape) for t in found if t.requires_grad)
        found += torch.autograd.grad(sum(t.sum() for t in weighed), leaves)
    waits = list(fake_cuda.syncs)
    return [t.detach().cpu() for t in found], waits


def near(name, found, expected, dtype=torch.float32):
    rtol, atol = (1e-5, 4e-6) if dtype == torch.float32 else (1e-2, 1e-2)  # how near is for the kernels' tests to say
    torch.testing.assert_close(found, expected, rtol=rtol, atol=atol, equal_nan=True, msg=lambda m: f"{name}: {m}")


def ops():
    no_ops = {"empty_cache", "info", "swap", "unswap", "swapped"}
    assert {op.__name__ for op, *_ in OPS.values()} == {n for n in mk.__all__ if n.islower()} - no_ops
    for name, (op, args, options, grads, allowed) in (OPS | CHUNKS).items():
        expected, _ = results("cpu", op, args, options, grads)
        with fake_cuda.device:
            found, waits = results("cuda", op, args, options, grads)
        assert fake_cuda.launches, f"{name} launched nothing"
        assert len(waits) == allowed, f"{name} waits for the device: {waits}"
        for a, e in zip(found, expected, strict=True):
            near(name, a, e, args[0].dtype)


def models():
    """Two training steps of each model: the losses of the CPU, and nothing waits for the device."""
    from minmodels.options import MODELS
    from minmodels.train import Run

    tiny = dict(n_layer=1, n_head=2, n_embd=32, batch_size=2, dtype="float32")
    text = dict(tiny, block_size=16)
    given = {
        "bigram": dict(block_size=16, batch_size=2), "gpt": dict(text, dtype="bfloat16"),
        "adder": tiny, "transformer": dict(tiny, length=4),
        "gpt1": dict(text, vocab_size=300), "minbert": dict(text, block_size=32, vocab_size=300),
        "unet": dict(batch_size=1, width=4, depth=2, crop=32), "yolo": dict(batch_size=2, width=4, dtype="float32"),
    }  # fmt: skip
    for name, options in given.items():
        run = Run(name, MODELS[name].options.of(dict(options, device="cpu")))
        losses = [run.train_step()["loss"] for _ in range(2)]
        with fake_cuda.device:
            run = Run(name, MODELS[name].options.of(dict(options, device="cuda")))
            fake_cuda.syncs.clear(), fake_cuda.launches.clear()
            found = [run.train_step()["loss"] for _ in range(2)]
            assert fake_cuda.launches, f"{name} launched nothing"
            assert not fake_cuda.syncs, f"a step of {name} waits for the device: {Counter(fake_cuda.syncs)}"
        for a, e in zip(found, losses, strict=True):
            near(name, a.cpu(), e, getattr(torch, run.options.dtype))


def swapped():
    """Models of others with our kernels in them: the losses and gradients that they have on the CPU without, and nothing waits."""
    from torch import nn
    from transformers import BertConfig, BertForMaskedLM, LlamaConfig, LlamaForCausalLM

    from minkernels.swap import functional

    functional.PLAIN = (*functional.PLAIN, fake_cuda.FakeCuda)  # the swap leaves other subclasses of Tensor alone
    sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
    padding = torch.ones(2, 9, dtype=torch.int64)
    padding[0, :3] = 0
    text = dict(input_ids=randint(1, 64, (2, 9)), attention_mask=padding, labels=randint(1, 64, (2, 9)))
    bert = BertConfig(**sizes, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, tie_word_embeddings=False)
    given = {
        "nn.TransformerEncoderLayer": (nn.TransformerEncoderLayer(32, 2, 48, dropout=0.0), dict(src=randn(9, 2, 32))),
        "Llama": (LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=1, use_cache=False)), text),
        "BERT": (BertForMaskedLM(bert), text),
    }
    for name, (model, inputs) in given.items():
        expected = trained(model, inputs)
        with fake_cuda.device:
            ours = model.to("cuda")
            mk.swap(ours)
            inputs = {key: t.to("cuda") for key, t in inputs.items()}
            fake_cuda.syncs.clear(), fake_cuda.launches.clear()
            found = trained(ours, inputs)
            assert fake_cuda.launches, f"{name} launched nothing"
            assert not fake_cuda.syncs, f"{name} waits for the device: {Counter(fake_cuda.syncs)}"
        for a, e in zip(found, expected, strict=True):
            near(name, a.detach().cpu(), e.detach())


def trained(model, inputs):
    """Its loss, and the gradients of its parameters."""
    model.zero_grad()
    output = model(**inputs)
    loss = output.square().mean() if isinstance(output, torch.Tensor) else output.loss
    loss.backward()
    return [loss, *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def itself():
    """The fake refuses what a GPU would refuse, and sees what it is there to see."""
    import triton
    import triton.language as tl

    @triton.jit
    def write(To, n, BLOCK: tl.constexpr):
        tl.store(To + tl.arange(0, BLOCK), 1.0, mask=tl.arange(0, BLOCK) < n)

    with fake_cuda.device:
        t = torch.empty(5, device="cuda")
        assert t.is_cuda and t.cpu().isnan().all()
        fake_cuda.syncs.clear()
        for wait in (lambda: t[0].item(), lambda: t.cpu(), lambda: t[t > 0], lambda: t.nonzero(), lambda: bool(t.isnan().any())):
            before = len(fake_cuda.syncs)
            wait()
            assert len(fake_cuda.syncs) == before + 1
        write[(1,)](t, 5, BLOCK=8)
        assert t.cpu().eq(1).all()
        for wrong in (lambda: t + torch.ones(5), lambda: write[(1,)](t, 6, BLOCK=8), lambda: write[(1,)](torch.ones(5), 5, BLOCK=8)):
            try:
                wrong()
            except (RuntimeError, ValueError):
                continue
            raise AssertionError("neither CPU tensors nor memory out of bounds were noticed")


if __name__ == "__main__":
    {"itself": itself, "ops": ops, "models": models, "swapped": swapped}[sys.argv[1]]()
    # a device's backward runs in a thread of PyTorch's, which may still let go of its results, and aborts where the interpreter is ending
    sys.stdout.flush()
    os._exit(0)
