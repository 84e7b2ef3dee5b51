"""minBERT learns masked words and next sentences, then a task on one text or on two."""

from pathlib import Path
from shlex import quote

import torch
from torch import Tensor

from minmodels import UserError
from minmodels.data import documents as documentsdata
from minmodels.data import pairs as pairsdata
from minmodels.kernels import linear_token_logprobs, token_logprobs
from minmodels.minbert import BERT, BERTClassifier, BERTConfig, Encoder, pick
from minmodels.options import BERTOptions
from minmodels.recipes import Recipe, seeded
from minmodels.recipes.task import TaskRecipe

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]  # minmodels.data.pairs has their ids


class BERTRecipe(Recipe):
    unit, loss_unit, inner = "tokens", "nats", ("bert.encoder.", "bert.pooler.")

    def __init__(self, options: BERTOptions):
        super().__init__(options)
        documents, T = documentsdata.load(options.text), options.block_size
        self.tokenizer = documentsdata.train_tokenizer("wordpiece", documents.train, options.vocab_size, SPECIAL)
        parts = (documentsdata.encode(self.tokenizer, part) for part in (documents.train, documents.heldout))
        self.train, self.held = (pairsdata.Corpus.of(part) for part in parts)
        if not (len(self.train.cuts) and len(self.held.cuts)):
            raise UserError(f"{documents.name} is too short: a document must have a sentence that follows another, in both parts")
        C = options.n_embd
        if C % options.n_head:
            raise UserError(f"n_embd must be a multiple of n_head, got {C} and {options.n_head}")
        self.config = BERTConfig(self.tokenizer.get_vocab_size(), C, options.n_layer, options.n_head, 4 * C, T)
        self.units, self.sha256, self.model = T, documents.sha256, self.new()
        sizes = f"{len(self.train.ids):,} tokens, {len(self.held.ids):,} held out"
        self.data = f"{documents.name}: {sizes}, {self.config.vocab_size:,} word pieces"

    @seeded
    def new(self):
        return _acquainted(BERT(self.config))

    def batch(self, generator):
        B = self.options.batch_size
        at = torch.randint(len(self.train.cuts), (B,), generator=generator)
        return self._examples(self.train, at, torch.randint(2, (B,), generator=generator), generator)

    def loss(self, model, ids, segments, used, positions, labels, other):
        return model(ids, segments, _key_mask(ids, used), positions, labels, other)

    def heldout(self, model, move):
        """Held-out sentences, each once with what follows it and once with something else; at most 1024 examples."""
        at = torch.linspace(0, len(self.held.cuts) - 1, min(512, len(self.held.cuts))).long().repeat(2)
        other = torch.arange(2).repeat_interleave(len(at) // 2)
        examples = self._examples(self.held, at, other, torch.Generator().manual_seed(1), short=0.0)
        usual = self.train.ids.bincount().argmax().item()  # the best guess for who sees no context
        nats, right, of = torch.zeros(3, 2, dtype=torch.float64)  # of the words, of the next sentences
        baseline = 0
        for ids, segments, used, positions, labels, other in zip(*(map(move, t.split(64)) for t in examples), strict=True):
            x = model.hidden(ids, segments, _key_mask(ids, used))
            features, weight, bias = model.words(pick(x, positions))
            words = linear_token_logprobs(features, weight, labels, linear_bias=bias, ignore_index=-1)
            following = token_logprobs(model.following(x), other)
            for i, (guess, wanted) in enumerate(((words, labels), (following, other))):
                nats[i] -= guess.logprob[wanted >= 0].sum().item()
                right[i] += ((guess.argmax == wanted) & (wanted >= 0)).sum().item()
                of[i] += (wanted >= 0).sum().item()
            baseline += (labels == usual).sum().item()
        (words, following), shares = (nats / of).tolist(), (right / of).tolist()
        return {
            "heldout": words + following,
            "masked-token accuracy": shares[0],
            "most-frequent-token baseline": baseline / of[0].item(),
            "next-sentence accuracy": shares[1],
        }

    def extras(self):
        return {"tokenizer": self.tokenizer.to_str()}

    def finish(self, model, folder: Path):
        return f'to fill in: python -m minmodels fill minbert --checkpoint {quote(str(folder))} "The [MASK] statement returns a value."'

    @classmethod
    def build(cls, meta):
        return BERT(BERTConfig(**meta["config"]))

    def _examples(self, corpus, at, other, generator, **options):
        ids, segments, used = pairsdata.pairs(corpus, at, other, self.options.block_size, generator, **options)
        ids, positions, labels = pairsdata.mask(ids, self.config.vocab_size, generator)
        return ids, segments, used, positions, labels, other


class BERTTaskRecipe(TaskRecipe):
    family, inner, limit = "minbert", ("bert.encoder.", "bert.pooler."), "max_position_embeddings"
    kinds, kind_of_config = ("classification", "entailment", "similarity"), BERTConfig  # one text, or two

    def pretrained(self, checkpoint):
        from minmodels import bert_folder  # which loads checkpoints of this recipe

        model, tokenizer, text = bert_folder.load(checkpoint)
        return model.config, tokenizer, text, model.state_dict()

    @seeded
    def new(self):
        return _acquainted(self.network(vars(self.config), self._about()))

    @staticmethod
    def inputs(tokenizer, kind, texts):
        cls, sep = map(tokenizer.token_to_id, ("[CLS]", "[SEP]"))
        first, *second = texts
        ids, segments = [cls, *first, sep], [0] * (len(first) + 2)
        for text in second:
            ids, segments = [*ids, *text, sep], [*segments, *[1] * (len(text) + 1)]
        return [(ids, segments)]

    @staticmethod
    def logits(model, ids, segments, lengths):
        return model(ids[:, 0], segments[:, 0], _key_mask(ids[:, 0], lengths[:, 0]))

    def loss(self, model, ids, segments, lengths, labels, seed):
        return model(ids[:, 0], segments[:, 0], _key_mask(ids[:, 0], lengths[:, 0]), labels)

    @classmethod
    def network(cls, config, task):
        return BERTClassifier(BERTConfig(**config), len(task["classes"]))


def _acquainted(model: Encoder) -> Encoder:
    """Equal words see each other in the first layer from the start: there keys are queries (after Trockman and Kolter 2023), and words
    weigh more than places. Whether two texts share words is what tells a next sentence, and in a few minutes training does not come
    upon it: docs/models.md has the figures."""
    tables, first = model.bert.embeddings, model.bert.encoder.layer[0].attention["self"]
    for table, std in ((tables.word_embeddings, 0.1), (tables.token_type_embeddings, 0.05), (tables.position_embeddings, 0.01)):
        torch.nn.init.normal_(table.weight, std=std)
    torch.nn.init.normal_(first.query.weight, std=1.36 * model.config.hidden_size**-0.5)
    with torch.no_grad():
        first.key.weight.copy_(first.query.weight)
    return model


def _key_mask(ids: Tensor, lengths: Tensor) -> Tensor:
    return torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]
