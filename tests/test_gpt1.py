"""GPT-1: the names of its weights, what its losses count, and how each task's texts become sequences."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from minmodels import gpt1
from minmodels.gpt1 import DELIMITER, EXTRACT, GPT1, START, GPT1Config, GPT1Task
from minmodels.recipes import dropping

SMALL = GPT1Config(vocab_size=20, n_positions=10, n_layer=2, n_head=2, n_embd=16, dropout=0.0)
BLOCK = {  # as in the checkpoints, whose Conv1D weights are the transposes of these
    "attn.c_attn.weight": (48, 16),
    "attn.c_attn.bias": (48,),
    "attn.c_proj.weight": (16, 16),
    "attn.c_proj.bias": (16,),
    "ln_1.weight": (16,),
    "ln_1.bias": (16,),
    "mlp.c_fc.weight": (64, 16),
    "mlp.c_fc.bias": (64,),
    "mlp.c_proj.weight": (16, 64),
    "mlp.c_proj.bias": (16,),
    "ln_2.weight": (16,),
    "ln_2.bias": (16,),
}


def random(model, scale=0.3):
    with torch.no_grad():
        for p in model.parameters():
            p.add_(scale * torch.randn_like(p))
    return model


def ids(device, *shape):
    return torch.randint(4, SMALL.vocab_size, shape, device=device)


def test_names_are_those_of_the_checkpoints():
    outer = {"tokens_embed.weight": (20, 16), "positions_embed.weight": (10, 16)}
    blocks = {f"h.{i}.{name}": shape for i in range(2) for name, shape in BLOCK.items()}
    assert {name: tuple(t.shape) for name, t in GPT1(SMALL).state_dict().items()} == outer | blocks


def test_the_paper_has_117_million_parameters():
    with torch.device("meta"):
        assert sum(p.numel() for p in GPT1(GPT1Config()).parameters()) == 116_534_784


def test_logits_are_those_of_transformers():
    transformers = pytest.importorskip("transformers")
    config = transformers.OpenAIGPTConfig(vocab_size=20, n_positions=10, n_embd=16, n_layer=2, n_head=2, afn="gelu")
    theirs = random(transformers.OpenAIGPTLMHeadModel(config)).eval()
    tensors = {k.removeprefix("transformer."): t for k, t in theirs.state_dict().items() if k.startswith("transformer.")}
    ours = GPT1(SMALL)
    ours.load_state_dict({k: t.T if ".c_" in k and t.dim() == 2 else t for k, t in tensors.items()})
    idx = ids("cpu", 3, 10)
    with torch.no_grad():
        torch.testing.assert_close(ours(idx), theirs(idx).logits, rtol=1e-4, atol=1e-4)


def plain_linear_cross_entropy(x, weight, labels, *, ignore_index):
    return F.cross_entropy(F.linear(x, weight).flatten(0, -2), labels.flatten(), ignore_index=ignore_index)


def on_torch(monkeypatch):
    monkeypatch.setattr(gpt1, "attention", lambda q, k, v, *, causal: F.scaled_dot_product_attention(q, k, v, is_causal=causal))
    monkeypatch.setattr(gpt1, "cross_entropy", F.cross_entropy)
    monkeypatch.setattr(gpt1, "linear_cross_entropy", plain_linear_cross_entropy)


def task_inputs(device, S):
    return ids(device, 3, S, 9), torch.randint(3, 9, (3, S), device=device), torch.tensor([1, 0, 1], device=device)


CASES = {"pretraining": None, "classification": 1, "similarity": 2, "choice": 3}


@pytest.mark.parametrize("kind", CASES)
def test_loss_and_gradients_are_those_of_pytorchs_ops(device, monkeypatch, kind):
    model = random(GPT1(SMALL) if kind == "pretraining" else GPT1Task(SMALL, kind, 2)).to(device)
    inputs = (ids(device, 3, 8), ids(device, 3, 8)) if kind == "pretraining" else task_inputs(device, CASES[kind])
    losses, gradients = [], []
    for _ in range(2):
        losses.append(model(*inputs))
        gradients.append(torch.autograd.grad(losses[-1], list(model.parameters())))
        on_torch(monkeypatch)
    torch.testing.assert_close(*losses)
    for a, b in zip(*gradients, strict=True):
        assert (a - b).abs().max() <= 1e-5 * b.abs().max() + 1e-7


def test_fifty_steps_agree_with_pytorchs_ops(device, monkeypatch):
    initial, runs = random(GPT1(SMALL), 0.05).state_dict(), []
    for _ in range(2):
        model = GPT1(SMALL).to(device)
        model.load_state_dict(initial)
        optimizer, generator, losses = torch.optim.SGD(model.parameters(), 0.1), torch.Generator().manual_seed(0), []
        for _ in range(50):
            idx = torch.randint(4, 20, (4, 9), generator=generator).to(device)
            loss = model(idx[:, :-1], idx[:, 1:])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        runs.append(torch.tensor(losses))
        on_torch(monkeypatch)
    assert (runs[0] - runs[1]).abs().max() < 2e-4 and runs[0].std() > 0.01


def test_a_later_token_changes_nothing_earlier(device):
    model, idx = random(GPT1(SMALL)).to(device), ids(device, 2, 8)
    changed = idx.clone()
    changed[:, 5] = (idx[:, 5] + 1) % 20
    before, after = model(idx), model(changed)
    assert before.shape == (2, 8, 20) and torch.equal(before[:, :5], after[:, :5])
    assert ((before - after).abs().amax((0, 2)) > 1e-4).tolist() == [False] * 5 + [True] * 3


def test_the_input_of_each_task():
    a, b, c = [10, 11], [12], [13, 14]
    assert gpt1.classification(a) == [[START, 10, 11, EXTRACT]]
    assert gpt1.entailment(a, b) == [[START, 10, 11, DELIMITER, 12, EXTRACT]]
    assert gpt1.similarity(a, b) == [[START, 10, 11, DELIMITER, 12, EXTRACT], [START, 12, DELIMITER, 10, 11, EXTRACT]]
    assert gpt1.choice(a, b, c) == [[START, 10, 11, DELIMITER, 12, EXTRACT], [START, 10, 11, DELIMITER, 13, 14, EXTRACT]]
    assert len({0, START, DELIMITER, EXTRACT}) == 4


@pytest.mark.parametrize(("kind", "S"), {"classification": 1, "entailment": 1, "similarity": 2, "choice": 4}.items())
def test_the_head_reads_the_extract_token(device, kind, S):
    model = random(GPT1Task(SMALL, kind, 3)).to(device)
    idx, ends, _ = task_inputs(device, S)
    logits = model(idx, ends)
    rows = [[model.transformer.hidden(idx[b, s, : ends[b, s] + 1][None])[0, -1] for s in range(S)] for b in range(3)]
    h = torch.stack([torch.stack(row) for row in rows])  # (B, S, C), each from its sequence alone
    head = model.head
    expected = (h @ head.weight[0] + head.bias) if kind == "choice" else h.sum(1) @ head.weight.T + head.bias
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    padded = idx.clone()
    padded[torch.arange(9, device=device) > ends[..., None]] = 0
    torch.testing.assert_close(model(padded, ends), logits)
    if kind == "similarity":
        torch.testing.assert_close(model(idx.flip(1), ends.flip(1)), logits)


@pytest.mark.parametrize("weight", [0.0, 0.5, 2.0])
def test_stage_two_adds_the_likelihood_of_its_own_inputs(device, weight):
    model = random(GPT1Task(SMALL, "similarity", 2, weight)).to(device)
    idx, ends, labels = task_inputs(device, 2)
    rows = [(idx[b, s, : ends[b, s]], idx[b, s, 1 : ends[b, s] + 1]) for b in range(3) for s in range(2)]
    each = torch.cat([F.cross_entropy(model.transformer(x[None])[0], y, reduction="none") for x, y in rows])
    expected = F.cross_entropy(model(idx, ends), labels) + weight * each.mean()
    torch.testing.assert_close(model(idx, ends, labels), expected)


def test_dropout_acts_in_training_alone_and_its_seed_decides(device):
    model = random(GPT1(dataclasses.replace(SMALL, dropout=0.5))).to(device)
    idx, seeds, losses = ids(device, 2, 9), [3, 3, 4], []
    for seed in seeds:
        with dropping(torch.tensor(seed), idx):
            losses.append(model(idx[:, :-1], idx[:, 1:]).item())
    assert losses[0] == losses[1] != losses[2]
    plain = random(GPT1(SMALL)).to(device)
    plain.load_state_dict(model.state_dict())
    assert torch.equal(model.eval()(idx), plain(idx))


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="11 tokens are more than the n_positions of 10"):
        GPT1(SMALL)(ids("cpu", 1, 11))
    with pytest.raises(ValueError, match="n_embd must be a multiple of n_head, got 16 and 3"):
        GPT1Config(n_embd=16, n_head=3)
    with pytest.raises(ValueError, match=r"dropout must be from 0 to less than 1, got 1\.0"):
        GPT1Config(dropout=1.0)
    with pytest.raises(ValueError, match="n_layer must be a positive int, got 0"):
        GPT1Config(n_layer=0)
