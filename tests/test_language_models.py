"""The bigram model, minGPT's sampling and tokens, the adder; and each small language model through the command line."""

import json
import math
import random
import re
import shlex

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("matplotlib")  # the extra "models"
pytest.importorskip("rich")
pytest.importorskip("safetensors")

from minmodels import files
from minmodels.bigram import Bigram, BigramConfig
from minmodels.data import adder, tokens
from minmodels.data import text as textdata
from minmodels.mingpt import GPT, Cache, GPTConfig
from minmodels.options import GPT_PRESETS, MODELS, GPTOptions
from minmodels.recipes import recipe
from minmodels.sampling import sample
from model_cases import scaled
from test_minmodels_cli import LINE, book, metrics, run, stop_after  # noqa: F401

SMALL = GPTConfig(vocab_size=11, block_size=9, n_layer=2, n_head=2, n_embd=16)
WIDTH = ["--n-layer", 1, "--n-head", 2, "--n-embd", 16]


# sampling


def drawn(logits, count=4000, **how):
    """How often each token is drawn."""
    ids = sample(logits.expand(count, -1), generator=torch.Generator().manual_seed(0), **how)
    assert ids.shape == (count, 1)
    return ids.flatten().bincount(minlength=logits.shape[-1]) / count


P = torch.tensor([0.05, 0.4, 0.1, 0.25, 0.2])
KEPT = {  # what may be drawn of P
    "all": ({}, [0, 1, 2, 3, 4]),
    "top-1": ({"top_k": 1}, [1]),
    "top-3": ({"top_k": 3}, [1, 3, 4]),
    "more-than-there-are": ({"top_k": 9}, [0, 1, 2, 3, 4]),
    "the-likeliest-alone-reaches-p": ({"top_p": 0.39}, [1]),
    "the-one-that-crosses-p-stays": ({"top_p": 0.6}, [1, 3]),
    "0.66": ({"top_p": 0.66}, [1, 3, 4]),
    "p-of-what-k-leaves": ({"top_k": 2, "top_p": 0.61}, [1]),  # 0.4 of 0.65
}


@pytest.mark.parametrize(("how", "kept"), KEPT.values(), ids=KEPT)
def test_top_k_and_top_p(how, kept):
    expected = torch.zeros(5)
    expected[kept] = P[kept] / P[kept].sum()
    shares = drawn(P.log()[None] + 3.0, **how)
    assert (shares > 0).nonzero().flatten().tolist() == kept
    torch.testing.assert_close(shares, expected, atol=0.03, rtol=0)


def test_temperature_comes_before_top_p():
    torch.testing.assert_close(drawn(P.log()[None], temperature=0.5), P**2 / (P**2).sum(), atol=0.03, rtol=0)
    assert drawn(P.log()[None], temperature=0.5, top_p=0.58).nonzero().flatten().tolist() == [1]  # 0.16 of 0.275
    assert drawn(P.log()[None], temperature=0).tolist() == [0, 1, 0, 0, 0]


def test_rows_are_cut_each_by_itself():
    logits = torch.stack((P, P.flip(0))).log()
    assert sample(logits, top_k=1).tolist() == [[1], [3]] and sample(logits, top_p=0.1).tolist() == [[1], [3]]


