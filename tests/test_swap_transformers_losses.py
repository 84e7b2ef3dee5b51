"""swap on Hugging Face transformers: losses, torch.compile, torch.export."""

import copy
import functools

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, loss_parallel, parallelize_module

import minkernels
from judge import assert_close
from minkernels.swap import _hf_losses, functional
from swap_cases import ours
from transformers_cases import GPT2, GQA, NO_DROPOUT, SMALL, UNROUTED, B, T, V, inputs_of, make, run, swapped, transformers

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


def test_loss_of_a_slice_of_logits(library):
    given, logits = dict(labels=LABELS, vocab_size=V), torch.randn(2, 6, V).bfloat16()[:, :5]
    torch.testing.assert_close(_hf_losses.causal_lm(logits, **given), transformers.loss.loss_utils.ForCausalLMLoss(logits, **given))


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
    torch.testing.assert_close(_hf_losses.sequence_classification(labels, pooled, copy.deepcopy(config)), theirs(labels, pooled, config))
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
    losses, ours = [], functional.usual_cross_entropy
    monkeypatch.setattr(functional, "usual_cross_entropy", lambda *args: losses.append(ours(*args)) or losses[-1])
    model = getattr(transformers, head)(transformers.BertConfig(**SMALL | NO_DROPOUT)).eval()
    ids = torch.randint(3, V, (2, 5))
    given = dict(input_ids=ids[None] if head.endswith("Choice") else ids, **HEADS[head])
    plain = model(**given).loss
    report = minkernels.swap(model)
    assert any(x.what.startswith("F.cross_entropy") and x.what.endswith(f" in {head}") for x in report.replaced)
    torch.testing.assert_close(model(**given).loss, plain)
    assert len(losses) == sum("label" in name or "positions" in name for name in given) and None not in losses
    torch.testing.assert_close(copy.deepcopy(model)(**given).loss, plain)
    assert model(given["input_ids"]).get("loss") is None


def test_heads_with_other_losses_of_their_own(library):
    """A binary cross-entropy, one of two in the same forward, and one in a function that forward calls, which is told to form it."""
    text, image = SMALL | NO_DROPOUT, dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48)
    ids, both = torch.randint(3, V, (2, 5)), "F.cross_entropy, F.binary_cross_entropy_with_logits"
    clip = dict(text_config=image | dict(vocab_size=V), vision_config=image | dict(image_size=32, patch_size=8))
    bert = transformers.BertConfig(**text, problem_type="multi_label_classification", num_labels=3)
    cases = [
        (transformers.ElectraForPreTraining(transformers.ElectraConfig(**text)), dict(labels=ids % 2), both.partition(", ")[2]),
        (transformers.BertForSequenceClassification(bert), dict(labels=torch.rand(2, 3)), both),
        (
            transformers.CLIPModel(transformers.CLIPConfig(**clip)),
            dict(pixel_values=torch.randn(2, 3, 32, 32), return_loss=True),
            both.partition(", ")[0],
        ),
    ]
    for model, given, what in cases:
        plain = model.eval()(ids, **given).loss
        report = minkernels.swap(model, strict=True)
        assert f"{what} in {type(model).__name__}" in [x.what for x in report.replaced]
        out, names = ours(model, ids, **given)
        assert ("cross_entropy_fwd" if what in both.partition(", ")[0] else "sigmoid_loss_fwd") in names
        torch.testing.assert_close(out.loss, plain)


def test_loss_of_semantic_segmentation(library):
    config = dict(hidden_size=32, num_hidden_layers=4, num_attention_heads=2, intermediate_size=48, image_size=32, patch_size=8)
    model = transformers.BeitForSemanticSegmentation(transformers.BeitConfig(**config, out_indices=[1, 2, 3, 4], num_labels=3)).eval()
    given = dict(pixel_values=torch.randn(2, 3, 32, 32), labels=torch.randint(3, (2, 32, 32)))
    if not hasattr(transformers.loss.loss_utils, "ForSemanticSegmentationLoss"):
        pytest.skip("an older transformers")
    plain = model(**given).loss
    assert "ForSemanticSegmentationLoss" in [x.what for x in minkernels.swap(model).replaced]
    out, names = ours(model, **given)
    assert "cross_entropy_fwd" in names
    torch.testing.assert_close(out.loss, plain)


class Quantized(torch.Tensor):
    """As torchao's: the module stays an nn.Linear."""


def test_a_quantized_head_keeps_its_logits(library):
    model, given = make("llama"), inputs_of("llama", "right")[0]
    plain = model(**given).loss
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().as_subclass(Quantized))
    report = minkernels.swap(model, linear_cross_entropy=True)
    assert [x.why for x in report.left] == ["its lm_head is no plain nn.Linear but Linear of Quantized, or has hooks"]
    out = model(**given)
    assert out.logits is not None
    torch.testing.assert_close(out.loss.as_subclass(torch.Tensor), plain)


