"""Swapped nn.MultiheadAttention, and the encoder and decoder layers that hold it."""

import copy

import pytest
import torch
from torch import nn

from minkernels import swap, swapped
from swap_cases import batch, module_judged, ours

pytestmark = [
    pytest.mark.usefixtures("library"),
    pytest.mark.filterwarnings("ignore:.*nested tensors:UserWarning", "ignore:enable_nested_tensor:UserWarning", "ignore:Support for mis"),
]


MHA = {  # of the module; what forward gets besides
    "self": ({}, {}),
    "seq-first": ({"batch_first": False}, {}),
    "no-bias": ({"bias": False}, {}),
    "memory": ({}, {"memory": 32}),
    "own-dims": ({"kdim": 24, "vdim": 40}, {"memory": (24, 40)}),
    "bias-kv": ({"add_bias_kv": True}, {"padding": bool, "mask": bool}),
    "zero-attn": ({"add_zero_attn": True, "batch_first": False}, {"padding": float, "mask": float}),
    "both-extra": ({"add_zero_attn": True, "add_bias_kv": True}, {"mask": bool}),
    "padding": ({}, {"padding": bool}),
    "padding-float": ({}, {"padding": float}),
    "mask": ({}, {"mask": bool}),
    "mask-float": ({}, {"mask": float}),
    "mask-of-heads": ({}, {"mask": bool, "heads": True}),
    "mask-float-of-heads": ({}, {"mask": float, "heads": True, "padding": bool}),
    "both-bool": ({}, {"mask": bool, "padding": bool}),
    "both-float": ({}, {"mask": float, "padding": float}),
    "causal": ({}, {"mask": "causal"}),
    "causal-padding": ({}, {"mask": "causal", "padding": bool}),
    "unbatched": ({}, {"unbatched": True, "mask": bool, "padding": bool}),
    "unbatched-seq-first": ({"batch_first": False}, {"unbatched": True}),
}


def mha_case(kind, L=6, S=6, dtype=torch.float32):
    """(module, inputs, options)"""
    of_module, given = kind
    of_module = {"batch_first": True, **of_module}
    module = nn.MultiheadAttention(32, 4, **of_module, dtype=dtype)
    nn.init.normal_(module.in_proj_bias) if module.in_proj_bias is not None else None
    B, unbatched, memory, options = 3, given.get("unbatched"), given.get("memory"), {}

    def tensor(length, width):
        shape = (length, width) if unbatched else (B, length, width) if module.batch_first else (length, B, width)
        return torch.randn(shape).to(dtype).requires_grad_()

    inputs = [tensor(L, 32)]
    if memory:
        S = 5
        inputs += [tensor(S, 32)] if memory == 32 else [tensor(S, width) for width in memory]
    if given.get("padding"):
        hidden = torch.rand(B, S) < 0.3
        hidden[:, 0] = False
        hidden = hidden[0] if unbatched else hidden
        options["key_padding_mask"] = hidden if given["padding"] is bool else torch.randn(hidden.shape).masked_fill(hidden, -torch.inf)
    if given.get("mask") == "causal":
        options |= {"attn_mask": torch.ones(L, S, dtype=torch.bool).triu(1), "is_causal": True}
    elif given.get("mask"):
        shape = (B * 4, L, S) if given.get("heads") else (L, S)
        hidden = torch.rand(shape) < 0.3
        hidden[..., 0] = False
        options["attn_mask"] = hidden if given["mask"] is bool else torch.randn(shape).masked_fill(hidden, -torch.inf)
    return module, inputs, options


def as_dtype(options, dtype):
    return {k: v.to(dtype) if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in options.items()}


