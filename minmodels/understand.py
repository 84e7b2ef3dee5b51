"""What a trained encoder or classifier says about a text."""

import torch
from tokenizers import Tokenizer

from minmodels import UserError, bert_folder
from minmodels.options import FINETUNED
from minmodels.recipes import load, recipe

NO_WORDS = None, "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"  # None: what a model has beyond its tokenizer, to fill up a multiple


@torch.no_grad()
def fill(checkpoint: str, text: str, *, top: int = 5, device: str = "") -> tuple[str, list[list[tuple[str, float]]]]:
    """The text with each [MASK] replaced by the likeliest word, and of each the `top` likeliest words with their probabilities.

    checkpoint: a training of minbert, or a local Hugging Face folder of a BERT that was trained on masked words.
    """
    model, tokenizer, _ = bert_folder.load(checkpoint, device)
    if getattr(model, "fresh_words", False):
        raise UserError(f"{checkpoint} has no head for masked words")
    mask, cls, sep = map(tokenizer.token_to_id, ("[MASK]", "[CLS]", "[SEP]"))
    encoding = tokenizer.encode(text, add_special_tokens=False)
    ids = [cls, *encoding.ids, sep]
    places = [i for i, token in enumerate(ids) if token == mask]
    if not places:
        raise UserError(f"there is no [MASK] in {text!r}")
    if len(ids) > model.config.max_position_embeddings:
        raise UserError(f"the text has {len(ids)} tokens with the special ones, and the model takes {model.config.max_position_embeddings}")
    x = model.hidden(torch.tensor([ids], device=next(model.parameters()).device))[0, places]
    features, weight, bias = model.words(x)
    logits = torch.nn.functional.linear(features, weight, bias).float()
    never = [i for i in range(logits.shape[1]) if tokenizer.id_to_token(i) in NO_WORDS]
    logits[:, never] = -torch.inf
    p, found = logits.softmax(-1).topk(min(top, logits.shape[1] - len(never)))
    words = [[(tokenizer.id_to_token(i), q) for i, q in zip(*pair, strict=True)] for pair in zip(found.tolist(), p.tolist(), strict=True)]
    filled, end = "", 0
    for place, [(word, _), *_] in zip(places, words, strict=True):
        start, stop = encoding.offsets[place - 1]  # of the text as it was given: the tokens know no capitals
        filled += text[end:start]
        filled, end = (filled.rstrip() if word.startswith("##") else filled) + word.removeprefix("##"), stop
    return filled + text[end:], words


@torch.no_grad()
def classify(model: str, checkpoint: str, texts: tuple[str, ...], *, device: str = "") -> list[tuple[str, float]]:
    """The classes of a fine-tuned model for a text, or for the texts of a pair, with their probabilities, the likeliest first."""
    name = FINETUNED[model]
    network, meta = load(name, checkpoint, device)
    task, kind = meta["task"], recipe(name)
    if len(texts) != task["texts"]:
        raise UserError(f"{checkpoint} was fine-tuned on examples of {task['texts']} texts, got {len(texts)}")
    sequences = kind.prepare(meta, Tokenizer.from_str(meta["tokenizer"]), texts)
    where = next(network.parameters()).device
    logits = kind.logits(network, *(t.to(where) for t in kind.collate([sequences], meta["config"][kind.limit])))[0]
    classes = task["classes"] or texts[1:]
    return sorted(zip(classes, logits.float().softmax(-1).tolist(), strict=True), key=lambda pair: -pair[1])
