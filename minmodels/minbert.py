"""minBERT: the bidirectional encoder of BERT (Devlin et al. 2018, arXiv:1810.04805). Parameter names are Hugging Face's.

Shapes: B batch, T tokens, C hidden, H heads, D head dim (C = H D), V vocabulary, P masked tokens of a sequence.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minmodels.kernels import attention, cross_entropy, linear_cross_entropy


@dataclass(frozen=True)
class BERTConfig:
    """The names are those of config.json in a Hugging Face folder, the defaults are BERT base, 110 M parameters."""

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    max_position_embeddings: int = 512  # the longest sequence, in tokens
    type_vocab_size: int = 2  # segments: 0 is [CLS] A [SEP], 1 is B [SEP]
    layer_norm_eps: float = 1e-12

    def __post_init__(self):
        for name, value in vars(self).items():
            if name != "layer_norm_eps" and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"{name} must be a positive int, got {value!r}")
        if self.hidden_size % self.num_attention_heads:
            both = f"{self.hidden_size} and {self.num_attention_heads}"
            raise ValueError(f"hidden_size must be a multiple of num_attention_heads, got {both}")


class Layer(nn.Module):
    def __init__(self, config: BERTConfig):
        super().__init__()
        C, F, eps, self.heads = config.hidden_size, config.intermediate_size, config.layer_norm_eps, config.num_attention_heads
        self.attention = nn.ModuleDict({
            "self": nn.ModuleDict({name: nn.Linear(C, C) for name in ("query", "key", "value")}),
            "output": nn.ModuleDict({"dense": nn.Linear(C, C), "LayerNorm": nn.LayerNorm(C, eps)}),
        })
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(C, F)})
        self.output = nn.ModuleDict({"dense": nn.Linear(F, C), "LayerNorm": nn.LayerNorm(C, eps)})

    def forward(self, x: Tensor, key_mask: Tensor | None) -> Tensor:  # (B, T, C) -> (B, T, C)
        q, k, v = (linear(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for linear in self.attention["self"].values())  # (B, H, T, D)
        seen = attention(q, k, v, key_mask=key_mask).transpose(1, 2).flatten(2)
        x = self.attention.output.LayerNorm(x + self.attention.output.dense(seen))
        return self.output.LayerNorm(x + self.output.dense(F.gelu(self.intermediate.dense(x))))


class Encoder(nn.Module):
    """What pretraining and tasks share."""

    def __init__(self, config: BERTConfig):
        super().__init__()
        self.config, C, eps = config, config.hidden_size, config.layer_norm_eps
        self.bert = nn.ModuleDict({
            "embeddings": nn.ModuleDict({
                "word_embeddings": nn.Embedding(config.vocab_size, C),
                "position_embeddings": nn.Embedding(config.max_position_embeddings, C),
                "token_type_embeddings": nn.Embedding(config.type_vocab_size, C),
                "LayerNorm": nn.LayerNorm(C, eps),
            }),
            "encoder": nn.ModuleDict({"layer": nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))}),
            "pooler": nn.ModuleDict({"dense": nn.Linear(C, C)}),
        })

    def start(self):
        """The initial weights: N(0, 0.02), appendix A.2."""
        for name, p in self.named_parameters():
            if p.dim() == 2:
                nn.init.normal_(p, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def hidden(self, ids: Tensor, segments: Tensor | None = None, key_mask: Tensor | None = None) -> Tensor:
        """(B, T) ids -> (B, T, C). segments (B, T): 0 or 1, default 0. key_mask (B, T) bool: False where there is padding."""
        T, tables = ids.shape[1], self.bert.embeddings
        if T > self.config.max_position_embeddings:
            raise ValueError(f"{T} tokens are more than the max_position_embeddings of {self.config.max_position_embeddings}")
        segments = torch.zeros_like(ids) if segments is None else segments
        x = tables.word_embeddings(ids) + tables.position_embeddings.weight[:T] + tables.token_type_embeddings(segments)
        x = tables.LayerNorm(x)
        for layer in self.bert.encoder.layer:
            x = layer(x, key_mask)
        return x

    def pooled(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, C), of [CLS]."""
        return torch.tanh(self.bert.pooler.dense(x[:, 0]))


class BERT(Encoder):
    """With the two heads of pretraining."""

    def __init__(self, config: BERTConfig):
        super().__init__(config)
        C = config.hidden_size
        transform = nn.ModuleDict({"dense": nn.Linear(C, C), "LayerNorm": nn.LayerNorm(C, config.layer_norm_eps)})
        self.cls = nn.ModuleDict({"predictions": nn.ModuleDict({"transform": transform}), "seq_relationship": nn.Linear(C, 2)})
        self.cls.predictions.bias = nn.Parameter(torch.zeros(config.vocab_size))
        self.start()

    def words(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(..., C) -> (features, weight, bias), whose F.linear is the logits (..., V); the weight is that of the word embeddings."""
        head = self.cls.predictions
        features = head.transform.LayerNorm(F.gelu(head.transform.dense(x)))
        return features, self.bert.embeddings.word_embeddings.weight, head.bias

    def following(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, 2) logits: B follows A, B does not."""
        return self.cls.seq_relationship(self.pooled(x))

    def forward(self, ids: Tensor, segments: Tensor, key_mask: Tensor, positions: Tensor, labels: Tensor, other: Tensor) -> Tensor:
        """The loss of pretraining, in nats: masked tokens plus next sentence, each a mean.

        positions (B, P): of the tokens to guess; labels (B, P): what they were, -1 where there is nothing to guess;
        other (B,): 0 where B follows A, 1 where it does not.
        """
        x = self.hidden(ids, segments, key_mask)
        features, weight, bias = self.words(pick(x, positions))  # no logits of the other tokens
        masked = linear_cross_entropy(features, weight, labels, linear_bias=bias, ignore_index=-1)
        return masked + cross_entropy(self.following(x), other)


class BERTClassifier(Encoder):
    """With one linear layer on [CLS]."""

    def __init__(self, config: BERTConfig, classes: int):
        super().__init__(config)
        self.classifier = nn.Linear(config.hidden_size, classes)
        self.start()

    def forward(self, ids: Tensor, segments: Tensor, key_mask: Tensor, labels: Tensor | None = None) -> Tensor:
        """(B, T) -> (B, classes) logits; with labels (B,), the loss in nats."""
        logits = self.classifier(self.pooled(self.hidden(ids, segments, key_mask)))
        return logits if labels is None else cross_entropy(logits, labels)


def pick(x: Tensor, positions: Tensor) -> Tensor:
    """(B, T, C) and (B, P) -> (B, P, C)."""
    return x.gather(1, positions[..., None].expand(-1, -1, x.shape[-1]))
