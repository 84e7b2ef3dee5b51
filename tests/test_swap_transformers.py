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
from minkernels.swap import _hf_attention
from minkernels.swap import transformers as adapter
from transformers_cases import (
    CAUSAL,
    GENERATING,
    GPT2,
    GQA,
    MODELS,
    NO_DROPOUT,
    SMALL,
    UNROUTED,
    B,
    T,
    V,
    eager,
    exactly,
    inputs_of,
    make,
    run,
    swapped,
    textbook,
    transformers,
)

PADDED = [(name, padded) for name in MODELS for padded in ([None] if name in ("vit", "whisper") else [None, "left", "right"])]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name, padded", PADDED, ids=str)
def test_outputs_and_gradients(library, name, dtype, padded):
    model = make(name, dtype)
    report = minkernels.swap(model)
    attended = [what for _, what, by in report.replaced if by == "attention"]
    assert bool(attended) == (name not in UNROUTED)
    given, valid = inputs_of(name, padded, dtype)
    actual = run(model, given, valid)
    plain, exact = eager(name, padded, dtype), exactly(name, padded)
    for what, *three in zip(("logits", "loss", "gradients"), actual, plain, exact, strict=True):
        assert_close(*three, dtype, what)


@pytest.mark.parametrize("name", [*CAUSAL, *GENERATING, "whisper", "t5"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generate(library, name, cache):
    """Token for token, past the window of 4, the first row padded on the left."""
    given, _ = inputs_of(name, None if name in ("whisper", "t5") else "left")
    given = {k: x for k, x in given.items() if k in ("input_ids", "attention_mask", "input_features")}
    made = [
        model.generate(**given, max_new_tokens=9, min_new_tokens=9, do_sample=False, cache_implementation=cache)
        for model in (make(name), swapped(name))
    ]
    assert made[0].shape[1] >= 9 and torch.equal(*made)


@pytest.mark.skipif(not hasattr(transformers, "Gemma4ForCausalLM"), reason="not in this version")
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generate_from_layers_that_share_keys(library, cache):
    """Their queries, and the rows of their masks, are cut to those of the logits."""
    options = GQA | dict(num_hidden_layers=4, num_kv_shared_layers=2, layer_types=["sliding_attention", "full_attention"] * 2)
    options |= dict(sliding_window=4, global_head_dim=8, vocab_size_per_layer_input=V, hidden_size_per_layer_input=8)
    torch.manual_seed(0)
    config = transformers.Gemma4TextConfig(**options, attn_implementation="eager")
    plain = transformers.Gemma4ForCausalLM(config).eval()
    ours, given = copy.deepcopy(plain), inputs_of("llama", "left")[0]
    minkernels.swap(ours)
    prompt = {k: x for k, x in given.items() if k != "labels"}
    made = [
        model.generate(**prompt, max_new_tokens=9, min_new_tokens=9, do_sample=False, cache_implementation=cache)
        for model in (plain, ours)
    ]
    assert torch.equal(*made)
    torch.testing.assert_close(ours(**given).loss, plain(**given).loss)
    causal = dict(mask_function=transformers.masking_utils.causal_mask_function, config=transformers.Gemma3nTextConfig())
    assert _hf_attention.mask(B, T, T, **causal).shape == (0,)  # shares keys as well, and cuts nothing


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


@pytest.mark.parametrize("name", ["llama", "mistral", "bert"])
@pytest.mark.parametrize("shape", [(T,), (B, 1, T), (B, T, T)], ids=str)
def test_masks_that_are_none(name, shape):
    """Their errors: a mask of one dimension was silently taken for one of ours, which is causal."""
    mask = torch.ones(shape, dtype=torch.int64)
    mask[..., 0] = 0
    for model in (make(name), swapped(name)):
        with pytest.raises((IndexError, RuntimeError), match=r"too many indices|out of bounds|the number of sizes"):
            model(input_ids=inputs_of(name, None)[0]["input_ids"], attention_mask=mask)


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


def test_a_config_that_asks_for_weights(library, tmp_path):
    """No call says so to the attention, and transformers does not save it with another than eager."""
    model = make("mistral")
    model.config.output_attentions = True
    report = minkernels.swap(model)
    assert [by for *_, by in report.replaced] == ["cross_entropy"] and "config.output_attentions asks" in report.left[0].why
    assert len(model(inputs_of("mistral", None)[0]["input_ids"]).attentions) == 2
    model.config.save_pretrained(tmp_path)


def calls_of_library(monkeypatch):
    calls = []
    own = _hf_attention._library
    monkeypatch.setattr(_hf_attention, "_library", lambda *args, **options: calls.append(options) or own(*args, **options))
    return calls


@pytest.mark.parametrize(
    "change",
    [
        dict(something_new=1), dict(dropout=1.0), dict(s_aux=torch.zeros(1, 4, 1, 1)), dict(dim=300),
        dict(cache=None), dict(mask=(2, 1, 5, 5)), dict(mask=(2, 1, 1, 7)),  # these are, with a mask that is longer than its keys, too
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
    exact = textbook(module, *(t.double() for t in (q, k, v)), mask[..., :5] if shape else causal, scaling=0.3)[0]
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
    minkernels.swap(first)
    del first  # without unswap, and the second was not swapped
    gc.collect()
    assert config._attn_implementation == "eager"


class Wrapped(nn.Module):
    def __init__(self, text, image):
        super().__init__()
        self.parts = nn.ModuleList([text, image])


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_an_implementation_set_since_is_kept(name):
    model = make(name)
    first = minkernels.swap(model)
    model.set_attn_implementation("sdpa")
    minkernels.unswap(model)
    assert model.config._attn_implementation == "sdpa"
    minkernels.swap(model)
    before = everything(model)
    model.set_attn_implementation("eager")
    again = minkernels.swap(model)
    assert [by for *_, by in again.replaced] == ["attention"] and len(again.already) == len(first.replaced) - 1
    assert everything(model)[2:] == before[2:]
    minkernels.unswap(model)
    assert model.config._attn_implementation == "eager"


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
