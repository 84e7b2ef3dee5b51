"""swap on models of transformers: a step of GPT-2 beside the same model as it was, and what a swapped attention call costs."""

import copy
from functools import cache, partial
from typing import NamedTuple

import pytest
import torch

import minkernels
from bench.timing import max_error


class Case(NamedTuple):
    name: str
    layers: int
    width: int
    heads: int
    vocab: int
    batch: int
    T: int
    dtype: torch.dtype
    linear: bool = False  # swap(..., linear_cross_entropy=True)

    def __str__(self):
        return f"{self.name}-{self.batch}x{self.T}-{str(self.dtype).removeprefix('torch.')}{'-linear' if self.linear else ''}"


class Call(NamedTuple):
    kind: str
    T: int
    dtype: torch.dtype

    def __str__(self):
        return f"{self.kind}-{self.T}"


def both(*sizes):
    return [Case(*sizes, linear) for linear in (False, True)]


SMALL = "gpt2-small", 12, 768, 12, 50257
IMPLS = ["minkernels", "unswapped"]  # eager, on F.scaled_dot_product_attention; of a call: attention itself
CASES = {
    "cpu": [*both("gpt2-slice", 2, 768, 12, 50257, 2, 256, torch.bfloat16), *both(*SMALL, 4, 512, torch.bfloat16)],
    "cuda": both(*SMALL, 8, 1024, torch.bfloat16),
    "tiny": both("tiny", 1, 16, 2, 17, 2, 8, torch.float32),
}
KINDS = "causal", "padded", "window", "bidirectional"
CALLS = {"cpu": [Call(kind, 5, torch.float32) for kind in KINDS], "cuda": [Call(kind, 256, torch.bfloat16) for kind in KINDS]}
CALLS["tiny"] = CALLS["cpu"][:2]
COUNT = 100  # calls in a sample


def transformers():
    return pytest.importorskip("transformers")


def bench_step(timed, device, case, impl):
    """Forward, loss and backward; the error is the loss's."""

    def build():
        sizes = dict(n_layer=case.layers, n_embd=case.width, n_head=case.heads, vocab_size=case.vocab, n_positions=case.T)
        config = transformers().GPT2Config(**sizes, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False, bos_token_id=0)
        config.eos_token_id = 0
        plain = transformers().GPT2LMHeadModel(config).to(device, case.dtype)
        ids = torch.randint(case.vocab, (case.batch, case.T), device=device)
        mask = torch.ones_like(ids)

        def step(model):
            loss = model(input_ids=ids, attention_mask=mask, labels=ids).loss
            loss.backward()
            model.zero_grad(set_to_none=True)
            return (loss.detach(),)

        @cache
        def exact():  # one sequence at a time, for the memory; every label counts, so the means may be averaged
            with torch.no_grad():
                model = copy.deepcopy(plain).double()
                logits = (model(input_ids=row).logits[0, :-1] for row in ids.split(1))
                return (torch.stack([torch.nn.functional.cross_entropy(x, row[1:]) for x, row in zip(logits, ids, strict=True)]).mean(),)

        ours = copy.deepcopy(plain)
        minkernels.swap(ours, linear_cross_entropy=case.linear, strict=True)
        models = {"minkernels": ours, "unswapped": plain}
        return {name: partial(step, model) for name, model in models.items()}, lambda out: max_error(out, exact(), case.dtype)

    rounds = {"min_rounds": 3} if case.layers > 1 else {}
    timed("swapped GPT-2 step", build, shape=(case.batch, case.T), dtype=case.dtype, tokens=case.batch * case.T, **rounds)


def bench_call(timed, device, case, impl):
    """The attention function that transformers calls, beside attention called with what that comes to: what a call costs more."""

    def build():
        from minkernels.swap._hf_attention import attend

        module = torch.nn.Identity()
        transformers()
        module.is_causal = True
        q, k, v = (torch.randn(1, case.T, heads, 8, device=device).to(case.dtype).transpose(1, 2) for heads in (4, 2, 2))
        keys = torch.ones(1, case.T, dtype=torch.bool, device=device)
        masks = {"causal": keys[0, :0], "padded": keys, "window": keys[:, None], "bidirectional": keys[:, None, None]}
        options = {} if case.kind == "causal" else {"key_mask": keys}
        options |= {"window": (3, None)} if case.kind == "window" else {}
        options |= {"causal": case.kind != "bidirectional", "scale": 0.3}

        def repeat(f):
            for _ in range(COUNT):
                out = f()
            return (out,)

        given = {"sliding_window": 4} if case.kind == "window" else {}
        with_mask = partial(attend, module, q, k, v, masks[case.kind], dropout=0.0, scaling=0.3, position_ids=keys, **given)
        impls = {
            "minkernels": partial(repeat, lambda: with_mask()[0]),
            "unswapped": partial(repeat, lambda: minkernels.attention(q, k, v, **options).transpose(1, 2).contiguous()),
        }

        @cache
        def exact():
            return (minkernels.attention(*(t.cpu().double() for t in (q, k, v)), **options | cpu).transpose(1, 2).to(device),)

        cpu = {"key_mask": keys.cpu()} if "key_mask" in options else {}
        return impls, lambda out: max_error(out, exact(), case.dtype)

    timed(f"swapped attention call, x{COUNT}", build, shape=(1, 4, case.T, 8), dtype=case.dtype)


bench_call.cases = CALLS