@pytest.mark.parametrize("scope, dtype", [("module", torch.float32), ("module", torch.bfloat16), ("functions", torch.float32)], ids=str)
@pytest.mark.parametrize("kind", MHA.values(), ids=MHA)
def test_multihead_attention(kind, scope, dtype):
    module, inputs, options = mha_case(kind, dtype=dtype)

    def call(m, query, *memory):
        key, value = (memory[0], memory[-1]) if memory else (query, query)
        return m(query, key, value, need_weights=False, **as_dtype(options, query.dtype))[0]

    twin = copy.deepcopy(module)
    if scope == "module":
        swap(twin)
        swapped_call = call
    else:

        def swapped_call(m, *args):
            with swapped() if m is twin else torch.enable_grad():
                return call(m, *args)

    module_judged(module, twin, inputs, swapped_call)
    result, names = ours(swapped_call, twin, *inputs)
    assert names == ["attention_fwd"]
    plain = call(module, *inputs)
    assert result.shape == plain.shape
    for t in (twin, module):  # eval without gradients: PyTorch's has a fast path
        t.eval()
    with torch.no_grad():
        close = {} if dtype == torch.float32 else dict(rtol=0.02, atol=0.02)
        torch.testing.assert_close(swapped_call(twin, *inputs), call(module, *inputs), **close)
        assert ours(swapped_call, twin, *inputs)[1] == ["attention_fwd"]


@pytest.mark.parametrize("average", [True, False])
def test_weights_are_pytorchs(average):
    module, (x,), options = mha_case(MHA["both-bool"])
    expected = module(x, x, x, average_attn_weights=average, **options)
    swap(module)
    result, names = ours(module, x, x, x, average_attn_weights=average, **options)
    assert names == [] and all(map(torch.equal, result, expected))


def test_bad_masks_are_pytorchs():
    module, (x,), _ = mha_case(MHA["self"])
    plain = copy.deepcopy(module)
    swap(module)
    for bad in (
        {"attn_mask": torch.zeros(1, 6, dtype=torch.bool)},  # would broadcast
        {"attn_mask": torch.zeros(4, 6, 6, dtype=torch.bool)},
        {"attn_mask": torch.zeros(6, 6, dtype=torch.int64)},
        {"key_padding_mask": torch.zeros(3, 5, dtype=torch.bool)},
        {"is_causal": True},
    ):
        errors = []
        for m in (plain, module):
            with pytest.raises(Exception) as raised:
                m(x, x, x, need_weights=False, **bad)
            errors.append((raised.type, str(raised.value)))
        assert errors[0] == errors[1]


def test_dropout():
    module = nn.MultiheadAttention(32, 4, dropout=0.5, batch_first=True)
    swap(module)
    x = torch.randn(1, 40, 32)
    torch.manual_seed(1)
    a = module(x, x, x, need_weights=False)[0]
    torch.manual_seed(1)
    b = module(x, x, x, need_weights=False)[0]
    assert torch.equal(a, b) and not torch.equal(a, module(x, x, x, need_weights=False)[0])
    module.eval()
    assert torch.equal(module(x, x, x, need_weights=False)[0], module(x, x, x, need_weights=False)[0])


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("masked", ["", "padding", "mask", "causal-padding"])
@pytest.mark.parametrize("norm_first", [False, True], ids=["post", "pre"])
def test_encoder(norm_first, masked, training):
    layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True, norm_first=norm_first, activation="gelu")
    model, (x, _, padding) = nn.TransformerEncoder(layer, 2).train(training), batch()
    twin = copy.deepcopy(model)
    swap(twin)
    seen = ~padding if "padding" in masked else torch.ones_like(padding)  # what stands at padded places is anyone's guess

    def call(m, x):
        options = {"src_key_padding_mask": padding} if "padding" in masked else {}
        if "mask" in masked:
            options["mask"] = torch.ones(5, 5).triu(2).bool()
        if "causal" in masked:
            options |= {"mask": nn.Transformer.generate_square_subsequent_mask(5).to(x.dtype), "is_causal": True}
        return m(x, **options)[seen]

    module_judged(model, twin, [x.requires_grad_()], call)
    with torch.no_grad():
        out, names = ours(call, twin, x)
        torch.testing.assert_close(out, call(model, x))
    assert names == ["attention_fwd"] * 2


def test_decoder():
    model = nn.TransformerDecoder(nn.TransformerDecoderLayer(32, 4, 64, dropout=0.0, batch_first=True), 2)
    twin = copy.deepcopy(model)
    assert len(swap(twin, strict=True).replaced) == 4
    x, memory, causal = torch.randn(2, 5, 32).requires_grad_(), torch.randn(2, 7, 32), nn.Transformer.generate_square_subsequent_mask(5)
    module_judged(
        model, twin, [x, memory.requires_grad_()], lambda m, x, memory: m(x, memory, tgt_mask=causal.to(x.dtype), tgt_is_causal=True)
    )
    assert ours(twin, x, memory)[1] == ["attention_fwd"] * 4
