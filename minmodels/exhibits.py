"""What each model has to show after a short training: HTML for the showcase's page, from the folder that `train` left."""

import random
from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import NamedTuple

import torch

from minmodels import UserError, page, speed
from minmodels.generate import generate

LETTERS = 600  # of a sample
SENTENCES = 6  # that minBERT and GPT-1 complete


class Trained(NamedTuple):
    folder: Path  # beside the page
    scores: dict  # of the last evaluation, with step and seconds
    text: str  # the file that was learned, "" for the default


class Shown(NamedTuple):
    about: str
    body: tuple[str, ...]  # HTML; none: it is shown beside another one
    tile: tuple[str, str]  # a figure, what it is


class Exhibit(NamedTuple):
    name: str  # of the model
    title: str
    claim: str
    minutes: float  # of training, where minGPT has one
    options: str
    show: Callable[[Trained], Shown]
    reads_text: bool = False
    bfloat16: bool = True  # where that is fast


def _gpt(run: Trained) -> Shown:
    loss = run.scores["heldout"]
    from_bigram = run.folder.with_name("bigram")
    samples = [page.text("minGPT writes", _sample("gpt", run.folder))]
    try:
        samples.append(page.text("the bigram model, which sees one letter, writes", _sample("bigram", from_bigram)))
    except UserError as error:
        samples.append(page.text("no bigram model beside it", str(error)))
    about = (
        f"The decoder of GPT-2, with {_spent(run)} of training. It reads characters and guesses the next one; on text that it has never "
        f"seen it needs {loss:.2f} nats per character. Below is what it writes, beside a bigram model, which sees the last letter alone."
    )
    body = page.picture("gpt/loss.png", "minGPT's loss over the seconds of training, on what it learns and on held-out text", "44rem")
    return Shown(about, (body, page.side_by_side(*samples)), (f"{loss:.2f}", "minGPT: nats per character"))


def _bigram(run: Trained) -> Shown:
    loss = run.scores["heldout"]
    return Shown("", (), (f"{loss:.2f}", "bigram: nats per character"))