def test_bad_sampling_is_named():
    for how, message in (
        ({"temperature": math.inf}, "temperature must be finite and not negative, got inf"),
        ({"top_k": -1}, "top_k must not be negative, got -1"),
        ({"top_p": 0.0}, "top_p must be more than 0 and at most 1, got 0.0"),
        ({"top_p": 1.5}, "top_p must be more than 0 and at most 1, got 1.5"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            sample(P[None], **how)


# bigram


def test_bigram_is_a_table(device):
    model = Bigram(BigramConfig(50)).to(device)
    idx = torch.randint(50, (3, 7), device=device)
    assert model(idx).shape == (3, 7, 50) and torch.equal(model(idx), model.table.weight[idx])
    assert model(idx, idx.roll(1, 1)).item() == pytest.approx(math.log(50), abs=0.01)  # before it has learned


def test_bigram_loss_is_pytorchs(device):
    model = scaled(Bigram(BigramConfig(11)).to(device), 100)
    idx, targets = torch.randint(11, (2, 3, 7), device=device)
    targets[0, 2:], targets[2, ::2] = -1, -1
    grads = []
    for loss in (model(idx, targets), F.cross_entropy(model(idx).flatten(0, 1), targets.flatten(), ignore_index=-1)):
        grads.append((loss.detach(), *torch.autograd.grad(loss, model.table.weight)))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def test_bigram_samples_what_follows():
    model = Bigram(BigramConfig(4))
    with torch.no_grad():
        model.table.weight.copy_(50.0 * torch.eye(4).roll(1, 1))  # after i comes i + 1
    assert model.generate(torch.tensor([[2]]), 5).tolist() == [[2, 3, 0, 1, 2, 3]]
    with pytest.raises(ValueError, match=r"at least one token\), got shape \(2, 0\)"):
        model.generate(torch.zeros(2, 0, dtype=torch.int64), 1)
    with pytest.raises(ValueError, match="vocab_size must be a positive int, got 0"):
        BigramConfig(0)


# minGPT: two views, presets


def test_the_parallel_and_the_serial_view_give_the_same_probabilities():
    """X1 X2 X3 Y1 Y2 -> -1 -1 Y1 Y2 Y3, all at once, as in training; and Y1, Y2, Y3, each after the ones before it, as in generation."""
    model = scaled(GPT(SMALL).double(), 10)
    prompts, answers = torch.randint(11, (2, 6, 3))
    idx, targets = adder.parallel(prompts, answers)
    assert idx[0].tolist() == [*prompts[0].tolist(), *answers[0, :2].tolist()]
    assert targets[0].tolist() == [-1, -1, *answers[0].tolist()]
    with torch.no_grad():
        at_once = model(idx).softmax(-1)[:, 2:].gather(-1, answers[..., None])[..., 0]
        cache, seen, one_by_one = Cache(SMALL), prompts, []
        for y in answers.unbind(1):
            p = (model._hidden(seen, cache)[:, -1] @ model.wte.weight.T).softmax(-1)  # as generate() has it
            one_by_one.append(p.gather(-1, y[:, None])[:, 0])
            seen = y[:, None]
        assert (at_once - torch.stack(one_by_one, 1)).abs().max() < 1e-12
        assert model(idx, targets).item() == pytest.approx(-at_once.log().mean().item(), rel=1e-12)
    assert at_once.std() > 0.05  # they do differ


def test_generation_draws_from_what_top_k_leaves():
    model = scaled(GPT(SMALL), 10)
    prompt = torch.randint(11, (1, 4))
    best = model(prompt)[0, -1].topk(2).indices
    tokens = model.generate(prompt.expand(500, 4), 1, top_k=2, generator=torch.Generator().manual_seed(0))[:, -1]
    assert set(tokens.tolist()) <= set(best.tolist())
    greedy = model.generate(prompt, 6, temperature=0)
    assert torch.equal(model.generate(prompt, 6, top_k=1), greedy) and torch.equal(model.generate(prompt, 6, top_p=1e-9), greedy)


def test_dropout_acts_in_training_alone():
    model = GPT(GPTConfig(11, 9, 2, 2, 16, dropout=0.5))
    idx = torch.randint(11, (2, 9))
    assert not torch.equal(model(idx), model(idx))
    model.eval()
    assert torch.equal(model(idx), model(idx))
    plain = GPT(SMALL).eval()
    plain.load_state_dict(model.state_dict())
    assert torch.equal(model(idx), plain(idx))
    with pytest.raises(ValueError, match=r"dropout must be from 0 to less than 1, got 1\.0"):
        GPTConfig(dropout=1.0)


def test_noise_replaces_what_is_read_and_nothing_that_is_to_be_said(book):  # noqa: F811
    made = [recipe("gpt")(GPTOptions(text=book, block_size=16, n_embd=8, batch_size=1000, noise=noise)) for noise in (0.0, 0.1)]
    (clean, targets), (noisy, same) = (r.batch(torch.Generator().manual_seed(0)) for r in made)
    assert torch.equal(targets, same) and torch.equal(clean[:, 1:], targets[:, :-1])
    changed = (noisy != clean).double().mean(1)
    assert changed.mean().item() == pytest.approx(0.1, abs=0.01)
    assert changed.std() > 0.08 and (changed == 0).double().mean() > 0.2  # binomial at a fixed rate: 0.075, 0.19


PARAMETERS = {"gpt2": 124_439_808, "gpt2-medium": 354_823_168, "gpt2-large": 774_030_080, "gpt2-xl": 1_557_611_200}


@pytest.mark.parametrize("name", GPT_PRESETS)
def test_presets(name):  # the parameters of GPT-2 as Hugging Face counts them
    options = GPTOptions.of({"preset": name, "batch_size": 3})
    with torch.device("meta"):
        model = GPT(GPTConfig(50257, options.block_size, options.n_layer, options.n_head, options.n_embd))
    assert options.batch_size == 3 and options.n_layer == GPT_PRESETS[name]["n_layer"] == len(model.h)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS.get(name, sum(p.numel() for p in model.parameters()))


def test_a_preset_gives_way_to_the_options_given(book, tmp_path):  # noqa: F811
    out = tmp_path / "run"
    args = "--preset", "gpt-nano", "--n-layer", 1, "--block-size", 16, "--batch-size", 2, "--steps", 2
    assert run("train", "gpt", "--text", book, "--out", out, *args) == 0
    config = files.load_checkpoint(out)[1]["config"]
    assert (config["block_size"], config["n_layer"], config["n_head"], config["n_embd"]) == (16, 1, 3, 48)


# tokens


def test_bpe_is_lossless_and_repeatable():
    pytest.importorskip("tokenizers")
    bpe = tokens.BPE.learn(LINE * 20, 300)
    assert 256 < len(bpe) <= 300 and bpe.state() == tokens.BPE.learn(LINE * 20, 300).state()
    for text in (LINE, "Å, seen never: \U0001f600\t\r\n  two  spaces ", ""):
        ids = bpe.encode(text)
        assert bpe.decode(ids) == text and ids.dtype == torch.int64
        assert torch.equal(tokens.restore(json.loads(json.dumps(bpe.state()))).encode(text), ids)
    assert len(bpe.encode(LINE)) < len(LINE) / 3 and bpe.decode(bpe.start()) == "\n"


def test_bpe_learns_a_text_without_spaces_in_parts():
    """As one word 300,000 letters take a minute."""
    pytest.importorskip("tokenizers")
    text = "".join(random.Random(0).choices("ACGT", k=300_000))
    bpe = tokens.BPE.learn(text, 300)
    ids = bpe.encode(text)
    assert len(bpe) == 300 and bpe.decode(ids) == text and len(ids) < len(text) / 2
    long = tokens.BPE.learn("N" * 3000, 300)
    assert max(map(len, long.tokenizer.get_vocab())) == 256 and long.decode(long.encode("N" * 999)) == "N" * 999


def test_training_on_bpe_and_its_loss_per_character(book, tmp_path, capsys):  # noqa: F811
    pytest.importorskip("tokenizers")
    out = tmp_path / "run"
    options = "--tokenizer", "bpe", "--vocab-size", 280, "--block-size", 8, "--batch-size", 8, "--steps", 100
    assert run("train", "gpt", "--text", book, "--out", out, *options, "--n-layer", 1, "--n-head", 2, "--n-embd", 32) == 0
    (_, loss), (_, per_character) = metrics(out, "heldout")[-1], metrics(out, "per character")[-1]
    meta = files.load_checkpoint(out)[1]
    bpe, heldout = tokens.restore(meta), textdata.read(book)[2]
    assert len(bpe) == meta["config"]["vocab_size"] and per_character == pytest.approx(loss * len(bpe.encode(heldout)) / len(heldout))
    assert "nats per token" not in capsys.readouterr().err and per_character < 1.0
    assert run("generate", "gpt", "--checkpoint", out, "--prompt", "the quick", "--tokens", 10, "--temperature", 0) == 0
    assert capsys.readouterr().out.startswith("the quick brown fox jumps")


# adder


def test_sums_as_digits():
    prompts, answers = adder.encode(torch.tensor([[85, 50], [1, 2], [99, 99]]), 2)
    assert prompts.tolist() == [[8, 5, 5, 0], [0, 1, 0, 2], [9, 9, 9, 9]]
    assert answers.tolist() == [[5, 3, 1], [3, 0, 0], [8, 9, 1]]
    idx, targets = adder.parallel(prompts, answers)
    assert idx[0].tolist() == [8, 5, 5, 0, 5, 3] and targets[0].tolist() == [-1, -1, -1, 5, 3, 1]


@pytest.mark.parametrize("digits", [1, 2, 9])
def test_training_sees_no_sum_that_is_held_out_in_either_order(digits):
    unseen = adder.heldout(digits)
    hidden = {frozenset(pair) for pair in unseen.tolist()}
    assert len(hidden) == len(unseen) >= (4 if digits == 1 else 450) and torch.equal(unseen, adder.heldout(digits))
    pairs = adder.sample(digits, 5000, unseen, torch.Generator().manual_seed(0))
    assert not hidden & set(map(frozenset, pairs.tolist())) and 0 <= pairs.min() and pairs.max() < 10**digits
    if digits == 2:
        assert len({tuple(pair) for pair in pairs.tolist()}) > 3500  # of 10,000


def test_the_adder_is_scored_by_what_it_generates(monkeypatch):
    from minmodels.recipes.adder import answer

    made = recipe("adder")(MODELS["adder"].options(n_layer=1, n_head=1, n_embd=8))

    def generate(idx, count, **_):  # right unless the sum's last digit is 7
        a, b = idx[:, 0] * 10 + idx[:, 1], idx[:, 2] * 10 + idx[:, 3]
        digits = (a + b)[:, None] // torch.tensor([1, 10, 100]) % 10
        return torch.cat((idx, digits.masked_fill(digits[:, :1] == 7, 0)), 1)

    monkeypatch.setattr(made.model, "generate", generate)
    wrong = (made.unseen.sum(1) % 10 == 7).double().mean().item()
    assert 0.05 < wrong < 0.2 and made.heldout(made.model, lambda t: t)["exact"] == pytest.approx(1 - wrong)
    assert answer(made.model, "9+44") == "9+44=53"


# the command line

TINY = {
    "bigram": ["bigram", "--block-size", 16],
    "gpt-dropout": ["gpt", "--block-size", 8, "--dropout", 0.3, "--noise", 0.1, *WIDTH],
    "gpt-bpe": ["gpt", "--tokenizer", "bpe", "--vocab-size", 280, "--block-size", 8, *WIDTH],
    "adder": ["adder", *WIDTH],
    "transformer": ["transformer", "--length", 5, *WIDTH],
}


def tiny(name, book, out, *args):  # noqa: F811
    if name == "gpt-bpe":
        pytest.importorskip("tokenizers")
    model, *options = TINY[name]
    text = ["--text", book] if "text" in MODELS[model].options.__dataclass_fields__ else []
    return run("train", model, *text, "--out", out, *options, "--batch-size", 4, "--warmup", 3, *args)


@pytest.mark.parametrize("name", TINY)
def test_resuming_repeats_the_losses_bit_for_bit(name, book, tmp_path, monkeypatch, capsys):  # noqa: F811
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    options = "--steps", 7, "--eval-every", 3, "--seed", 3
    assert tiny(name, book, straight, *options) == 0
    with monkeypatch.context() as m:
        stop_after(m, 4)
        assert tiny(name, book, broken, *options) == 130
    assert run("train", TINY[name][0], "--out", broken, "--resume") == 0
    for key in ("loss", "lr", "heldout"):
        assert metrics(broken, key) == metrics(straight, key)
    (tensors, _), (others, _) = (files.load_checkpoint(out) for out in (straight, broken))
    assert tensors.keys() == others.keys() and all(torch.equal(t, others[key]) for key, t in tensors.items())
    capsys.readouterr()
    assert run("eval", TINY[name][0], "--checkpoint", broken) == 0
    assert capsys.readouterr().out.startswith(f"held-out loss {metrics(straight, 'heldout')[-1][1]:.3f}")


def told(text):
    """The command that a hint gives."""
    return shlex.split(re.search(r": python -m minmodels (.*)", text)[1])


SMALLEST = {"bigram": [], "adder": ["--digits", 1, *WIDTH], "transformer": ["--length", 4, *WIDTH]}


@pytest.mark.parametrize("name", SMALLEST)
def test_hints_are_commands_that_work(name, book, tmp_path, monkeypatch, capsys):  # noqa: F811
    text = ["--text", book] if name == "bigram" else []
    with monkeypatch.context() as m:
        stop_after(m, 1)
        assert run("train", name, *text, "--out", tmp_path / "my run", *SMALLEST[name], "--steps", 2) == 130
    assert run(*told(capsys.readouterr().err)) == 0
    assert run(*told(capsys.readouterr().out)) == 0


def test_the_bigram_model_learns_and_continues(book, tmp_path, capsys):  # noqa: F811
    out = tmp_path / "run"
    assert run("train", "bigram", "--text", book, "--out", out, "--steps", 300, "--block-size", 16) == 0
    text = textdata.load(book, 16)
    ids, count = text.train.long(), torch.zeros(len(text.vocab), len(text.vocab))
    count.index_put_((ids[:-1], ids[1:]), torch.ones(len(ids) - 1), accumulate=True)
    p = count / count.sum()
    best = -(p * (count / count.sum(1, keepdim=True)).log()).nansum().item()  # the entropy of a character after another
    assert sum(loss for _, loss in metrics(out, "loss")[-20:]) / 20 == pytest.approx(best, abs=0.05)
    capsys.readouterr()
    assert run("generate", "bigram", "--checkpoint", out, "--prompt", "qu", "--tokens", 20, "--top-k", 1) == 0
    written = capsys.readouterr().out[:-1]
    assert len(written) == 22 and all(pair in LINE * 2 for pair in neighbours(written))


def neighbours(text):
    return [text[i : i + 2] for i in range(len(text) - 1)]


def test_answers_of_the_adder_and_of_the_encoder_decoder(tmp_path, capsys):
    # steps enough that each of six seeds answers right: the last bits, which a level or a build may change, decide nothing
    short = "--eval-every", 1000, "--n-layer", 1, "--steps", 500
    adder, reverser = ("--n-embd", 32, "--batch-size", 32), ("--n-embd", 64, "--batch-size", 64, "--lr", 0.005)
    assert run("train", "adder", "--out", tmp_path / "a", "--digits", 1, *short, *adder) == 0
    assert run("train", "transformer", "--out", tmp_path / "t", "--length", 4, *short, *reverser) == 0
    capsys.readouterr()
    for name, folder, prompt, expected in (("adder", "a", "3+4", "3+4=7"), ("transformer", "t", "abc", "cba")):
        assert run("generate", name, "--checkpoint", tmp_path / folder, "--prompt", prompt) == 0
        assert capsys.readouterr().out == expected + "\n"
    for name, folder, prompt, message in (
        ("adder", "a", "3-4", "the prompt must be a sum like 12+34, got '3-4'"),
        ("adder", "a", "12+3", "12+3: the model has learned to add numbers of 1 digits at most"),
        ("transformer", "t", "Hi", "the prompt must be one word of the letters a to z, got 'Hi'"),
        ("transformer", "t", "", "the prompt must be one word of the letters a to z, got ''"),
        ("transformer", "t", "abcde", "abcde: 5 letters, and the model has learned from words of 4 at most"),
        ("transformer", "a", "abc", f"{tmp_path / 'a'} is a checkpoint of adder, not of transformer"),
    ):
        assert run("generate", name, "--checkpoint", tmp_path / folder, "--prompt", prompt) == 2
        assert capsys.readouterr().err == f"error: {message}\n"


BAD = {
    "train gpt --preset huge": "invalid choice: 'huge'",
    "train gpt --tokenizer words": "invalid choice: 'words'",
    "train gpt --vocab-size 200": "must be a whole number from 256 on, got '200'",
    "train gpt --dropout 1": "error: dropout must be from 0 to less than 1, got 1.0",
    "train gpt --noise 0.6": "error: noise must be at most 0.5, got 0.6",
    "train adder --digits 10": "error: --digits 10: at most 9",
    "train adder --n-head 3": "error: n_embd must be a multiple of n_head, got ",
    "train transformer --length 3": "must be a whole number from 4 on, got '3'",
    "train transformer --n-embd 10": "error: n_embd must be even and a multiple of n_head, got 10 and 4",
    "generate gpt --checkpoint x --top-p 0": "must be more than 0 and at most 1, got '0'",
    "generate adder --checkpoint x --top-k 3 --seed 1": "error: --top-k --seed: adder gives the likeliest answer to the prompt",
    "generate transformer --checkpoint x --tokens 500": "error: --tokens: transformer gives the likeliest answer to the prompt",
    "generate gpt --checkpoint x --top-k -1": "must be a whole number from 0 on, got '-1'",
}


@pytest.mark.parametrize(("line", "message"), BAD.items())
def test_bad_options(line, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run(*line.split()) == 2
    assert message in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_text_too_short_for_its_context_in_tokens(tmp_path, capsys):
    pytest.importorskip("tokenizers")
    (tmp_path / "x.txt").write_text(LINE * 4)
    assert run("train", "gpt", "--text", tmp_path / "x.txt", "--out", tmp_path / "run", "--tokenizer", "bpe", "--block-size", 64) == 2
    assert re.fullmatch(r"error: .*x\.txt is too short for a context of 64 tokens: it has \d+, of which \d+ .*\n", capsys.readouterr().err)
    assert not (tmp_path / "run").exists()
