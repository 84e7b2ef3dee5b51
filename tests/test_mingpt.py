"""minGPT: the names of its weights, what its loss counts, and its cache against generation without one."""

import math

import pytest
import torch
import torch.nn.functional as F

from minmodels.kernels import using
from minmodels.mingpt import GPT, Cache, GPTConfig

SMALL = GPTConfig(vocab_size=11, block_size=8, n_layer=2, n_head=2, n_embd=16)
BLOCK_SHAPES = {  # as in the GPT-2 checkpoints, whose Conv1D weights are the transposes of these
    "ln_1.weight": (16,),
    "ln_1.bias": (16,),
    "attn.c_attn.weight": (48, 16),
    "attn.c_attn.bias": (48,),
    "attn.c_proj.weight": (16, 16),
    "attn.c_proj.bias": (16,),
    "ln_2.weight": (16,),
    "ln_2.bias": (16,),
    "mlp.c_fc.weight": (64, 16),
    "mlp.c_fc.bias": (64,),
    "mlp.c_proj.weight": (16, 64),
    "mlp.c_proj.bias": (16,),
}


def small(device, dtype=torch.float32, scale=1.0):
    model = GPT(SMALL).to(device, dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(scale) if p.dim() == 2 else p.add_(0.1 * torch.randn_like(p))
    return model


def ids(device, *shape):
    return torch.randint(SMALL.vocab_size, shape, device=device)


def test_names_are_those_of_the_gpt2_checkpoints():
    outer = {"wte.weight": (11, 16), "wpe.weight": (8, 16), "ln_f.weight": (16,), "ln_f.bias": (16,)}
    blocks = {f"h.{i}.{name}": shape for i in range(2) for name, shape in BLOCK_SHAPES.items()}
    assert {name: tuple(t.shape) for name, t in GPT(SMALL).state_dict().items()} == outer | blocks


def test_gpt2_small_has_its_124_million_parameters():
    with torch.device("meta"):
        assert sum(p.numel() for p in GPT(GPTConfig()).parameters()) == 124_439_808


def test_initial_weights_and_loss(device):
    config = GPTConfig(vocab_size=500, block_size=64, n_layer=8, n_head=4, n_embd=128)
    model = GPT(config).to(device)
    weights = dict(model.named_parameters())
    assert weights["h.0.mlp.c_fc.weight"].std().item() == pytest.approx(0.02, rel=0.03)
    assert weights["h.7.mlp.c_proj.weight"].std().item() == pytest.approx(0.02 / 4, rel=0.03)  # sqrt(2 * 8 layers)
    assert weights["h.3.attn.c_attn.bias"].abs().max() == 0 and weights["ln_f.weight"].min() == 1
    idx = torch.randint(500, (4, 65), device=device)
    assert model(idx[:, :-1], idx[:, 1:]).item() == pytest.approx(math.log(500), abs=0.1)


def test_a_later_token_changes_no_earlier_logits(device):
    model, idx = small(device, scale=10), ids(device, 2, 8)
    changed = idx.clone()
    changed[:, 5] = (idx[:, 5] + 1) % SMALL.vocab_size
    before, after = model(idx), model(changed)
    assert before.shape == (2, 8, 11) and torch.equal(before[:, :5], after[:, :5])
    assert ((before - after).abs().amax((0, 2)) > 1e-4).tolist() == [False] * 5 + [True] * 3


def test_targets_of_minus_one_do_not_count(device):
    model, idx, targets = small(device, torch.float32, 10), ids(device, 3, 8), ids(device, 3, 8)
    targets[0, 2:], targets[2, ::2] = -1, -1
    counted = targets != -1
    loss = F.cross_entropy(model(idx)[counted], targets[counted])
    assert model(idx, targets).item() == pytest.approx(loss.item(), rel=1e-6)


def test_gradients_are_those_of_pytorchs_ops(device):
    model, idx, targets = small(device, torch.float32, 5), ids(device, 3, 8), ids(device, 3, 8)
    targets[1, 3] = -1
    ours = torch.autograd.grad(model(idx, targets), list(model.parameters()))
    with using("torch"):
        theirs = torch.autograd.grad(model(idx, targets), list(model.parameters()))
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).abs().max() <= 1e-5 * b.abs().max() + 1e-7


