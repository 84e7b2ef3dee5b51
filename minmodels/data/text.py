"""Text, one character a token: UTF-8 files, or the help topics that come with Python."""

import hashlib
import random
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from minmodels import UserError

MOST = 2**16  # held-out tokens that are judged: of a long text, evaluations would take as long as the training


@dataclass(frozen=True)
class Text:
    """train and heldout: 1-D int32 ids; the id of a character is its place in vocab, which holds those of both, sorted. Where the
    tokens are no characters, vocab is empty."""

    name: str
    vocab: str
    train: Tensor
    heldout: Tensor
    sha256: str  # of train and heldout


def load(path: str, block_size: int) -> Text:
    """The text of a file, its last tenth held out; "" is the help topics, whole topics held out. Raises UserError."""
    name, train, heldout = read(path)
    check_length(name, train, heldout, block_size, "characters")
    ids = torch.frombuffer(bytearray((train + heldout).encode("utf-32-le")), dtype=torch.int32)
    codes, ids = ids.unique(return_inverse=True)
    train_ids, heldout_ids = ids.int().split([len(train), len(heldout)])
    digest = hashlib.sha256(f"{len(train)} {train}{heldout}".encode()).hexdigest()
    return Text(name, "".join(map(chr, codes.tolist())), train_ids, heldout_ids, digest)


def check_length(name: str, train, heldout, block_size: int, unit: str):
    if min(len(train), len(heldout)) <= block_size:
        sizes = f"it has {len(train) + len(heldout)}, of which {len(heldout)} are held out"
        raise UserError(f"{name} is too short for a context of {block_size} {unit}: {sizes}, and both parts must be longer")


def read(path: str) -> tuple[str, str, str]:
    """What the text is called, what is to be learned, what is held out. Raises UserError."""
    return (path, *_split_file(path)) if path else ("Python's help topics", *_split_topics())


def encode(text: str, vocab: str) -> Tensor:
    """(len(text),) ids."""
    unknown = sorted(set(text) - set(vocab))
    if unknown:
        raise UserError(f"characters that the model has never seen: {' '.join(map(repr, unknown))}")
    return torch.tensor([vocab.index(c) for c in text], dtype=torch.int64)


def decode(ids: Tensor, vocab: str) -> str:
    return "".join(vocab[i] for i in ids.tolist())


def sample(ids: Tensor, batch: int, block_size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random windows of a text: ids and, one character later, targets, both (batch, block_size)."""
    starts = torch.randint(len(ids) - block_size, (batch, 1), generator=generator)
    windows = ids[starts + torch.arange(block_size + 1)].long()
    return windows[:, :-1], windows[:, 1:]


def sweep(ids: Tensor, block_size: int, most: int = MOST) -> tuple[Tensor, Tensor]:
    """Windows of a text that overlap by half: ids and targets, both (windows, block_size). Targets are -1 in the overlap: each counts
    once, and but for the first window is predicted from at least half a window before it. Of more than `most` targets the windows
    are evenly spread."""
    stride, last = (block_size + 1) // 2, len(ids) - block_size - 1
    starts = torch.arange(0, last + stride, stride).clamp(max=last)  # the last window ends with the text
    new = starts.diff(prepend=starts[:1] - block_size)[:, None]
    picked = torch.linspace(0, len(starts) - 1, min(-(-most // stride), len(starts))).long()
    windows, place = ids[starts[picked, None] + torch.arange(block_size + 1)].long(), torch.arange(block_size)
    return windows[:, :-1], windows[:, 1:].masked_fill(place < block_size - new[picked], -1)


def told(heldout: Tensor) -> str:
    """How much of a held-out text there is for sweep()."""
    return f"{len(heldout):,} held out" + (f", {MOST:,} of them judged" if len(heldout) > MOST else "")


def mean_loss(windows: tuple[Tensor, Tensor], loss: Callable[[Tensor, Tensor], Tensor]) -> float:
    """Over the targets that count, of a loss(ids, targets) that is a mean over them itself."""
    parts = [t.split(64) for t in windows]
    counts = [int((targets >= 0).sum()) for targets in parts[1]]
    return sum(loss(*part).item() * n for *part, n in zip(*parts, counts, strict=True)) / sum(counts)


def _split_file(path: str) -> tuple[str, str]:
    try:
        raw = Path(path).read_bytes()
        text = raw.decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: byte 0x{raw[error.start]:02x} at offset {error.start}") from error
    if "\0" in text:
        raise UserError(f"{path} is binary, not text: a NUL byte at offset {raw.index(0)}")
    if not text.strip():
        raise UserError(f"{path} is empty" if not text else f"{path} holds nothing but white space")
    text = re.sub("\r\n?", "\n", text)
    cut = len(text) - len(text) // 10
    return text[:cut], text[cut:]


def _split_topics() -> tuple[str, str]:
    return tuple("\n\n\n".join(part) for part in split_topics())


def split_topics() -> tuple[list[str], list[str]]:
    """Python's help topics, whole: to learn, and held out. About a tenth of their text is held out, from the topics that share no paragraph
    with another: some topics repeat others whole, and a held-out text that training has seen would measure memory."""
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise UserError("this Python comes without its help topics (pydoc_data): give a text of your own") from error
    paragraphs = {name: {p.strip() for p in topics[name].split("\n\n") if len(p) > 60} for name in sorted(topics)}
    count = Counter(p for ps in paragraphs.values() for p in ps)
    own = [name for name, ps in paragraphs.items() if all(count[p] == 1 for p in ps)]
    random.Random(0).shuffle(own)
    room, heldout = sum(map(len, topics.values())) // 10, []
    for name in own:
        if len(topics[name]) <= room:
            room -= len(topics[name])
            heldout.append(name)
    return tuple([topics[n] for n in paragraphs if (n in heldout) == part] for part in (False, True))