def _adder(run: Trained) -> Shown:
    from minmodels.data import adder
    from minmodels.recipes import load
    from minmodels.recipes.adder import answer

    model, exact, rows = load("adder", str(run.folder))[0], run.scores["exact"], []
    unseen = adder.heldout(2)
    for a, b in unseen[:: len(unseen) // 8][:8].tolist():
        said = int(answer(model, f"{a}+{b}").split("=")[1])
        verdict = page.mark("right", "good") if said == a + b else page.mark(f"wrong, it is {a + b}", "bad")
        rows.append((f"{a} + {b}", page.mark(str(said), "mark"), verdict))
    about = (
        f"The same model learns to add numbers of two digits, {_spent(run)}. Of {len(unseen)} sums that it has never seen, in neither "
        f"order, it writes {exact:.1%} without an error in any digit. Eight of them:"
    )
    return Shown(about, (page.table(("sum", "it says", ""), rows),), (f"{exact:.0%}", "adder: unseen sums right"))


def _transformer(run: Trained) -> Shown:
    from minmodels.data import reverse
    from minmodels.recipes import load
    from minmodels.recipes.transformer import answer

    (model, meta), exact, rows = load("transformer", str(run.folder)), run.scores["exact"], []
    unseen = reverse.heldout(meta["length"])
    for word in unseen[:: len(unseen) // 8][:8]:
        said = answer(model, word, meta["length"])
        verdict = page.mark("right", "good") if said == word[::-1] else page.mark(f"wrong, it is {word[::-1]}", "bad")
        rows.append((word, page.mark(said, "mark"), verdict))
    about = (
        f"The encoder-decoder of 2017 learns to say words of random letters back to front, {_spent(run)}. Of {len(unseen)} words that it "
        f"has never seen it writes {exact:.1%} without an error in any letter. Eight of them:"
    )
    return Shown(about, (page.table(("word", "it says", ""), rows),), (f"{exact:.0%}", "transformer: unseen words right"))


def _gpt1(run: Trained) -> Shown:
    loss, rows = run.scores["heldout"], []
    for begun, word, guesses in _begun(run):
        rows.append(f"<div><p>{escape(begun)} {page.mark('...', 'mark')}</p>{_guesses(guesses, word)}</div>")
    about = (
        f"GPT-1's first stage, {_spent(run)}: the next token, a word or a part of one, of text. On text that it has never seen it needs "
        f"{loss:.2f} nats per token. Unseen sentences, and its three best guesses of how they go on:"
    )
    return Shown(about, (page.side_by_side(*rows),), (f"{loss:.2f}", "GPT-1: nats per token"))


def _minbert(run: Trained) -> Shown:
    from minmodels.understand import fill

    words, base, rows = run.scores["masked-token accuracy"], run.scores["most-frequent-token baseline"], []
    for sentence, word in _masked(run):
        guesses = fill(str(run.folder), sentence, top=3)[1][0]
        asked = escape(sentence).replace("[MASK]", page.mark("[MASK]", "mark"))
        rows.append(f"<div><p>{asked}</p>{_guesses(guesses, word)}</div>")
    about = (
        f"The encoder of BERT, {_spent(run)}: far too few to know the language, and its guesses say so. It names {words:.1%} of the masked "
        f"tokens of unseen text; always naming the most frequent one gets {base:.1%}. Unseen sentences, each with a word or sign masked at "
        "random, and its three best guesses:"
    )
    tile = f"{words:.0%}", "minBERT: masked tokens right"
    return Shown(about, (page.side_by_side(*rows),), tile)


def _unet(run: Trained) -> Shown:
    dice, iou = run.scores["Dice"], run.scores["IoU"]
    about = (
        f"U-Net finds the nuclei in a microscopy image, {_spent(run)} on its left two thirds. On the right third, which it has never seen: "
        f"Dice {dice:.3f}, IoU {iou:.3f}."
    )
    body = page.picture("unet/segmentation.png", "the held-out third: input, truth, prediction, and where the two agree")
    return Shown(about, (body,), (f"{dice:.2f}", "minUNet: Dice"))


def _yolo(run: Trained) -> Shown:
    ap50, ap = run.scores["AP50"], run.scores["AP"]
    about = (
        f"YOLO v1 finds handwritten digits and names them, {_spent(run)}. On 400 scenes of digits that it has never seen: AP {ap50:.3f} at "
        f"IoU 0.5, and {ap:.3f} over 0.50 to 0.95, as COCO counts. White frames are the truth, coloured ones are found."
    )
    pictures = (
        page.picture("yolo/detections.png", "six unseen scenes with the boxes found, and in white the true ones"),
        page.picture("yolo/precision_recall.png", "precision over recall of each digit, at IoU 0.5", "32rem"),
    )
    return Shown(about, pictures, (f"{ap50:.2f}", "minYOLO: AP50"))


# of minBERT and GPT-1, short and narrow: so minBERT takes in its time the 1000 steps after which it knows more than how frequent words are
SMALL = "--block-size 32 --n-layer 2 --n-embd 64 --vocab-size 1000 --lr 0.01 --eval-every 1000000"
WORDS = "--length 8 --eval-every 1000000"
EXHIBITS = (
    Exhibit("gpt", "minGPT", "it writes", 1.0, "", _gpt, reads_text=True),
    Exhibit("bigram", "bigram", "one letter at a time", 0.05, "--eval-every 1000", _bigram, reads_text=True, bfloat16=False),
    Exhibit("adder", "adder", "it adds", 0.35, "--eval-every 300", _adder, bfloat16=False),
    Exhibit("transformer", "transformer", "it reverses", 0.25, WORDS, _transformer, bfloat16=False),
    Exhibit("gpt1", "GPT-1", "it goes on", 0.2, SMALL, _gpt1, reads_text=True),
    Exhibit("minbert", "minBERT", "it fills in", 0.5, SMALL, _minbert, reads_text=True),
    Exhibit("unet", "minUNet", "it segments", 0.25, "--eval-every 25", _unet),
    Exhibit("yolo", "minYOLO", "it detects", 0.65, "--eval-every 250", _yolo),
)


def speed_section(rows: list[speed.Row], sizes: dict[str, tuple] | None) -> str:
    cells = []
    for row in rows:
        *begin, ratio, error, torch_error = row.cells()
        marked = page.mark(ratio, "good" if row.ratio >= 1 else "bad")
        cells.append((*map(escape, begin), marked, escape(error), escape(torch_error)))
    about = (
        "Each fused op, timed in turn with PyTorch's best, or, where PyTorch has no such op, with the same in plain PyTorch, as "
        f"--kernels torch runs it. {speed.where()}."
    )
    return page.section("The ops", about, page.table(speed.HEAD, cells), page.text("what was timed", speed.told(sizes)))


def _sample(model: str, folder: Path) -> str:
    try:
        return generate(str(folder), "The ", LETTERS - 4, model=model, seed=1)
    except UserError:  # a text of one's own may lack a letter of it
        return generate(str(folder), "", LETTERS, model=model, seed=1)


def _spent(run: Trained) -> str:
    return f"{run.scores['seconds']:.0f} seconds and {run.scores['step']} steps"


def _guesses(guesses: list[tuple[str, float]], word: str) -> str:
    bars = (f"{page.mark(guess, 'good') if guess == word else escape(guess)} {p:.0%}{page.bar(p)}" for guess, p in guesses)
    return f'{"".join(bars)}<p class="dim">It was: {escape(word)}</p>'


@torch.no_grad()
def _begun(run: Trained) -> list[tuple[str, str, list[tuple[str, float]]]]:
    """Beginnings of held-out sentences, spread over the text; the token that follows; and the guesses of it."""
    from tokenizers import Tokenizer

    from minmodels.data import documents
    from minmodels.recipes import load

    model, meta = load("gpt1", str(run.folder))
    tokenizer, found, where = Tokenizer.from_str(meta["tokenizer"]), [], next(model.parameters()).device
    sentences = [tokenizer.encode(s).ids for document in documents.load(run.text).heldout for s in document]
    sentences = [ids for ids in sentences if len(ids) > 8]
    for ids in sentences[:: max(1, len(sentences) // SENTENCES)][:SENTENCES]:
        n = min(8 + len(ids) % 8, len(ids) - 1, meta["config"]["n_positions"])
        p, best = model(torch.tensor([ids[:n]], device=where))[0, -1].float().softmax(-1).topk(3)
        guesses = [(tokenizer.decode([i]).strip() or "a blank", q) for i, q in zip(best.tolist(), p.tolist(), strict=True)]
        found.append((tokenizer.decode(ids[:n]), tokenizer.decode([ids[n]]).strip() or "a blank", guesses))
    return found


def _masked(run: Trained) -> list[tuple[str, str]]:
    """Held-out sentences, spread over the text, each with a word or sign drawn at random masked; and what it was."""
    from minmodels import bert_folder
    from minmodels.data import documents

    tokenizer, draw, found = bert_folder.load(str(run.folder))[1], random.Random(0), []
    for sentence in (s for document in documents.load(run.text).heldout for s in document):
        code = tokenizer.encode(sentence, add_special_tokens=False)
        last = [*code.tokens[1:], ""]  # a piece that goes on with "##" would not be whole without it
        whole = [i for i, token in enumerate(code.tokens) if not token.startswith(("##", "[")) and not last[i].startswith("##")]
        if 8 <= len(code.tokens) <= 20 and whole:
            i = draw.choice(whole)
            start, end = code.offsets[i]
            found.append((f"{sentence[:start]}[MASK]{sentence[end:]}", code.tokens[i]))
    return found[:: max(1, len(found) // SENTENCES)][:SENTENCES]
