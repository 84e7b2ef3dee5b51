"""Text as tokens: characters, or a byte-level BPE (Sennrich et al. 2016, Radford et al. 2019), learned from a text or read from a folder.

Both kinds have encode(text) -> (T,) ids, decode(ids) -> text, start(), len(), and state(), what a checkpoint keeps of them.
"""

import hashlib
from pathlib import Path

import torch
from torch import Tensor

from minmodels import UserError
from minmodels.data import text as textdata

END_OF_TEXT = "<|endoftext|>"  # of GPT-2: it stands between the texts that it has learned from


class Characters:
    unit = "characters"

    def __init__(self, vocab: str):
        self.vocab = vocab

    def __len__(self):
        return len(self.vocab)

    def encode(self, text: str) -> Tensor:
        return textdata.encode(text, self.vocab)

    def decode(self, ids: Tensor) -> str:
        return textdata.decode(ids, self.vocab)

    def start(self) -> Tensor:
        """What an empty prompt starts after: a line break."""
        return self.encode("\n" if "\n" in self.vocab else self.vocab[0])

    def state(self) -> dict:
        return {"vocab": self.vocab}


class BPE:
    """Every byte is a token, so that any text has one; the others are pairs of tokens, the most frequent ones first."""

    unit = "tokens"

    def __init__(self, tokenizer):
        """tokenizer: tokenizers.Tokenizer."""
        self.tokenizer = tokenizer

    @classmethod
    def learn(cls, text: str, vocab_size: int) -> "BPE":
        """The same text, the same tokens. There are fewer than vocab_size where the text has no more pairs to join."""
        from tokenizers import Regex, pre_tokenizers, trainers

        tokenizer = _byte_level()
        words, alphabet = tokenizer.pre_tokenizer, pre_tokenizers.ByteLevel.alphabet()
        parts = pre_tokenizers.Split(Regex(".{1,256}"), "isolated")  # the time that learning takes rises with the square of a word's length
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, parts])
        tokenizer.train_from_iterator([text], trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False))
        tokenizer.pre_tokenizer = words
        return cls(tokenizer)

    @classmethod
    def read(cls, folder: Path) -> "BPE":
        """From tokenizer.json, or else vocab.json and merges.txt, as GPT-2 folders of Hugging Face have them. Raises UserError."""
        from tokenizers import Tokenizer, models

        whole, parts = folder / "tokenizer.json", (folder / "vocab.json", folder / "merges.txt")
        try:
            if whole.exists():
                tokenizer = Tokenizer.from_file(str(whole))
                tokenizer.no_padding()  # such as a training with them has left there
                tokenizer.no_truncation()
                return cls(tokenizer)
            if not all(part.exists() for part in parts):
                raise UserError(f"{folder} has no tokenizer: neither tokenizer.json nor vocab.json and merges.txt")
            tokenizer = _byte_level(models.BPE.from_file(*map(str, parts)))
        except UserError:
            raise
        except Exception as error:  # tokenizers raises nothing narrower
            raise UserError(f"the tokenizer in {folder} cannot be read: {error}") from error
        if tokenizer.token_to_id(END_OF_TEXT) is not None:
            tokenizer.add_special_tokens([END_OF_TEXT])
        return cls(tokenizer)

    def __len__(self):
        return self.tokenizer.get_vocab_size()

    def encode(self, text: str) -> Tensor:
        return torch.tensor(self.tokenizer.encode(text, add_special_tokens=False).ids, dtype=torch.int64)

    def decode(self, ids: Tensor) -> str:
        return self.tokenizer.decode(ids.tolist(), skip_special_tokens=False)

    def start(self) -> Tensor:
        """What an empty prompt starts after: the end of another text, for GPT-2's own tokens, or else a line break."""
        return self.encode("\n" if self.tokenizer.token_to_id(END_OF_TEXT) is None else END_OF_TEXT)

    def state(self) -> dict:
        return {"tokenizer": self.tokenizer.to_str()}


def restore(state: dict) -> Characters | BPE:
    """From what state() gave."""
    if "vocab" in state:
        return Characters(state["vocab"])
    from tokenizers import Tokenizer

    return BPE(Tokenizer.from_str(state["tokenizer"]))


def load(path: str, block_size: int, tokenizer: str, vocab_size: int) -> tuple[textdata.Text, Characters | BPE]:
    """The text of a file (see minmodels.data.text.load) and its tokens: "chars", or "bpe", learned from the part that is not held out."""
    if tokenizer == "chars":
        text = textdata.load(path, block_size)
        return text, Characters(text.vocab)
    name, *parts = textdata.read(path)
    tokens = BPE.learn(parts[0], vocab_size)
    train, heldout = (tokens.encode(part).int() for part in parts)
    textdata.check_length(name, train, heldout, block_size, "tokens")
    digest = hashlib.sha256(f"{len(parts[0])} {parts[0]}{parts[1]}".encode())
    digest.update(tokens.state()["tokenizer"].encode())
    return textdata.Text(name, "", train, heldout, digest.hexdigest()), tokens


def _byte_level(model=None):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    tokenizer = Tokenizer(model or models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return tokenizer
