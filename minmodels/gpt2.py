"""GPT-2 from a local folder of Hugging Face: config.json, *.safetensors, and tokenizer.json or vocab.json and merges.txt."""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from minmodels import UserError
from minmodels.mingpt import GPT, GPTConfig

SIZES = {"vocab_size": "vocab_size", "n_positions": "block_size", "n_layer": "n_layer", "n_head": "n_head", "n_embd": "n_embd"}
FIXED = {  # of the config, what minmodels.mingpt has built in: the values that it can do, the default first
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
    "tie_word_embeddings": (True,),
}
TRANSPOSED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # Hugging Face keeps these as (in, out)
BUFFERS = (".attn.bias", ".attn.masked_bias")  # the causal mask


def is_folder(path: str | Path) -> bool:
    return (Path(path) / "config.json").is_file()


def load(folder: str | Path) -> GPT:
    """The model, in float32 on the CPU, in evaluation mode; minmodels.data.tokens.BPE.read reads its tokenizer. Raises UserError."""
    folder = Path(folder)
    model = GPT(config := _config(folder))
    tensors = {name.removeprefix("transformer."): t for name, t in _tensors(folder).items() if not name.endswith(BUFFERS)}
    head = tensors.pop("lm_head.weight", None)  # the embedding again, where it was saved twice
    if head is not None and not torch.equal(head, tensors.get("wte.weight", head)):
        raise UserError(f"{folder}: lm_head.weight is not wte.weight, and minGPT ties the two")
    tensors = {name: (t.T if name.endswith(TRANSPOSED) else t).float() for name, t in tensors.items()}
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise UserError(f"{folder}: the weights do not fit {config}: {str(error).splitlines()[-1].strip()}") from error
    return model.eval()


def _config(folder: Path) -> GPTConfig:
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    if not isinstance(config, dict) or config.get("model_type") != "gpt2":
        kind = config.get("model_type") if isinstance(config, dict) else None
        raise UserError(f"{path}: its model_type is {kind}, not gpt2")
    for name, values in FIXED.items():
        if config.get(name, values[0]) not in values:
            raise UserError(f"{path}: {name} is {config[name]}, minGPT has {values[0]}")
    if config.get("n_inner") not in (None, 4 * config.get("n_embd", 768)):
        raise UserError(f"{path}: n_inner is {config['n_inner']}, minGPT has 4 n_embd")
    try:
        return GPTConfig(**{ours: config[theirs] for theirs, ours in SIZES.items() if theirs in config})
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error


def _tensors(folder: Path) -> dict[str, Tensor]:
    index = folder / "model.safetensors.index.json"  # of weights in several files
    try:
        names = set(json.loads(index.read_text())["weight_map"].values()) if index.exists() else {"model.safetensors"}
        return {name: t for file in sorted(names) for name, t in load_file(folder / file).items()}
    except FileNotFoundError as error:
        raise UserError(f"{folder} has no {Path(error.filename or 'model.safetensors').name}") from error
    except (OSError, ValueError, KeyError, AttributeError, SafetensorError) as error:
        raise UserError(f"the weights in {folder} cannot be read: {error}") from error
