"""swap on Hugging Face transformers: small random models, judged against their own eager attention in fp64."""

import copy
import functools
import gc
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn

import minkernels
from judge import assert_close
from minkernels.swap import _hf_attention, _hf_losses, functional
from minkernels.swap import transformers as adapter

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
MODULES = {"bert": transformers.models.bert.modeling_bert, "t5": transformers.models.t5.modeling_t5}
UNROUTED = {name for name, module in MODULES.items() if "ALL_ATTENTION_FUNCTIONS" not in vars(module)}  # older versions
CAUSAL = ["gpt2", "llama", "mistral", "gemma2", "gpt_oss"]
B, T = 2, 11
OLD = transformers.__version__.startswith("4.")


@functools.cache
def _made(name):
    kind, config, options = MODELS[name]
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


@pytest.mark.parametrize("padded", [None, "left", "right"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_outputs_and_gradients(library, name, dtype, padded):
    if padded and name in ("vit", "whisper"):
        pytest.skip("has no padding")
    model = make(name, dtype)
    report = minkernels.swap(model)
    attended = [what for _, what, by in report.replaced if by == "attention"]
    assert bool(attended) == (name not in UNROUTED)
    given, valid = inputs_of(name, padded, dtype)
    actual = run(model, given, valid)
    plain, exact = eager(name, padded, dtype), exactly(name, padded)
    for what, *three in zip(("logits", "loss", "gradients"), actual, plain, exact, strict=True):
        assert_close(*three, dtype, what)


def swapped(name, dtype=torch.float32, **options):
    model = make(name, dtype)
    minkernels.swap(model, **options)
    return model


@pytest.mark.parametrize("name", [*CAUSAL, "whisper", "t5"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generate(library, name, cache):
    """Token for token, past the window of 4, the first row padded on the left."""
    given, _ = inputs_of(name, "left" if name in CAUSAL else None)
    given = {k: x for k, x in given.items() if k in ("input_ids", "attention_mask", "input_features")}
    made = [
        model.generate(**given, max_new_tokens=9, min_new_tokens=9, do_sample=False, cache_implementation=cache)
        for model in (make(name), swapped(name))
    ]
    assert made[0].shape[1] >= 9 and torch.equal(*made)


@pytest.mark.parametrize("name", ["gpt2", "mistral", "gemma2"])
def test_one_train_step(library, name):
    given, _ = inputs_of(name, "right")
    trained = []
    for model in (swapped(name), make(name), make(name, torch.float64)):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        model.train()(**given).loss.backward()
        optimizer.step()
        trained.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert_close(*trained, torch.float32)


@pytest.mark.parametrize("name", CAUSAL)
def test_cached_continuation(library, name):
    """Several queries after a cache: the diagonal ends at the last key; and the window reaches back into the cache."""
    given, _ = inputs_of(name, None)
    ids = given["input_ids"]
    model, logits = swapped(name), []
    past = None
    for part in ids.split([5, 3, 1, 2], 1):
        out = model(input_ids=part, past_key_values=past, use_cache=True)
        past = out.past_key_values
        logits.append(out.logits)
    assert_close(torch.cat(logits, 1), make(name)(input_ids=ids).logits, exactly(name, None)[0].view(B, T, V), torch.float32)


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_packed_sequences(library, name):
    """Positions that start anew: no token sees the sequence before."""
    ids = inputs_of(name, None)[0]["input_ids"][:1]
    model = swapped(name)
    positions = torch.cat([torch.arange(4), torch.arange(T - 4)])[None]
    packed = model(input_ids=ids, position_ids=positions, use_cache=False).logits
    alone = torch.cat([model(input_ids=part).logits for part in (ids[:, :4], ids[:, 4:])], 1)
    torch.testing.assert_close(packed, alone)
    assert not torch.allclose(packed, model(input_ids=ids).logits)


@pytest.mark.parametrize("kind", [torch.bool, torch.float32], ids=str)
def test_whole_masks_of_the_user(library, kind):
    ids = inputs_of("llama", None)[0]["input_ids"]
    seen = torch.rand(B, 1, T, T) < 0.5
    seen |= torch.eye(T, dtype=torch.bool)
    mask = seen if kind == torch.bool else torch.randn(B, 1, T, T).masked_fill(~seen, torch.finfo(kind).min)
    theirs = mask.float().masked_fill(~seen, torch.finfo(torch.float32).min).masked_fill(seen, 0.0) if kind == torch.bool else mask
    ours, plain = swapped("llama")(input_ids=ids, attention_mask=mask).logits, make("llama")(input_ids=ids, attention_mask=theirs).logits
    torch.testing.assert_close(ours, plain)


def test_bidirectional_use_of_a_causal_model(library):
    if "is_causal" not in transformers.masking_utils.create_causal_mask.__code__.co_consts:
        pytest.skip("newer versions take it from the config")
    given, _ = inputs_of("llama", None)
    models = make("llama"), swapped("llama")
    for model in models:
        model.config.is_causal = False
    plain, ours = (model(input_ids=given["input_ids"]).logits for model in models)
    torch.testing.assert_close(ours, plain)
    assert not torch.allclose(ours, make("llama")(input_ids=given["input_ids"]).logits)


def test_dropout(library):
    model = make("llama").train()
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    minkernels.swap(model)
    ids = inputs_of("llama", None)[0]["input_ids"]
    torch.manual_seed(3)
    first = model(input_ids=ids).logits
    assert not torch.allclose(first, model(input_ids=ids).logits)
    torch.manual_seed(3)
    assert torch.equal(first, model(input_ids=ids).logits)
    q = torch.randn(1, 4, 2000, 8)
    kept = _hf_attention.attend(model.model.layers[0].self_attn, q, q, torch.ones_like(q), None, dropout=0.25)[0]
    assert kept.mean().item() == pytest.approx(1.0, abs=0.01) and kept.std() > 0.003


def test_autocast(library):
    """Under it rotated q and k are bf16 or fp32 and v is bf16, as each version has it."""
    given, valid = inputs_of("llama", None)
    with torch.autocast("cpu", torch.bfloat16):
        actual, plain = run(swapped("llama"), given, valid), run(make("llama"), given, valid)
    for three in zip(actual, plain, exactly("llama", None), strict=True):
        assert_close(*three, torch.bfloat16)


def test_what_we_lack_takes_their_road(library):
    given, _ = inputs_of("mistral", "left")
    given = {k: x for k, x in given.items() if k != "labels"}
    ours, theirs = (model(**given, output_attentions=True) for model in (swapped("mistral"), make("mistral")))
    torch.testing.assert_close(ours.logits[1], theirs.logits[1])
    assert len(ours.attentions) == 2
    for mine, their in zip(ours.attentions, theirs.attentions, strict=True):
        torch.testing.assert_close(mine[1], their[1])


def calls_of_library(monkeypatch):
    calls = []
    own = _hf_attention._library
    monkeypatch.setattr(_hf_attention, "_library", lambda *args, **options: calls.append(options) or own(*args, **options))
    return calls


@pytest.mark.parametrize(
    "change",
    [
        dict(something_new=1), dict(dropout=1.0), dict(s_aux=torch.zeros(1, 4, 1, 1)), dict(dim=300),
        dict(cache=None), dict(mask=(2, 1, 5, 5)),  # these two are
    ],
    ids=lambda change: next(iter(change)),
)  # fmt: skip
def test_calls_that_are_not_ours(library, monkeypatch, change):
    calls = calls_of_library(monkeypatch)
    module = make("llama").model.layers[0].self_attn
    change = dict(change)
    q, k, v = torch.randn(3, 2, 4, 5, change.pop("dim", 8)).unbind()
    k, v = k[:, :2], v[:, :2]
    shape = change.pop("mask", None)
    served = shape or "cache" in change
    mask = torch.rand(shape) < 0.8 if shape else torch.ones(0, dtype=torch.bool)
    out = _hf_attention.attend(module, q, k, v, mask, scaling=0.3, **change)[0]
    assert len(calls) == (0 if served else 1)
    causal = torch.ones(5, 5, dtype=torch.bool).tril()[None, None]
    if change.get("dropout"):
        assert not module.training  # so that the eager function drops nothing
    exact = textbook(module, *(t.double() for t in (q, k, v)), mask if shape else causal, scaling=0.3)[0]
    torch.testing.assert_close(out, exact.float())


def forget_other_tests():
    if list(_hf_attention._live):  # swapped models of theirs
        gc.collect()


def test_no_mask_is_what_it_is_for_sdpa(library):
    module = make("llama").model.layers[0].self_attn
    q, k, v = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 7, 8), torch.randn(2, 2, 7, 8)
    theirs = transformers.AttentionInterface()["sdpa"]
    for queries in (q, q[:, :, :1]):
        for options in ({}, {"is_causal": False}, {"something_new": 1}):
            ours = _hf_attention.attend(module, queries, k, v, None, scaling=0.3, **options)[0]
            known = {name: x for name, x in options.items() if name == "is_causal"}
            torch.testing.assert_close(ours, theirs(module, queries, k, v, None, scaling=0.3, **known)[0])


def everything(model):
    """What must be the same after unswap: of every module its attributes, of the registries and configs theirs."""
    hidden = "_parameters", "_buffers", "_modules"
    parts = {n: {k: x for k, x in vars(m).items() if k not in hidden} for n, m in model.named_modules()}
    tensors = {n: id(t) for n, t in [*model.named_parameters(), *model.named_buffers()]}
    configs = {n: dict(vars(m.config)) for n, m in model.named_modules() if hasattr(m, "config")}
    interfaces = transformers.AttentionInterface, transformers.AttentionMaskInterface
    return copy.copy(parts), tensors, configs, [dict(interface._global_mapping) for interface in interfaces]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("linear", [False, True], ids=["", "linear_cross_entropy"])
def test_unswap_restores_everything(name, linear):
    forget_other_tests()
    model = make(name)
    saved = model.config.to_dict()
    before, state = everything(model), {k: x.clone() for k, x in model.state_dict().items()}
    report = minkernels.swap(model, linear_cross_entropy=linear)
    assert report.replaced and everything(model) != before
    assert model.config.to_dict() == saved  # what save_pretrained writes
    again = minkernels.swap(model, linear_cross_entropy=linear)
    assert not again.replaced and sorted(again.already) == sorted(report.replaced) and again.left == report.left
    assert list(model.state_dict()) == list(state) and all(torch.equal(x, state[k]) for k, x in model.state_dict().items())
    assert sorted(minkernels.unswap(model)) == sorted(report.replaced)
    assert everything(model) == before


def test_copies_keep_the_registration_alive(library):
    forget_other_tests()
    model = make("gpt2")
    plain = model(input_ids=torch.arange(3, 9)[None]).logits
    minkernels.swap(model, linear_cross_entropy=True)
    copied, pickled = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    assert copied.forward.args[0] is copied
    for taken, left in ((model, [copied, pickled]), (copied, [pickled]), (pickled, [])):
        minkernels.unswap(taken)
        assert (_hf_attention.NAME in transformers.AttentionInterface._global_mapping) == bool(left)
        for other in [taken, *left]:
            torch.testing.assert_close(other(input_ids=torch.arange(3, 9)[None]).logits, plain)
    assert model.config._attn_implementation == copied.config._attn_implementation == "eager"


def test_two_models_of_one_config():
    config = transformers.GPT2Config(**GPT2, attn_implementation="eager")
    first, second = (transformers.GPT2LMHeadModel(config) for _ in range(2))
    assert first.config is second.config
    assert minkernels.swap(first).replaced == minkernels.swap(second).replaced
    minkernels.unswap(first)
    assert config._attn_implementation == _hf_attention.NAME
    minkernels.unswap(second)
    assert config._attn_implementation == "eager"


class Wrapped(nn.Module):
    def __init__(self, text, image):
        super().__init__()
        self.parts = nn.ModuleList([text, image])


def test_an_implementation_set_since_is_kept():
    model = make("gpt2")
    minkernels.swap(model)
    model.set_attn_implementation("sdpa")
    minkernels.unswap(model)
    assert model.config._attn_implementation == "sdpa"


def test_models_inside_a_module():
    both = Wrapped(make("gpt2"), make("vit"))
    report = minkernels.swap(both, strict=True)
    assert {(where, by) for where, _, by in report.replaced} >= {("parts.0", "attention"), ("parts.1", "attention")}
    minkernels.unswap(both)
    assert both.parts[0].config._attn_implementation == both.parts[1].config._attn_implementation == "eager"


def test_encoder_and_decoder_of_their_own_configs(library):
    options = NO_DROPOUT | SMALL
    encoder, decoder = transformers.BertConfig(**options), transformers.BertConfig(**options, is_decoder=True, add_cross_attention=True)
    config = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    torch.manual_seed(0)
    model = transformers.EncoderDecoderModel(config).eval()
    model.set_attn_implementation("eager")
    given, _ = inputs_of("bert", "right")
    call = functools.partial(model, given["input_ids"], given["attention_mask"], decoder_input_ids=given["input_ids"][:, :6])
    plain = call().logits
    report = minkernels.swap(model)
    if "bert" not in UNROUTED:
        assert {where for where, _, by in report.replaced if by == "attention"} == {"encoder", "decoder"}
    torch.testing.assert_close(call().logits, plain)


def test_models_that_do_not_go_through_the_interface():
    config = transformers.BloomConfig(hidden_size=32, n_layer=2, n_head=4, vocab_size=V)
    model = transformers.BloomForCausalLM(config)
    report = minkernels.swap(model)
    assert [(x.where, x.what) for x in report.left] == [(f"transformer.h.{i}.self_attention", "BloomAttention") for i in range(2)]
    assert all(x.by == "cross_entropy" for x in report.replaced)
    minkernels.unswap(model)
    with pytest.raises(ValueError, match="AttentionInterface"):
        minkernels.swap(model, strict=True)


def test_no_attention_at_all():
    model = transformers.ResNetModel(transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1]))
    assert str(minkernels.swap(model)) == "nothing to swap in this model"
    with pytest.raises(ValueError, match="nothing to swap"):
        minkernels.swap(model, strict=True)


@pytest.mark.parametrize("version", ["4.56.2", "6.0.0", "3.1"])
def test_versions_outside_the_range(monkeypatch, version):
    monkeypatch.setattr(sys.modules["transformers"], "__version__", version)  # which is not always the object it was
    adapter._warn.cache_clear()
    model = make("gpt2")
    before = everything(model)
    with pytest.warns(UserWarning, match=rf"minkernels 0\.1\.0 .* 4\.57 .* {version}"):
        report = minkernels.swap(model)
    assert everything(model) == before and not report.replaced and [x.what for x in report.left] == ["GPT2LMHeadModel"]
    minkernels.swap(model)  # no second warning: it would be an error here


def test_not_imported_without_transformers():
    code = "import sys, torch, minkernels; minkernels.swap(torch.nn.Linear(2, 2)); print(*(m for m in sys.modules if 'transformers' in m))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "\n"


# ---- losses


LABELS = torch.tensor([[5, -100, 7, 60, 0], [3, 3, -100, -100, 9]])
LOSSES = {  # of the library: arguments after the logits (2, 5, V), and logits of two more kinds
    "ForCausalLMLoss": dict(labels=LABELS, vocab_size=V),
    "ForMaskedLMLoss": dict(labels=LABELS, vocab_size=V),
    "ForTokenClassification": dict(labels=LABELS, config=transformers.BertConfig(num_labels=V)),
}
OPTIONS = {
    "mean": {},
    "items": dict(num_items_in_batch=torch.tensor(11)),
    "items-int": dict(num_items_in_batch=11),
    "ignore": dict(ignore_index=7),
}


def judged_loss(ours, theirs, logits, dtype, **given):
    """Theirs upcasts the logits, so that it is exact but for fp32: in fp64 by the same formula."""
    results = []
    for function, kind in ((ours, dtype), (theirs, dtype), (ours, torch.float64)):
        x = [t.to(dtype).to(kind).requires_grad_() for t in logits]
        loss = function(*x, **given)
        results.append((loss.detach(), *torch.autograd.grad(loss, x)))
    for what, *three in zip(("loss", *"gradient" * len(logits)), *results, strict=False):
        assert three[0].dtype == three[1].dtype
        assert_close(*three, torch.float32 if what == "loss" else dtype, what)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("name", LOSSES)
def test_losses(library, name, options, dtype):
    given = LOSSES[name] | options
    if options.get("ignore_index") == 7:
        given["labels"] = LABELS.clamp(min=0)
    ours, theirs = _hf_losses.fused()[name], getattr(transformers.loss.loss_utils, name)
    judged_loss(ours, theirs, [torch.randn(2, 5, V)], dtype, **given)


def test_causal_loss_of_shifted_labels(library):
    theirs = transformers.loss.loss_utils.ForCausalLMLoss
    given = dict(labels=None, vocab_size=V, shift_labels=LABELS)
    judged_loss(_hf_losses.causal_lm, theirs, [torch.randn(2, 5, V)], torch.float32, **given)


def test_question_answering_loss(library):
    theirs = transformers.loss.loss_utils.ForQuestionAnsweringLoss
    starts, ends = torch.tensor([[2], [9]]), torch.tensor([[4], [0]])  # 9 is outside
    logits = [torch.randn(2, 5), torch.randn(2, 5)]
    judged_loss(_hf_losses.question_answering, theirs, logits, torch.float32, start_positions=starts, end_positions=ends)
    assert _hf_losses.question_answering(*logits, None, ends) is None


@pytest.mark.parametrize("kind", ["single", "single-int32", "multi", "regression"])
def test_sequence_classification_loss(library, kind):
    config = transformers.BertConfig(num_labels=1 if kind == "regression" else 5)
    labels = {"multi": torch.rand(2, 5), "regression": torch.rand(2)}.get(kind, torch.tensor([4, 1]))
    if kind == "single-int32":
        config.problem_type = "single_label_classification"
    pooled = torch.randn(2, config.num_labels)
    theirs = transformers.loss.loss_utils.ForSequenceClassificationLoss
    torch.testing.assert_close(
        _hf_losses.sequence_classification(labels, pooled, copy.deepcopy(config)), theirs(labels, pooled, config)
    )
    ours = copy.deepcopy(config)
    ours.problem_type = None
    _hf_losses.sequence_classification(labels, pooled, ours)
    assert ours.problem_type == config.problem_type


HEADS = {  # which call F.cross_entropy in their forward
    "BertForPreTraining": dict(labels=LABELS, next_sentence_label=torch.tensor([0, 1])),
    "BertForQuestionAnswering": dict(start_positions=torch.tensor([1, 2]), end_positions=torch.tensor([3, 9])),
    "BertForSequenceClassification": dict(labels=torch.tensor([1, 0])),
    "BertForMultipleChoice": dict(labels=torch.tensor([0])),
}


@pytest.mark.parametrize("head", HEADS)
def test_heads_with_a_loss_of_their_own(library, monkeypatch, head):
    calls, own = [], functional.our_cross_entropy
    monkeypatch.setattr(functional, "our_cross_entropy", lambda *args, **options: calls.append(args) or own(*args, **options))
    model = getattr(transformers, head)(transformers.BertConfig(**SMALL | NO_DROPOUT)).eval()
    ids = torch.randint(3, V, (2, 5))
    given = dict(input_ids=ids[None] if head.endswith("Choice") else ids, **HEADS[head])
    plain = model(**given).loss
    report = minkernels.swap(model)
    assert ("", f"F.cross_entropy in {head}", "cross_entropy") in report.replaced
    torch.testing.assert_close(model(**given).loss, plain)
    assert len(calls) == sum("label" in name or "positions" in name for name in given)
    torch.testing.assert_close(copy.deepcopy(model)(**given).loss, plain)
    assert model(given["input_ids"]).get("loss") is None


CAUSAL_LMS = {  # those of _hf_losses.CAUSAL_LMS, and what their config has beside GQA's
    "GPT2": None,
    "Llama": {},
    "Mistral": {},
    "Qwen2": {},
    "Qwen3": {},
    "Gemma": {},
    "Gemma2": dict(final_logit_softcapping=0.5),
    "Phi": {},  # its lm_head has a bias
    "Phi3": {},
    "Olmo2": {},
    "SmolLM3": {},
    "Starcoder2": {},
}


def test_every_causal_language_model_is_tested():
    assert {f"{name}ForCausalLM" for name in CAUSAL_LMS} - {"GPT2ForCausalLM"} | {"GPT2LMHeadModel"} == _hf_losses.CAUSAL_LMS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CAUSAL_LMS)