@pytest.mark.parametrize("splits", [(8,), (1,) * 8, (3, 1, 4)], ids=["at-once", "one-by-one", "uneven"])
def test_cache_gives_the_same_hidden_states(splits):
    model, idx = small("cpu", torch.float64, 10), ids("cpu", 2, 8)
    cache = Cache(SMALL)
    with torch.no_grad():
        parts = [model._hidden(part, cache) for part in idx.split(splits, dim=1)]
        assert (torch.cat(parts, 1) - model._hidden(idx)).abs().max() < 1e-12
    assert cache.length == 8


@pytest.mark.parametrize("prompt", [1, 5, 8, 13], ids=["one-token", "short", "block-size", "longer-than-block"])
@pytest.mark.parametrize("temperature", [0, 1.5], ids=["greedy", "sampled"])
def test_generation_with_a_cache_is_generation_without(device, prompt, temperature):
    model, idx = small(device, scale=10), ids(device, 3, prompt)  # weights of 0.2, so that the context matters
    runs = {}
    for use_cache in (True, False):
        generator = torch.Generator(device).manual_seed(7)
        runs[use_cache] = model.generate(idx, 12, temperature=temperature, generator=generator, use_cache=use_cache)
    assert runs[True].shape == (3, prompt + 12) and torch.equal(runs[True][:, :prompt], idx)
    assert torch.equal(runs[True], runs[False])
    assert len(runs[True][:, prompt:].unique()) > 1


def test_generation_under_autocast(device):
    model, idx = small(device, scale=10), ids(device, 2, 3)
    with torch.autocast(device, torch.bfloat16):
        runs = [model.generate(idx, 5, temperature=0, use_cache=use_cache) for use_cache in (True, False)]
    assert torch.equal(*runs)


def test_greedy_is_the_argmax_of_the_last_block(device):
    model, idx = small(device, scale=10), ids(device, 2, 3)
    out = model.generate(idx, 10, temperature=0)
    for end in range(3, 13):
        window = out[:, max(0, end - 8) : end]
        assert torch.equal(model(window)[:, -1].argmax(-1), out[:, end])


def test_the_seed_decides_the_sample(device):
    model, idx = small(device), ids(device, 1, 1)
    runs = [model.generate(idx, 40, generator=torch.Generator(device).manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])


def test_temperature_sharpens(device):
    model, idx = small(device, scale=10), ids(device, 1, 2)
    first = model(idx)[0, -1].softmax(-1).max().item()
    many = idx.expand(4000, 2)
    share = {}
    for temperature in (1.0, 0.5):
        tokens = model.generate(many, 1, temperature=temperature, generator=torch.Generator(device).manual_seed(0))[:, -1]
        share[temperature] = tokens.bincount().max().item() / 4000
    cold = (2 * model(idx)[0, -1]).softmax(-1).max().item()
    assert share[1.0] == pytest.approx(first, abs=0.03) and share[0.5] == pytest.approx(cold, abs=0.03) and cold > first + 0.05


def test_bad_input_is_named():
    model = GPT(SMALL)
    with pytest.raises(ValueError, match=r"9 tokens are more than the block_size of 8"):
        model(ids("cpu", 1, 9))
    with pytest.raises(ValueError, match=r"at least one token\), got shape \(2, 0\)"):
        model.generate(ids("cpu", 2, 0), 3)
    with pytest.raises(ValueError, match="temperature must be finite and not negative, got -1"):
        model.generate(ids("cpu", 1, 1), 3, temperature=-1)
    with pytest.raises(ValueError, match="n_embd must be a multiple of n_head, got 16 and 3"):
        GPTConfig(n_embd=16, n_head=3)
    with pytest.raises(ValueError, match="n_layer must be a positive int, got 0"):
        GPTConfig(n_layer=0)
    with pytest.raises(IndexError, match=r"target\[1\] is 11, out of range for 11 classes"):
        model(torch.tensor([[1, 2]]), torch.tensor([[3, 11]]))
