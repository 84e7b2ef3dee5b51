"""The encoder-decoder of 2017; and the first steps of the small models beside those on PyTorch's ops."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

pytest.importorskip("matplotlib")  # the extra "models"
pytest.importorskip("rich")
pytest.importorskip("safetensors")

from minmodels import bigram, mingpt, transformer
from minmodels.bigram import Bigram, BigramConfig
from minmodels.data import adder, reverse
from minmodels.mingpt import GPT, GPTConfig
from minmodels.transformer import Transformer, TransformerConfig
from model_cases import scaled


def test_words_back_to_front():
    src, idx, targets = reverse.pairs(["abc", "z"], 4)
    a = 3
    assert src.tolist() == [[a, a + 1, a + 2, 0], [a + 25, 0, 0, 0]]
    assert idx.tolist() == [[1, a + 2, a + 1, a, 0], [1, a + 25, 0, 0, 0]]
    assert targets.tolist() == [[a + 2, a + 1, a, 2, -1], [a + 25, 2, -1, -1, -1]]
    assert reverse.decode(torch.tensor([a + 2, a + 1, a, 2, 9])) == "cba"
    unseen = reverse.heldout(6)
    assert len(set(unseen)) == 500 and {len(w) for w in unseen} == {3, 4, 5, 6}
    drawn = reverse.sample(6, 300, {"a", "b"}, torch.Generator().manual_seed(0))
    assert {len(w) for w in drawn} == set(range(1, 7)) and not {"a", "b"} & set(drawn) and "c" in drawn


def torch_layers(model):
    """The same network from PyTorch's own layers, with the same weights."""
    config = model.config
    options = dict(dim_feedforward=4 * config.n_embd, dropout=0.0, batch_first=True, activation="relu")
    encoder = [nn.TransformerEncoderLayer(config.n_embd, config.n_head, **options) for _ in model.encoder]
    decoder = [nn.TransformerDecoderLayer(config.n_embd, config.n_head, **options) for _ in model.decoder]

    def attention(theirs, ours):
        theirs.in_proj_weight.copy_(torch.cat((ours.q.weight, ours.k.weight, ours.v.weight)))
        theirs.in_proj_bias.copy_(torch.cat((ours.q.bias, ours.k.bias, ours.v.bias)))
        theirs.out_proj.load_state_dict(ours.out.state_dict())

    with torch.no_grad():
        for theirs, ours in zip([*encoder, *decoder], [*model.encoder, *model.decoder], strict=True):
            attention(theirs.self_attn, ours.self_attn)
            theirs.linear1.load_state_dict(ours.ff[0].state_dict())
            theirs.linear2.load_state_dict(ours.ff[2].state_dict())
            for name, _ in ours.named_children():
                if name.startswith("norm"):
                    getattr(theirs, name).load_state_dict(getattr(ours, name).state_dict())
            if hasattr(ours, "cross_attn"):
                attention(theirs.multihead_attn, ours.cross_attn)
    return encoder, decoder


def padded(longest=7, count=5):
    words = reverse.sample(longest, count - 1, set(), torch.Generator().manual_seed(1))
    return reverse.pairs(["q", *words], longest)


def test_encoder_decoder_is_pytorchs():
    model = scaled(Transformer(TransformerConfig(reverse.VOCAB, 2, 2, 16)), 1.0)
    src, idx, _ = padded()
    encoder, decoder = torch_layers(model)
    memory, x = model._embed(src), model._embed(idx)
    for layer in encoder:
        memory = layer(memory, src_key_padding_mask=src == 0)
    for layer in decoder:
        causal = nn.Transformer.generate_square_subsequent_mask(idx.shape[1]) < 0
        x = layer(x, memory, tgt_mask=causal, memory_key_padding_mask=src == 0)
    assert (src == 0).any()
    torch.testing.assert_close(model(src, idx), x @ model.embedding.weight.T, atol=2e-5, rtol=1e-5)


def test_padding_changes_nothing():
    model = scaled(Transformer(TransformerConfig(reverse.VOCAB, 2, 2, 16)).double(), 1.0)
    src, idx, targets = padded()
    with torch.no_grad():
        longer = F.pad(src, (0, 3)), F.pad(idx, (0, 2)), F.pad(targets, (0, 2), value=-1)
        assert (model(*longer[:2])[:, :-2] - model(src, idx)).abs().max() < 1e-12
        assert model(*longer).item() == pytest.approx(model(src, idx, targets).item(), rel=1e-12)
        changed = idx.clone()
        changed[:, 4:] = 5
        assert (model(src, changed)[:, :4] - model(src, idx)[:, :4]).abs().max() < 1e-12
        assert (model(src.flip(0), idx) - model(src, idx)).abs().max() > 0.01  # the source is seen


def test_positions():
    p = transformer.positions(50, 8)
    assert p.shape == (50, 8) and p[0].tolist() == [0, 1] * 4
    assert p[7, 2].item() == pytest.approx(math.sin(7 / 10000 ** (2 / 8)))
    assert p[7, 7].item() == pytest.approx(math.cos(7 / 10000 ** (6 / 8)))


def words_of(generator):
    return reverse.pairs(reverse.sample(6, 16, set(), generator), 6)


def sums_of(generator):
    return adder.parallel(*adder.encode(adder.sample(2, 16, adder.heldout(2), generator), 2))


TRAINED = {
    "bigram": (bigram, lambda: Bigram(BigramConfig(10)), sums_of),
    "adder": (mingpt, lambda: GPT(GPTConfig(10, 6, 1, 2, 32)), sums_of),
    "transformer": (transformer, lambda: Transformer(TransformerConfig(reverse.VOCAB, 1, 2, 32)), words_of),
}


@pytest.mark.parametrize(("module", "build", "batch"), TRAINED.values(), ids=TRAINED)
def test_losses_of_the_first_50_steps_are_those_on_pytorchs_ops(module, build, batch, monkeypatch):
    """In float64: Adam divides by gradients near 0, so that in 50 steps a last bit of float32 becomes 7e-4 of a loss, now and then."""

    def losses():
        torch.manual_seed(0)
        model, generator, found = build().double(), torch.Generator().manual_seed(0), []
        optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
        for _ in range(50):
            loss = model(*batch(generator))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        return torch.tensor(found, dtype=torch.float64)

    def sdpa(q, k, v, *, causal=False, key_mask=None):
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, attn_mask=None if key_mask is None else key_mask[:, None, None])

    ours = losses()
    monkeypatch.setattr(module, "attention", sdpa, raising=False)
    monkeypatch.setattr(module, "cross_entropy", F.cross_entropy)
    torch.testing.assert_close(ours, losses(), atol=0, rtol=1e-12)
    assert ours[-5:].mean() < 0.98 * ours[:5].mean()


def test_bad_sizes_of_the_encoder_decoder():
    with pytest.raises(ValueError, match="n_embd must be even and a multiple of n_head, got 15 and 8"):
        TransformerConfig(n_embd=15)
    with pytest.raises(ValueError, match="n_layer must be a positive int, got 0"):
        TransformerConfig(n_layer=0)
