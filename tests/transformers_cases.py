"""Small random models of Hugging Face transformers, what they are called with, and what they give exactly."""

import copy
import functools

import pytest
import torch

import minkernels

transformers = pytest.importorskip("transformers")
masking_utils = pytest.importorskip("transformers.masking_utils")
V = 61  # words
SMALL = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, vocab_size=V, pad_token_id=0)
SMALL |= dict(bos_token_id=1, eos_token_id=2, max_position_embeddings=64)
GQA = SMALL | dict(num_key_value_heads=2, head_dim=8)
NO_DROPOUT = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
WHISPER = dict(
    vocab_size=V, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=48,
    decoder_ffn_dim=48, num_mel_bins=8, max_source_positions=16, max_target_positions=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    decoder_start_token_id=1, suppress_tokens=None, begin_suppress_tokens=None, dropout=0.0,
)  # fmt: skip
VIT = SMALL | dict(image_size=16, patch_size=4, num_labels=5)
T5 = dict(d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, vocab_size=V, dropout_rate=0.0, decoder_start_token_id=0)
GPT2 = dict(n_embd=32, n_layer=2, n_head=4, vocab_size=V, n_positions=64, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, pad_token_id=0)
GPT2 |= dict(bos_token_id=1, eos_token_id=2)
MODELS = {  # class, its config
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", GPT2),
    "bert": ("BertForMaskedLM", "BertConfig", SMALL | NO_DROPOUT),
    "llama": ("LlamaForCausalLM", "LlamaConfig", GQA),
    "mistral": ("MistralForCausalLM", "MistralConfig", GQA | dict(sliding_window=4)),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", GQA | dict(sliding_window=4, query_pre_attn_scalar=8, attn_logit_softcapping=0.5)),
    "gpt_oss": ("GptOssForCausalLM", "GptOssConfig", GQA | dict(sliding_window=4, num_local_experts=2, num_experts_per_tok=1)),
    "vit": ("ViTForImageClassification", "ViTConfig", VIT | NO_DROPOUT),
    "t5": ("T5ForConditionalGeneration", "T5Config", T5),
    "whisper": ("WhisperForConditionalGeneration", "WhisperConfig", WHISPER),
}
MOSHI = GQA | dict(sliding_window=4, ffn_dim=48, num_codebooks=2)
GENERATING = {"moshi": ("MoshiForCausalLM", "MoshiConfig", MOSHI)}  # its layers slide where generate() makes the masks, and only there
MODULES = {"bert": transformers.models.bert.modeling_bert, "t5": transformers.models.t5.modeling_t5}
UNROUTED = {name for name, module in MODULES.items() if "ALL_ATTENTION_FUNCTIONS" not in vars(module)}  # older versions
CAUSAL = ["gpt2", "llama", "mistral", "gemma2", "gpt_oss"]
B, T = 2, 11
OLD = transformers.__version__.startswith("4.")


@functools.cache
def _made(name):
    kind, config, options = (MODELS | GENERATING)[name]
    options = options | dict(experts_implementation="eager") if name == "gpt_oss" and not OLD else options  # grouped_mm has no fp64
    torch.manual_seed(1)
    model = getattr(transformers, kind)(getattr(transformers, config)(**options, attn_implementation="eager"))
    with torch.no_grad():
        for p in model.parameters():  # their own are so small that every score is near 0
            p.copy_(torch.randn_like(p) * (0.3 if p.dim() > 1 else 0.1) + (0.5 if p.dim() == 1 else 0.0))
    return model.eval()


def make(name, dtype=torch.float32):
    return copy.deepcopy(_made(name)).to(dtype)


def inputs_of(name, padded, dtype=torch.float32, length=T):
    """(what the model is called with, valid: which of its logits' positions count)."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(3, V, (B, length), generator=generator)
    mask = torch.ones(B, length, dtype=torch.int64)
    if padded:
        mask[0, slice(0, 3) if padded == "left" else slice(length - 3, length)] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, 1:].masked_fill_(mask[:, :-1] == 0, -100)  # not foretold by a row that sees nothing
    if name == "vit":
        images = torch.randn(B, 3, 16, 16, generator=generator)
        return dict(pixel_values=images.to(dtype), labels=torch.tensor([1, 3])), torch.ones(B, dtype=torch.bool)
    given = dict(input_ids=ids * mask, attention_mask=mask, labels=labels)
    if name == "t5":
        return given | dict(labels=labels[:, :7].clamp(min=-100)), torch.ones(B, 7, dtype=torch.bool)
    if name == "whisper":
        sound = torch.randn(B, 8, 32, generator=generator)
        return dict(input_features=sound.to(dtype), decoder_input_ids=ids[:, :7], labels=ids[:, :7]), torch.ones(B, 7, dtype=torch.bool)
    return given, mask.bool()


def run(model, given, valid):
    """Logits at valid positions, and the gradients of the loss, in one vector."""
    out = model(**given)
    model.zero_grad()
    out.loss.backward()
    grads = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return out.logits.detach()[valid], out.loss.detach(), torch.cat(grads)


def eager(name, padded, dtype, **more):
    given, valid = inputs_of(name, padded, dtype)
    return run(make(name, dtype), given | more, valid)


def textbook(module, q, k, v, mask, scaling=None, softcap=None, s_aux=None, position_bias=None, **_):
    """The formula on a whole mask, for fp64: transformers' eager functions take their softmax in fp32, and there give NaN."""
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    s = q @ k.mT * (q.shape[-1] ** -0.5 if scaling is None else scaling)
    s = s if softcap is None else softcap * (s / softcap).tanh()
    s = s if position_bias is None else s + position_bias
    s = s if mask is None else s.masked_fill(~mask, float("-inf"))
    s = s if s_aux is None else torch.cat([s, s_aux[:, None, None].expand(len(s), -1, s.shape[2], 1)], -1)
    return (s.softmax(-1).nan_to_num()[..., : k.shape[2]] @ v).transpose(1, 2).contiguous(), None


def exactly(name, padded, **more):
    given, valid = inputs_of(name, padded, torch.float64)
    model = make(name, torch.float64)
    transformers.AttentionInterface.register("textbook", textbook)
    no_skips = dict(allow_is_causal_skip=False, allow_is_bidirectional_skip=False)
    whole = lambda *args, **options: masking_utils.sdpa_mask(*args, **options | no_skips)  # noqa: E731
    transformers.AttentionMaskInterface.register("textbook", whole)
    if name not in UNROUTED:
        model.set_attn_implementation("textbook")
    try:
        return run(model, given | more, valid)
    finally:
        for interface in (transformers.AttentionInterface, transformers.AttentionMaskInterface):
            del interface._global_mapping["textbook"]


def swapped(name, dtype=torch.float32, **options):
    model = make(name, dtype)
    minkernels.swap(model, **options)
    return model
