"""BERT with its tokenizer from a folder: one of our trainings, or a Hugging Face BERT (config.json, the weights, the tokenizer)."""

import dataclasses
import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.implementations import BertWordPieceTokenizer

from minmodels import UserError
from minmodels.device import pick_device
from minmodels.minbert import BERT, BERTConfig
from minmodels.recipes import load as load_ours

FIXED = {"model_type": "bert", "hidden_act": "gelu", "position_embedding_type": "absolute", "is_decoder": False}  # what our model computes
TIED = {  # of the head for masked words, what our model has once
    "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
    "cls.predictions.decoder.bias": "cls.predictions.bias",
}


def load(folder: str, device: str = "") -> tuple[BERT, Tokenizer, str]:
    """(model in evaluation mode, tokenizer, the text that it learned from: "" is our default). Raises UserError.

    A Hugging Face folder may lack the heads of pretraining, as that of a sentence embedding does; they are new then, and
    model.fresh_words is True if that for masked words is.
    """
    path = Path(folder)
    if not (path / "config.json").exists():
        model, meta = load_ours("minbert", folder, device)
        return model, Tokenizer.from_str(meta["tokenizer"]), meta["options"]["text"]
    model, tokenizer = from_huggingface(path), _tokenizer(path)
    if tokenizer.get_vocab_size() > model.config.vocab_size:
        raise UserError(f"{folder}: the tokenizer has {tokenizer.get_vocab_size()} tokens, the model {model.config.vocab_size}")
    return model.to(pick_device(device)).eval(), tokenizer, ""


def from_huggingface(path: Path) -> BERT:
    try:
        given = json.loads((path / "config.json").read_text())
        weights = path / "model.safetensors"
        tensors = load_file(weights) if weights.exists() else torch.load(path / "pytorch_model.bin", map_location="cpu", weights_only=True)
        if not (isinstance(given, dict) and isinstance(tensors, dict)):
            raise TypeError("each must be a table of names")
    except FileNotFoundError as error:
        raise UserError(f"{path} has no model.safetensors and no pytorch_model.bin") from error
    except Exception as error:  # what is no file of PyTorch makes torch.load raise anything
        raise UserError(f"cannot read {path}: its config.json or its weights are damaged ({error})") from error
    for key, value in FIXED.items():
        if given.get(key, value) != value:
            raise UserError(f"{path}/config.json has {key} = {given[key]!r}, and this model has {value!r}")
    try:
        model = BERT(BERTConfig(**{f.name: given[f.name] for f in dataclasses.fields(BERTConfig) if f.name in given}))
    except ValueError as error:
        raise UserError(f"{path}/config.json: {error}") from error
    own = model.state_dict()
    named = {_name(key): t.float() for key, t in tensors.items()}
    for key, kept in TIED.items():
        if key in named and not torch.equal(named[key], named.setdefault(kept, named[key])):
            raise UserError(f"{path}: {key} is not {kept}, and minBERT ties the two")
    named = {key: t for key, t in named.items() if key in own}
    missing = [key for key in own if key not in named]
    model.fresh_words = any(key.startswith("cls.predictions.") for key in missing)
    lost = [key for key in missing if not key.startswith(("cls.", "bert.pooler."))]
    wrong = [key for key, t in named.items() if t.shape != own[key].shape]
    if lost or wrong:
        raise UserError(f"{path} does not fit its config.json: {(lost + wrong)[0]} is {'missing' if lost else 'of another shape'}")
    model.load_state_dict(named, strict=False)
    return model


def _name(key: str) -> str:
    key = key.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")  # the oldest checkpoints
    return key if key.startswith(("bert.", "cls.")) else "bert." + key


def _tokenizer(path: Path) -> Tokenizer:
    if (path / "tokenizer.json").exists():
        try:
            tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
        except Exception as error:  # it raises nothing narrower
            raise UserError(f"cannot read {path}/tokenizer.json: {error}") from error
        tokenizer.no_padding()
        tokenizer.no_truncation()
        return tokenizer
    if not (path / "vocab.txt").exists():
        raise UserError(f"{path} has no tokenizer.json and no vocab.txt")
    settings = path / "tokenizer_config.json"
    try:
        lower = json.loads(settings.read_text()).get("do_lower_case", True) if settings.exists() else True
    except (OSError, ValueError, AttributeError) as error:  # AttributeError: JSON, but no object
        raise UserError(f"cannot read {settings}: {error}") from error
    return Tokenizer.from_str(BertWordPieceTokenizer(str(path / "vocab.txt"), lowercase=lower).to_str())
