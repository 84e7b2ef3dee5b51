"""The losses of transformers on ours: the same arguments, the same values."""

import inspect
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from minkernels.linear_cross_entropy.ops import linear_cross_entropy
from minkernels.swap import functional
from minkernels.swap.mode import Functions

CAUSAL_LMS = {  # tested: their logits are lm_head(the body's last hidden state), capped by config.final_logit_softcapping if it is there
    "GPT2LMHeadModel",
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "GemmaForCausalLM",
    "Gemma2ForCausalLM",
    "PhiForCausalLM",
    "Phi3ForCausalLM",
    "Olmo2ForCausalLM",
    "SmolLM3ForCausalLM",
    "Starcoder2ForCausalLM",
}
LOSSES = "cross_entropy", "binary_cross_entropy_with_logits"
TELLS = "label", "positions", "return_loss"  # in the name of an argument for which a forward forms its loss
LOSS_OPTIONS = "num_items_in_batch", "ignore_index", "shift_labels"  # of the loss function, which a model takes as it hands them on


def loss_of(model: nn.Module) -> tuple[Callable, Callable | None]:
    """model.loss_function, without its warning; and ours for it, itself if that is set already, None if there is none."""
    from transformers.loss import loss_utils

    own = vars(model).get("_loss_function")
    if own is None:
        own = loss_utils.LOSS_MAPPING.get(getattr(model, "loss_type", None), loss_utils.ForCausalLMLoss)
    if own in fused().values():
        return own, own
    return own, next((ours for name, ours in fused().items() if own is getattr(loss_utils, name, None)), None)


def fused() -> dict[str, Callable]:
    """The losses of transformers.loss.loss_utils that we have."""
    return {
        "ForCausalLMLoss": causal_lm,
        "ForMaskedLMLoss": masked_lm,
        "ForTokenClassification": token_classification,
        "ForQuestionAnsweringLoss": question_answering,
        "ForSequenceClassificationLoss": sequence_classification,
        "ForSemanticSegmentationLoss": semantic_segmentation,  # of 5.x
    }


def causal_lm(logits, labels, vocab_size, num_items_in_batch=None, ignore_index=-100, shift_labels=None, **_):
    labels = _shifted(labels, ignore_index) if shift_labels is None else shift_labels
    return masked_lm(logits, labels, vocab_size, num_items_in_batch, ignore_index)


def masked_lm(logits, labels, vocab_size, num_items_in_batch=None, ignore_index=-100, **_):
    rows, labels = logits.reshape(-1, vocab_size), labels.reshape(-1).to(logits.device)
    return _mean(_cross_entropy, num_items_in_batch, rows, labels, ignore_index=ignore_index)


def token_classification(logits, labels, config, num_items_in_batch=None, ignore_index=-100, **_):
    return masked_lm(logits, labels, config.num_labels, num_items_in_batch, ignore_index)


def question_answering(start_logits, end_logits, start_positions, end_positions, num_items_in_batch=None, **_):
    if start_positions is None or end_positions is None:
        return None
    ends = []
    for logits, positions in ((start_logits, start_positions), (end_logits, end_positions)):
        positions = positions.squeeze(-1) if positions.dim() > 1 else positions
        outside = logits.shape[1]  # the answer was cut off: ignored
        target = positions.to(logits.device).clamp(0, outside)
        ends.append(_mean(_cross_entropy, num_items_in_batch, logits, target, ignore_index=outside))
    return (ends[0] + ends[1]) / 2


def sequence_classification(labels, pooled_logits, config, **options):
    from transformers.loss.loss_utils import ForSequenceClassificationLoss

    many, integers = config.num_labels > 1, not labels.is_floating_point()
    single = config.problem_type == "single_label_classification" or (config.problem_type is None and many and integers)
    if not single or labels.dtype not in (torch.int64, torch.int32):
        return ForSequenceClassificationLoss(labels, pooled_logits, config, **options)
    config.problem_type = "single_label_classification"  # as it does
    return masked_lm(pooled_logits, labels, config.num_labels, options.get("num_items_in_batch"), options.get("ignore_index", -100))