class Filtering(transformers.LlamaForCausalLM):
    """As Gemma3ForSequenceClassification and many a user's: the loss is where super() leads."""

    def forward(self, input_ids, **given):
        return super().forward(input_ids, **{name: x for name, x in given.items() if name != "logger"})


def test_a_loss_behind_super(library):
    model, given = make("llama"), inputs_of("llama", "right")[0]
    model.__class__ = Filtering
    plain = model(**given).loss
    report = minkernels.swap(model, linear_cross_entropy=True)
    assert "cross_entropy" in [by for *_, by in report.replaced] and [x.what for x in report.left] == ["Filtering's logits"]
    out, names = ours(model, **given)
    assert names.count("cross_entropy_fwd") == 1
    torch.testing.assert_close(out.loss, plain)


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
    with model.lm_head.register_forward_hook(lambda *_: None):
        assert model(**given).logits is not None
    with torch.nn.modules.module.register_module_forward_hook(lambda *_: None):  # of all modules
        assert model(**given).logits is not None
    assert "hidden_states" in model(**given, output_hidden_states=True)
    inner = model.forward
    model.forward = lambda *args, **more: inner(*args, **more)  # as others wrap it
    torch.testing.assert_close(model(given["input_ids"], labels=given["labels"]).loss, loss)
    model.loss_function = lambda *_, **more: torch.tensor(7.0)  # set after the swap
    assert model(**given).loss == 7


@pytest.mark.parametrize("first", ["swap", "shard"])
def test_linear_cross_entropy_of_a_sharded_model(library, first):
    """fully_shard gives the model a class of its own, without which there were logits again, and no word of it."""
    model, given = make("llama"), inputs_of("llama", "right")[0]
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        if first == "swap":
            minkernels.swap(model, linear_cross_entropy=True)
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        if first == "shard":
            minkernels.swap(model, linear_cross_entropy=True, strict=True)
        out, plain = model(**given), make("llama")
        out.loss.backward()
        assert out.logits is None
        plain(**given).loss.backward()
        for mine, theirs in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(mine.grad.full_tensor(), theirs.grad)
    finally:
        torch.distributed.destroy_process_group()


def test_loss_of_parallel_logits(library):
    """Those of a head in tensor parallelism are no plain tensor, and their loss is PyTorch's own in the scope that it has for them."""
    model, given = make("llama"), inputs_of("llama", "right")[0]
    plain = model(**given, num_items_in_batch=17).loss
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        parallelize_module(model, init_device_mesh("cpu", (1,)), {"lm_head": ColwiseParallel(use_local_output=False)})
        minkernels.swap(model)
        with loss_parallel():
            loss = model(**given, num_items_in_batch=17).loss
            loss.backward()
        torch.testing.assert_close(loss.full_tensor(), plain)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("linear", [False, True], ids=["", "linear_cross_entropy"])
def test_forward_mode(library, linear):
    """Which we have not: the model's own road, through attention and loss."""
    given, tangents = inputs_of("llama", "left")[0], []
    x = torch.randn(B, T, 32)
    for model in (swapped("llama", linear_cross_entropy=linear), make("llama")):
        call = functools.partial(model, **given | dict(input_ids=None))
        tangents.append(torch.func.jvp(lambda x, call=call: call(inputs_embeds=x).loss, (x,), (torch.ones_like(x),))[1])
    torch.testing.assert_close(*tangents, atol=1e-4, rtol=1e-4)


class GPT2LMHeadModel(transformers.GPT2LMHeadModel):
    """Remote code may give a known name to another model."""

    def forward(self, input_ids, labels=None):
        return 3 * self.lm_head(self.transformer(input_ids).last_hidden_state)


@pytest.mark.parametrize("why", ["architecture", "name", "head", "loss", "forward"])
def test_no_linear_cross_entropy(why):
    model = make("gpt_oss" if why == "architecture" else "gpt2")
    if why == "name":
        model.__class__ = GPT2LMHeadModel
    if why == "head":
        model.lm_head.register_forward_hook(lambda *_: None)
    if why == "loss":
        model.loss_function = len
    if why == "forward":
        model.forward = functools.partial(type(model).forward, model)
    report = minkernels.swap(model, linear_cross_entropy=True)
    assert any("logits" in what for _, what, _ in report.left)
    assert why in ("loss", "name") or "cross_entropy" in [by for *_, by in report.replaced]
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
    for mine, theirs, compiled in zip(*results, run(model, given, valid), strict=True):
        torch.testing.assert_close(compiled, mine)
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
