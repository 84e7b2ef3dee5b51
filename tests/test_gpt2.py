"""GPT-2's weights and tokens from a folder of Hugging Face."""

import json
import re

import pytest
import torch

pytest.importorskip("matplotlib")  # the extra "models"
pytest.importorskip("rich")
pytest.importorskip("safetensors")
from safetensors.torch import load_file, save_file

from minmodels import gpt2
from minmodels.data import tokens
from minmodels.mingpt import GPT, GPTConfig
from model_cases import scaled
from test_minmodels_cli import LINE, run


def folder_of(tmp_path, **changes):
    """A GPT-2 as Hugging Face keeps it, random, and the model with the same weights."""
    model = scaled(GPT(GPTConfig(vocab_size=300, block_size=12, n_layer=2, n_head=2, n_embd=8)), 5)
    tensors = {}
    for name, t in model.state_dict().items():
        tensors[f"transformer.{name}"] = (t.T if name.endswith(gpt2.TRANSPOSED) else t).contiguous()
    tensors["transformer.h.0.attn.bias"] = torch.ones(1, 1, 12, 12)  # the mask that old files hold
    config = {"model_type": "gpt2", "vocab_size": 300, "n_positions": 12, "n_layer": 2, "n_head": 2, "n_embd": 8, **changes}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(tensors, tmp_path / "model.safetensors")
    return model


def tokenizer_of(folder, kind):
    bpe = tokens.BPE.learn(LINE * 20, 299).tokenizer
    bpe.add_special_tokens([tokens.END_OF_TEXT])
    if kind == "tokenizer.json":
        bpe.save(str(folder / kind))
    else:
        bpe.model.save(str(folder))  # vocab.json and merges.txt
        vocab = json.loads((folder / "vocab.json").read_text())
        (folder / "vocab.json").write_text(json.dumps({**vocab, tokens.END_OF_TEXT: len(vocab)}))
    return bpe


def test_weights_of_a_folder(tmp_path):
    ours = folder_of(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(gpt2.load(tmp_path).parameters(), ours.parameters(), strict=True))


def test_weights_in_several_files_and_in_half_precision(tmp_path):
    ours = folder_of(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    names = sorted(tensors)
    (tmp_path / "model.safetensors").unlink()
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({name: tensors[name].half() for name in part}, tmp_path / file)
    index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    for a, b in zip(gpt2.load(tmp_path).parameters(), ours.parameters(), strict=True):
        assert torch.equal(a, b.half().float())


@pytest.mark.parametrize("kind", ["tokenizer.json", "merges.txt"])
def test_generation_from_a_folder(tmp_path, capsys, kind):
    pytest.importorskip("tokenizers")
    ours, bpe = folder_of(tmp_path), tokenizer_of(tmp_path, kind)
    for prompt, start in (("the lazy fox", bpe.encode("the lazy fox").ids), ("", [bpe.token_to_id(tokens.END_OF_TEXT)])):
        assert run("generate", "gpt", "--checkpoint", tmp_path, "--prompt", prompt, "--tokens", 5, "--temperature", 0) == 0
        ids = ours.generate(torch.tensor([start]), 5, temperature=0)[0]
        assert capsys.readouterr().out == bpe.decode(ids[0 if prompt else 1 :].tolist(), skip_special_tokens=False) + "\n"


def test_logits_are_those_of_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=300, n_positions=24, n_layer=3, n_head=4, n_embd=32)
    theirs = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.mul_(5) if p.dim() == 2 else p.add_(0.1 * torch.randn_like(p))
    theirs.save_pretrained(tmp_path)
    idx = torch.randint(300, (2, 24))
    with torch.no_grad():
        expected, actual = theirs(idx).logits, gpt2.load(tmp_path)(idx)
    assert expected.std() > 0.5
    torch.testing.assert_close(actual, expected, atol=2e-5, rtol=2e-5)


def test_tokens_are_those_of_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("tokenizers")
    tokenizer_of(tmp_path, "merges.txt")
    theirs = transformers.GPT2Tokenizer.from_pretrained(tmp_path)
    for text in (LINE, " It's 42\u00a0degrees,  isn't it?\n\n", "\U0001f600 Å"):
        assert tokens.BPE.read(tmp_path).encode(text).tolist() == theirs(text)["input_ids"]


def test_what_a_training_left_in_a_tokenizer_cuts_and_pads_no_prompt(tmp_path):
    pytest.importorskip("tokenizers")
    bpe = tokenizer_of(tmp_path, "tokenizer.json")
    ids = bpe.encode(LINE).ids
    bpe.enable_truncation(3)
    bpe.enable_padding(length=50)
    bpe.save(str(tmp_path / "tokenizer.json"))
    assert tokens.BPE.read(tmp_path).encode(LINE).tolist() == ids


BAD_FOLDERS = {
    "another-model": ({"model_type": "llama"}, "its model_type is llama, not gpt2"),
    "another-activation": ({"activation_function": "relu"}, "activation_function is relu, minGPT has gelu_new"),
    "another-width": ({"n_inner": 12}, "n_inner is 12, minGPT has 4 n_embd"),
    "another-size": ({"n_layer": 3}, "the weights do not fit "),
    "heads": ({"n_head": 3}, "n_embd must be a multiple of n_head, got 8 and 3"),
}


@pytest.mark.parametrize(("changes", "message"), BAD_FOLDERS.values(), ids=BAD_FOLDERS)
def test_bad_folders(tmp_path, capsys, changes, message):
    pytest.importorskip("tokenizers")
    folder_of(tmp_path, **changes)
    tokenizer_of(tmp_path, "tokenizer.json")
    assert run("generate", "gpt", "--checkpoint", tmp_path) == 2
    assert re.fullmatch(f"error: [^\n]*{message}[^\n]*\n", capsys.readouterr().err)


def test_folders_with_files_missing_or_damaged(tmp_path, capsys):
    pytest.importorskip("tokenizers")
    folder_of(tmp_path)

    def error():
        assert run("generate", "gpt", "--checkpoint", tmp_path, "--tokens", 1) == 2
        message = re.fullmatch("error: ([^\n]*)\n", capsys.readouterr().err)
        return message[1]

    assert error() == f"{tmp_path} has no tokenizer: neither tokenizer.json nor vocab.json and merges.txt"
    (tmp_path / "tokenizer.json").write_text("{")
    assert error().startswith(f"the tokenizer in {tmp_path} cannot be read: ")
    tokenizer_of(tmp_path, "tokenizer.json")
    (tmp_path / "model.safetensors").write_bytes(b"PK" * 9)
    assert error().startswith(f"the weights in {tmp_path} cannot be read: ")
    (tmp_path / "model.safetensors").unlink()
    assert error() == f"{tmp_path} has no model.safetensors"
    (tmp_path / "config.json").write_text("[]")
    assert error() == f"{tmp_path / 'config.json'}: its model_type is None, not gpt2"
    (tmp_path / "config.json").write_text("{")
    assert error().startswith(f"cannot read {tmp_path / 'config.json'}: ")
