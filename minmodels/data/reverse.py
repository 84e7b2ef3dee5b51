"""Words of random letters, and the same words back to front: a task that a transformer must solve without an error."""

import torch
from torch import Tensor

PAD, START, END = range(3)  # 0 is what minmodels.transformer takes for padding
LETTERS = "abcdefghijklmnopqrstuvwxyz"
VOCAB = len(LETTERS) + 3


def heldout(longest: int, count: int = 500) -> list[str]:
    """Different words of at least half the longest length: the shorter ones are too few to keep any from training."""
    generator, words = torch.Generator().manual_seed(0), {}
    while len(words) < count:
        words[draw((longest + 1) // 2, longest, generator)] = None
    return list(words)


def draw(shortest: int, longest: int, generator: torch.Generator) -> str:
    length = int(torch.randint(shortest, longest + 1, (), generator=generator))
    return "".join(LETTERS[i] for i in torch.randint(len(LETTERS), (length,), generator=generator).tolist())


def sample(longest: int, batch: int, without: set[str], generator: torch.Generator) -> list[str]:
    """Random words of 1 to `longest` letters, none of those in `without`."""
    words = []
    while len(words) < batch:
        word = draw(1, longest, generator)
        words += [word] * (word not in without)
    return words


def encode(words: list[str], longest: int) -> Tensor:
    """(words, longest) ids, padded at the end."""
    rows = [[3 + LETTERS.index(c) for c in word] + [PAD] * (longest - len(word)) for word in words]
    return torch.tensor(rows, dtype=torch.int64).reshape(len(words), longest)


def decode(ids: Tensor) -> str:
    """The letters up to the first id that is none."""
    word = ""
    for i in ids.tolist():
        if i < 3:
            break
        word += LETTERS[i - 3]
    return word


def pairs(words: list[str], longest: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sources (N, longest), and START Y1 Y2 and Y1 Y2 END, the words back to front, (N, longest + 1) each; -1: not counted."""
    backward = encode([word[::-1] for word in words], longest)
    idx = torch.cat((torch.full((len(words), 1), START), backward), 1)
    lengths = torch.tensor([[len(word)] for word in words])
    place = torch.arange(longest + 1)
    targets = torch.cat((backward, torch.full((len(words), 1), PAD)), 1)
    return encode(words, longest), idx, targets.masked_fill(place == lengths, END).masked_fill(place > lengths, -1)
