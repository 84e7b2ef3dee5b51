"""Text as documents of sentences, and tokenizers trained on it: word pieces as BERT has them, byte pairs as GPT-1 has them."""

import hashlib
import json
import re
from dataclasses import dataclass

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from minmodels.data import text as textdata

RULE = re.compile(r"([^\w\s])\1{3,}\+?")  # ****, ----+
SENTENCE = re.compile(r"(?<=[.!?:])\s+(?=[A-Z\"'*(])")


@dataclass(frozen=True)
class Documents:
    """train and heldout: documents, each a list of its sentences, which are one line each."""

    name: str
    train: list[list[str]]
    heldout: list[list[str]]
    sha256: str


def load(path: str) -> Documents:
    """The documents of a file, two empty lines between them, the last tenth held out; "" is the help topics of Python. Raises UserError."""
    parts = [re.split(r"\n{3,}", part) for part in textdata.read(path)[1:]] if path else textdata.split_topics()
    train, heldout = ([sentences for document in part if (sentences := split_sentences(document))] for part in parts)
    name = path or "Python's help topics"
    return Documents(name, train, heldout, hashlib.sha256(json.dumps([train, heldout]).encode()).hexdigest())


def split_sentences(document: str) -> list[str]:
    """Sentences end at a full stop, colon, question or exclamation mark before a capital, and at an empty line; rules are left out."""
    paragraphs = (" ".join(RULE.sub(" ", p).split()) for p in re.split(r"\n\s*\n", document))
    return [sentence for p in paragraphs if p for sentence in SENTENCE.split(p)]


def train_tokenizer(kind: str, documents: list[list[str]], vocab_size: int, special: list[str]) -> Tokenizer:
    """kind "wordpiece" or "bpe". Lower-cases, splits at white space and punctuation; special: the first tokens. The same text gives the
    same tokenizer."""
    sentences = [s for document in documents for s in document]
    normalizer, splitter = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    words = {word for s in sentences for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(s))}
    if kind == "wordpiece":
        model, trainer, decoder = models.WordPiece(unk_token="[UNK]"), trainers.WordPieceTrainer, decoders.WordPiece()
        marked, options = {f"##{c}" for word in words for c in word[1:]}, {}
    else:
        options = {"end_of_word_suffix": "</w>"}
        model, trainer, decoder = models.BPE(unk_token="[UNK]", **options), trainers.BpeTrainer, decoders.BPEDecoder()
        marked = {word[-1] + "</w>" for word in words}
    tokenizer = Tokenizer(model)
    tokenizer.normalizer, tokenizer.pre_tokenizer, tokenizer.decoder = normalizer, splitter, decoder
    # letters with a mark would get their ids in the order of a hash map, other each time, and ties between pairs go by ids
    first = [*special, *sorted(marked)]
    tokenizer.train_from_iterator(sentences, trainer(vocab_size=vocab_size, special_tokens=first, show_progress=False, **options))
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] in special]
    return Tokenizer.from_str(json.dumps(state))


def encode(tokenizer: Tokenizer, documents: list[list[str]]) -> list[list[list[int]]]:
    return [[e.ids for e in tokenizer.encode_batch(document, add_special_tokens=False)] for document in documents]