def test_linear_cross_entropy(library, name, dtype):
    options = GPT2 if name == "GPT2" else GQA | CAUSAL_LMS[name]
    torch.manual_seed(0)
    plain = getattr(transformers, "GPT2LMHeadModel" if name == "GPT2" else f"{name}ForCausalLM")(
        getattr(transformers, f"{name}Config")(**options, attn_implementation="eager")
    )
    with torch.no_grad():
        for p in plain.parameters():
            p.copy_(torch.randn_like(p) * (0.3 if p.dim() > 1 else 0.1) + (0.5 if p.dim() == 1 else 0.0))
    plain = plain.to(dtype).eval()
    ours, given = copy.deepcopy(plain), inputs_of("llama", "right")[0]
    report = minkernels.swap(ours, linear_cross_entropy=True, strict=True)
    assert "linear_cross_entropy" in [by for *_, by in report.replaced]
    results = []
    for model in (ours, plain, copy.deepcopy(plain).double()):
        out = model(**given, num_items_in_batch=torch.tensor(17))
        out.loss.backward()
        results.append((out.loss.detach(), torch.cat([p.grad.flatten() for p in model.parameters()])))
        assert (out.logits is None) == (model is ours) and out.past_key_values is not None
        assert type(out) is type(plain(**given))
    for what, *three in zip(("loss", "gradients"), *results, strict=True):
        assert_close(*three, dtype, what)
    assert ours(given["input_ids"]).logits.shape == (B, T, V)
    ids = given["input_ids"][:, :5]
    assert torch.equal(*(model.generate(ids, max_new_tokens=4, do_sample=False) for model in (ours, plain)))