def semantic_segmentation(*args, **options):
    from transformers.loss.loss_utils import ForSemanticSegmentationLoss

    with Functions(("cross_entropy",)):
        return ForSemanticSegmentationLoss(*args, **options)


def _cross_entropy(logits, labels, **options):
    loss = functional.cross_entropy(logits, labels, **options)
    return F.cross_entropy(logits.float(), labels, **options) if loss is None else loss  # of tensor parallelism's logits, say


def _shifted(labels, ignore_index):
    return F.pad(labels, (0, 1), value=ignore_index)[..., 1:]


def _mean(loss, count, *args, **options):
    """Over the rows that count, or over `count` of them, which spans the batches of an accumulated step."""
    if count is None:
        return loss(*args, **options)
    total = loss(*args, **options, reduction="sum")
    return total / (count.to(total.device) if isinstance(count, Tensor) else count)


def no_linear(model: nn.Module) -> str:
    """Why this causal language model cannot do without its logits; empty if it can."""
    kind = next(base for base in type(model).__mro__ if not base.__module__.startswith("torch."))  # fully_shard makes a class of its own
    if kind.__name__ not in CAUSAL_LMS or not kind.__module__.startswith("transformers.models."):
        return "not among the architectures that linear_cross_entropy was tested with"
    if not _plain_head(model):
        head = model.lm_head
        return f"its lm_head is no plain nn.Linear but {type(head).__name__} of {type(head.weight).__name__}, or has hooks"
    own, ours = loss_of(model)
    if ours is not causal_lm:
        return f"its loss is {getattr(own, '__name__', own)}"
    return ""


def _plain_head(model):
    head = model.lm_head
    hooks = head._forward_hooks or head._forward_pre_hooks or head._backward_hooks or head._backward_pre_hooks
    if type(head.weight).__name__ not in ("Parameter", "DTensor"):  # torchao quantises the weight, and the module stays
        return False
    return type(head) is nn.Linear and "forward" not in vars(head) and not hooks and not nn.modules.module._has_any_global_hook()


def without_logits(model: nn.Module, *args, **given):
    """forward of a causal language model: with labels its loss by linear_cross_entropy, and no logits; without, as ever."""
    if args:
        given.update(zip([*inspect.signature(type(model).forward).parameters][1:], args, strict=False))
    labels, kept = given.get("labels"), given.get("logits_to_keep", 0)
    whole = isinstance(kept, int) and kept == 0
    whole = whole and forward_ad._current_level < 0 and not getattr(model, "model_parallel", False)
    if labels is None or not whole or no_linear(model):
        return type(model).forward(model, **given)
    from transformers import modeling_outputs

    as_dict = given.pop("return_dict", None)
    as_dict = getattr(model.config, "return_dict", True) if as_dict is None else as_dict
    options = {name: given.pop(name, None) for name in LOSS_OPTIONS}
    body = model.base_model(**{name: x for name, x in given.items() if name not in ("labels", "logits_to_keep")}, return_dict=True)
    hidden, head = body.last_hidden_state, model.lm_head
    ignore_index = -100 if options["ignore_index"] is None else options["ignore_index"]
    labels = _shifted(labels, ignore_index) if options["shift_labels"] is None else options["shift_labels"]
    loss = _mean(
        linear_cross_entropy, options["num_items_in_batch"], hidden.flatten(0, -2), head.weight, labels.reshape(-1).to(hidden.device),
        linear_bias=head.bias, ignore_index=ignore_index, softcap=getattr(model.config, "final_logit_softcapping", None),
    )  # fmt: skip
    crossed = hasattr(body, "cross_attentions")
    kind = modeling_outputs.CausalLMOutputWithCrossAttentions if crossed else modeling_outputs.CausalLMOutputWithPast
    out = kind(loss=loss, logits=None, **{name: x for name, x in body.items() if name != "last_hidden_state"})
    return out if as_dict else out.to_tuple()


def with_losses(model: nn.Module, *args, **given):
    """forward of a model that calls PyTorch's losses itself, which it does where it is given labels, or told to."""
    if len(args) > 1 or any(x is not None and any(sign in name for sign in TELLS) for name, x in given.items()):
        with Functions(LOSSES):
            return type(model).forward(model, *args, **given)
    return type(model).forward(model, *args, **given)
