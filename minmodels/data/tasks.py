"""What a pretrained language model is fine-tuned on: tasks made from the documents it learned to read, or examples from a file.

Every task made here has as many examples of each class as of the others, and learns from other documents than it is judged on:
    whole: is a passage one text, or does its second half come from another document? Each half, first and second, is there once in
        each way, so that no word gives the answer away: it is in what the halves have to do with each other.
    topic: are two sentences from the same document? Each sentence is there both ways, with another one as its partner.
    next: which of four sentences follows this one? All four are from the same document.
"""

import hashlib
import json
import random
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise

from minmodels import UserError
from minmodels.data import documents as documentsdata
from minmodels.data import text as textdata

KINDS = "classification", "entailment", "similarity", "choice"  # of the texts of an example: one; two; two in no order; one and its answers
MADE = {  # kind and classes
    "whole": ("classification", ["one text", "two texts"]),
    "topic": ("similarity", ["same topic", "other topic"]),
    "next": ("choice", []),
}


@dataclass(frozen=True)
class Example:
    label: int
    texts: tuple[str, ...]


@dataclass(frozen=True)
class Task:
    name: str
    kind: str
    classes: list[str]
    train: list[Example]
    heldout: list[Example]

    @property
    def sha256(self) -> str:
        rows = [[(e.label, e.texts) for e in part] for part in (self.train, self.heldout)]
        return hashlib.sha256(json.dumps([self.kind, self.classes, rows]).encode()).hexdigest()


def load(name: str, path: str, text: str) -> Task:
    """The task of that name, made from the documents of a text, or if a path is given from the lines there. Raises UserError."""
    if path:
        if name not in KINDS:
            raise UserError(f"--task {name}: for a file of examples it is one of {', '.join(KINDS)}")
        return _read(name, path)
    if name not in MADE:
        raise UserError(f"--task {name}: it needs --examples FILE; those without are {', '.join(MADE)}")
    make = {"whole": _whole, "topic": _topic, "next": _next}[name]
    documents = documentsdata.load(text)
    seen = {sentence for document in documents.train for sentence in document}
    parts = make(documents.train, set(), random.Random(0)), make(documents.heldout, seen, random.Random(1))
    if not all(parts):
        counts = f"{len(documents.train)} to learn from and {len(documents.heldout)} held out"
        raise UserError(f"{documents.name} is too short for the task {name!r}: of documents, which two empty lines part, it has {counts}")
    return Task(f"{name}, of {documents.name}", *MADE[name], *parts)


def _sentences(document, seen):
    """Those of 6 to 30 words that were not seen, each once."""
    return [s for s in dict.fromkeys(document) if 6 <= len(s.split()) <= 30 and s not in seen]


def _whole(documents, seen, rng):
    """Halves of 15 to 30 words, at every place where a sentence ends."""
    groups = []
    for document in documents:
        halves = []
        for i in range(1, len(document)):
            before, after = " ".join(document[max(0, i - 30) : i]).split()[-30:], " ".join(document[i : i + 30]).split()[:30]
            if min(len(before), len(after)) >= 15:
                halves.append((" ".join(before), " ".join(after)))
        rng.shuffle(halves)
        groups.append(halves)
    groups.sort(key=len)
    groups[-1:] = [halves[: sum(map(len, groups[:-1]))] for halves in groups[-1:]]  # no document has more than half of them:
    places, far = [place for halves in groups for place in halves], max(map(len, groups), default=0)  # so far on is another document's
    examples = []
    for (before, after), (_, other) in zip(places, places[far:] + places[:far], strict=True):
        examples += Example(0, (f"{before} {after}",)), Example(1, (f"{before} {other}",))
    return examples


def _topic(documents, seen, rng):
    pools = [pool for document in documents if len(pool := _sentences(document, seen)) > 1]
    examples = []
    for pool in pools if len(pools) > 1 else ():
        own = set(pool)
        others = [s for other in pools if other is not pool for s in other if s not in own]
        for sentence in pool if others else ():  # none: documents that are there twice
            examples.append(Example(0, (sentence, rng.choice([s for s in pool if s != sentence]))))
            examples.append(Example(1, (sentence, rng.choice(others))))
    return examples


def _next(documents, seen, rng):
    examples = []
    for document in documents:
        pool = _sentences(document, seen)
        for sentence, following in pairwise(document):
            wrong = [s for s in pool if s not in (sentence, following)]
            if sentence in pool and following in pool and len(wrong) >= 3:
                answers = rng.sample(wrong, 3)
                label = rng.randrange(4)
                examples.append(Example(label, (sentence, *answers[:label], following, *answers[label:])))
    return examples


def _read(kind, path):
    """A line an example, split at tabs: its class and its text or texts; of "choice" the number of the right answer from 0 on, the context
    and the answers. The last tenth of each class is held out."""
    rows = enumerate("".join(textdata.read(path)[1:]).split("\n"), 1)  # splitlines() knows other ends of lines, too
    rows = {number: line.split("\t") for number, line in rows if line.strip()}
    lines = list(rows.values())
    width = {"classification": 2, "choice": max(4, len(lines[0]))}.get(kind, 3)
    for number, fields in rows.items():
        if len(fields) != width or not all(f.strip() for f in fields):
            raise UserError(f"{path}, line {number}: {kind} has {width} fields, split at tabs, got {len(fields)}, or an empty one")
        if kind == "choice" and not (fields[0].isdecimal() and int(fields[0]) < width - 2):
            raise UserError(f"{path}, line {number}: the right answer is one of 0 to {width - 3}, got {fields[0]!r}")
    classes = [] if kind == "choice" else sorted({fields[0] for fields in lines})
    if len(classes) == 1:
        raise UserError(f"{path} has one class, {classes[0]!r}: there is nothing to tell apart")
    if len(lines) < 10:
        raise UserError(f"{path} is too short: a tenth is held out, and it has {len(lines)} examples")
    examples = [Example(int(f[0]) if kind == "choice" else classes.index(f[0]), tuple(f[1:])) for f in lines]
    return Task(path, kind, classes, *_split(examples))


def _split(examples):
    """To learn, and the tenth that comes last if one counts in each class from its first to its last: a file may be sorted by class."""
    sizes, seen, places = Counter(e.label for e in examples), Counter(), []
    for e in examples:
        places.append(seen[e.label] / sizes[e.label])
        seen[e.label] += 1
    heldout = set(sorted(range(len(examples)), key=places.__getitem__)[-(len(examples) // 10) :])
    return [[e for i, e in enumerate(examples) if (i in heldout) == part] for part in (False, True)]