def test_linear_cross_entropy_other_calls(library):
    model, given = swapped("gpt2", linear_cross_entropy=True), inputs_of("gpt2", None)[0]
    loss = model(**given).loss
    torch.testing.assert_close(loss, make("gpt2")(**given).loss)
    torch.testing.assert_close(model(**given, return_dict=False)[0], loss)
    torch.testing.assert_close(model(given["input_ids"], **{k: x for k, x in given.items() if k != "input_ids"}).loss, loss)
    shifted = torch.nn.functional.pad(given["labels"], (0, 1), value=-100)[:, 1:]
    torch.testing.assert_close(model(**given, shift_labels=shifted).loss, loss)
    kept = model(**given | dict(labels=given["labels"][:, -4:]), logits_to_keep=4)
    assert kept.logits.shape == (B, 4, V)
    with model.lm_head.register_forward_hook(lambda *_: None), pytest.MonkeyPatch.context():
        assert model(**given).logits is not None
    assert "hidden_states" in model(**given, output_hidden_states=True)


@pytest.mark.parametrize("why", ["architecture", "head", "loss", "forward"])
def test_no_linear_cross_entropy(why):
    model = make("gpt_oss" if why == "architecture" else "gpt2")
    if why == "head":
        model.lm_head.register_forward_hook(lambda *_: None)
    if why == "loss":
        model.loss_function = len
    if why == "forward":
        model.forward = functools.partial(type(model).forward, model)
    report = minkernels.swap(model, linear_cross_entropy=True)
    assert any("logits" in what for _, what, _ in report.left)
    assert ("loss" in why) or "cross_entropy" in [by for *_, by in report.replaced]
    assert ("forward" in vars(model)) == (why == "forward")


# ---- torch.compile and torch.export


class Counter:
    """A backend that runs the graph as it is, and counts how often it was asked to compile one."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, inputs):
        self.graphs += 1
        return graph.forward


@pytest.mark.parametrize("name, linear", [("gpt2", False), ("gpt2", True), ("bert", False), ("mistral", False)])
def test_compile_without_a_graph_for_each_length(library, name, linear):
    torch._dynamo.reset()
    counter, model = Counter(), swapped(name, linear_cross_entropy=linear)
    call = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    graphs = []
    for length, padded in ((8, None), (11, "left"), (13, "right"), (9, None), (21, "left")):
        given, valid = inputs_of(name, padded, length=length)
        out, plain = call(**given), make(name)(**given)
        torch.testing.assert_close(out.loss, plain.loss)
        if not linear:
            torch.testing.assert_close(out.logits[valid], plain.logits[valid], atol=1e-4, rtol=1e-4)
        graphs.append(counter.graphs)
    assert graphs[-1] == graphs[1] <= 2, graphs  # one more where torch finds that a size it took for fixed is not


def test_compiled_head_with_a_loss_of_its_own(library):
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = transformers.BertForPreTraining(transformers.BertConfig(**SMALL | NO_DROPOUT | dict(num_hidden_layers=1))).eval()
    given = dict(input_ids=torch.randint(3, V, (2, 5)), **HEADS["BertForPreTraining"])
    plain = model(**given).loss
    minkernels.swap(model)
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend=Counter())(**given).loss, plain)


def test_compiled_gradients(library):
    torch._dynamo.reset()
    given, valid = inputs_of("gpt2", "left")
    results = []
    for model in (swapped("gpt2"), make("gpt2")):
        del model.transformer.h[1:]  # half the time
        results.append(run(model, given, valid))
    model = swapped("gpt2")
    del model.transformer.h[1:]
    model.forward = torch.compile(model.forward, fullgraph=True, dynamic=True, backend="aot_eager")
    for ours, theirs, compiled in zip(*results, run(model, given, valid), strict=True):
        torch.testing.assert_close(compiled, ours)
        torch.testing.assert_close(compiled, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_export(library, name):
    if name in UNROUTED:
        pytest.skip("not swapped in this version")
    model, (given, _) = swapped(name), inputs_of(name, "left")
    given = {k: given[k] for k in ("input_ids", "attention_mask")} | ({"use_cache": False} if name == "gpt2" else {})
    batch, length = torch.export.Dim("batch", min=2, max=64), torch.export.Dim("length", min=2, max=64)
    shapes = {k: {0: batch, 1: length} if isinstance(x, torch.Tensor) else None for k, x in given.items()}
    program = torch.export.export(model, (), given, dynamic_shapes=shapes)
    assert "minkernels.attention_fwd" in str(program.graph)
    longer, valid = inputs_of(name, "right", length=17)
    call = given | {k: longer[k] for k in ("input_ids", "attention_mask")}
    torch.testing.assert_close(program.module()(**call).logits[valid], make(name)(**call).logits[valid], atol=1e-4, rtol=1e-4)
