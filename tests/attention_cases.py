"""Attention's cases, shared by the tests of its backends: shapes, options, the textbook formula, and the comparison with fp64."""

import math

import torch

from judge import assert_close
from minkernels.attention import _options, reference
from minkernels.attention._options import Options

SHAPES = {  # B, H, Hkv, M queries, N keys, D, Dv; the C++ kernels work on tiles of 6 rows, blocks of 48 or 96 queries, 64, 128 or 256 keys
    "one-token": (1, 1, 1, 1, 1, 16, 16),
    "ragged-tail": (2, 3, 3, 70, 70, 64, 64),  # two blocks of queries, the first not a whole number of tiles
    "decoding": (1, 2, 2, 1, 515, 128, 128),  # one row has a tile of its own; several steps of keys, the last of 3
    "grouped": (2, 4, 2, 5, 33, 24, 24),  # two heads share keys; D is no multiple of a register
    "more-keys": (1, 2, 1, 130, 200, 96, 80),  # Dv differs from D
    "more-queries": (1, 2, 2, 200, 130, 128, 128),  # causal: the first 70 queries see nothing
    "odd-dims": (2, 2, 2, 97, 97, 33, 17),  # bfloat16 words of two: the last one is half empty
    "widest": (1, 1, 1, 150, 150, 256, 256),
    "one-key": (2, 2, 2, 49, 1, 7, 7),
    "narrowest": (1, 2, 1, 20, 30, 1, 1),
    "few-queries": (1, 2, 2, 4, 515, 64, 64),
    "group-of-eight": (1, 8, 1, 1, 1100, 64, 64),  # eight heads in one task, whose keys are split in two
    "short-and-long": (1, 1, 1, 20, 1300, 16, 16),  # too many rows to stream; split
    "tiny": (3, 4, 4, 6, 6, 16, 16),  # to 128 tokens: whole heads, here several a task
    "short": (2, 6, 2, 15, 21, 40, 40),  # three heads are rows of one task; the last register of D is half full
    "one-head": (2, 1, 1, 112, 96, 64, 32),  # rows lie one after the other, so they are read in place
    "longest-whole": (1, 2, 1, 128, 128, 24, 64),
    "no-queries": (1, 1, 1, 0, 5, 8, 8),
    "no-keys": (1, 1, 1, 5, 0, 8, 8),
}


def make(B, H, Hkv, M, N, D, Dv, dtype=torch.float32):
    """q, k, v as views of (B, length, heads, dim)."""
    return [torch.randn(B, T, h, d).to(dtype).transpose(1, 2) for T, h, d in ((M, H, D), (N, Hkv, D), (N, Hkv, Dv))]


def holes(B, N):
    """A key_mask with holes, whose last row hides everything if there are two."""
    key_mask = torch.rand(B, N) > 0.4
    key_mask[1:] &= torch.arange(B)[1:, None] < B - 1
    return key_mask


def lengths(B, N):
    """kv_lens: none, or at least 8 if there are as many; of fewer the plain formula's error, which sets the budget, is too much luck."""
    n = torch.randint(0, N + 1, (B,), dtype=torch.int32)
    return torch.where(n > 0, n.clamp(min=min(N, 8)), 0).to(torch.int32)


def packed(lengths):
    """cu_seqlens."""
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)


def float_bias(*shape, dtype=torch.float32):
    """Some of it -inf, which is how a float mask hides."""
    return torch.randn(shape).masked_fill(torch.rand(shape) < 0.1, -math.inf).to(dtype)


def combined(B, H, M, N, dtype):
    """Everything at once."""
    return dict(
        bias=float_bias(1, H, M, N, dtype=dtype), sinks=torch.randn(H), kv_lens=lengths(B, N),
        key_mask=torch.rand(B, N) > 0.2, mask=torch.rand(B, 1, M, N) > 0.2, left=N // 2, right=0, softcap=2.0, dropout_p=0.2,
    )  # fmt: skip


OPTIONS = {  # name: (B, H, M, N, dtype) -> Options by name
    "full": lambda B, H, M, N, dtype: {},
    "causal": lambda B, H, M, N, dtype: dict(right=0),
    "top-left": lambda B, H, M, N, dtype: dict(right=0, top_left=True),
    "padded": lambda B, H, M, N, dtype: dict(key_mask=holes(B, N)),
    "padded-causal": lambda B, H, M, N, dtype: dict(key_mask=holes(B, N), right=0),
    "left-padded": lambda B, H, M, N, dtype: dict(key_mask=torch.arange(N) >= N - lengths(B, N)[:, None], right=0),
    "kv-lens": lambda B, H, M, N, dtype: dict(kv_lens=lengths(B, N)),
    "kv-lens-causal": lambda B, H, M, N, dtype: dict(kv_lens=lengths(B, N), right=0),
    "window": lambda B, H, M, N, dtype: dict(left=7, right=3),
    "window-causal": lambda B, H, M, N, dtype: dict(left=11, right=0),
    "window-left": lambda B, H, M, N, dtype: dict(left=20),
    "window-padded": lambda B, H, M, N, dtype: dict(left=9, right=9, key_mask=holes(B, N), top_left=True),
    "mask": lambda B, H, M, N, dtype: dict(mask=torch.rand(B, 1, M, N) > 0.5),
    "mask-blocks": lambda B, H, M, N, dtype: dict(mask=(torch.arange(M)[:, None] // 70 == torch.arange(N) // 70)[None, None]),
    "bias": lambda B, H, M, N, dtype: dict(bias=float_bias(B, H, M, N, dtype=dtype)),
    "bias-of-heads": lambda B, H, M, N, dtype: dict(bias=torch.randn(1, H, M, N), right=0),
    "bias-of-keys": lambda B, H, M, N, dtype: dict(bias=torch.randn(B, 1, 1, N).to(dtype), kv_lens=lengths(B, N)),
    "bias-of-queries": lambda B, H, M, N, dtype: dict(bias=torch.randn(1, 1, M, 1), sinks=torch.randn(H)),
    "bias-of-all": lambda B, H, M, N, dtype: dict(bias=torch.randn(1, 1, M, N), key_mask=holes(B, N)),
    "softcap": lambda B, H, M, N, dtype: dict(softcap=1.5, right=0),
    "sinks": lambda B, H, M, N, dtype: dict(sinks=torch.randn(H), key_mask=holes(B, N)),
    "dropout": lambda B, H, M, N, dtype: dict(dropout_p=0.3),
    "dropout-padded": lambda B, H, M, N, dtype: dict(dropout_p=0.3, key_mask=holes(B, N), right=0),
    "combined": combined,
}  # fmt: skip


def options(name, q, k, scale=None):
    """The Options called name, for these q and k."""
    B, H, M, D = q.shape
    chosen = OPTIONS[name](B, H, M, k.shape[2], q.dtype)
    if "sinks" in chosen:
        chosen["sinks"] = chosen["sinks"].to(torch.promote_types(q.dtype, torch.float32))
    if "dropout_p" in chosen:
        chosen["seed"] = torch.randint(2**62, ())
    return Options(**chosen, scale=D**-0.5 if scale is None else scale)


def move(t, *where):
    """A tensor, or the tensors in a tuple, moved or cast (floats alone, if to a dtype)."""
    if isinstance(t, tuple):
        moved = (move(x, *where) for x in t)
        return Options(*moved) if isinstance(t, Options) else tuple(moved)
    if not isinstance(t, torch.Tensor) or (isinstance(where[0], torch.dtype) and not t.is_floating_point()):
        return t
    return t.to(*where)


def plain(q, k, v, x):
    """The textbook formula, rounded to q.dtype after every step: what the error budget is measured against. Returns o, lse, p."""
    k, v = reference._heads(k, q, x), reference._heads(v, q, x)
    s = q @ k.mT * x.scale
    if x.softcap:
        s = (s / x.softcap).tanh() * x.softcap
    s = s if x.bias is None else s + x.bias.to(s.dtype)
    s = s.masked_fill(~reference._seen(q, k, x), -math.inf)
    if x.sinks is not None:
        s = torch.cat([s, x.sinks[:, None, None].to(s.dtype).expand(*s.shape[:3], 1)], -1)
    p = s.softmax(-1).nan_to_num()[..., : k.shape[2]]
    p = p * reference._kept(q, k, x) / (1 - x.dropout_p) if x.dropout_p else p
    return p @ v, s.logsumexp(-1)


def plain_backward(do, dlse, q, k, v, x, o, lse):
    """The textbook gradients of FlashAttention-2, which keep no M x N intermediate: delta, from the rounded o, takes its place."""
    group = q.shape[1] // k.shape[1]
    k_, v_ = reference._heads(k, q, x), reference._heads(v, q, x)
    s = q @ k_.mT * x.scale
    slope = 1.0
    if x.softcap:
        t = (s / x.softcap).tanh()
        s, slope = t * x.softcap, 1 - t * t
    s = s if x.bias is None else s + x.bias.to(s.dtype)
    p = (s.masked_fill(~reference._seen(q, k, x), -math.inf) - lse.to(s.dtype)[..., None]).exp().nan_to_num()
    kept = reference._kept(q, k, x).to(s.dtype) / (1 - x.dropout_p) if x.dropout_p else 1.0
    delta = (do * o).sum(-1) - dlse.to(s.dtype)
    ds = p * (kept * (do @ v_.mT) - delta[..., None])
    dbias = () if x.bias is None else (ds.sum_to_size(x.bias.shape),)
    dsinks = () if x.sinks is None else (-((x.sinks[:, None] - lse).exp().nan_to_num() * delta).sum((0, 2)),)
    ds = ds * slope * x.scale
    dk, dv = ((t.mT @ y).unflatten(1, (-1, group)).sum(2) for t, y in ((ds, q), (p * kept, do)))
    return ds @ k_, dk, dv, *dbias, *dsinks


def gradients(function, inputs, *douts):
    """Of what function(*inputs) returns, one tensor or several, by autograd."""
    inputs = [t.detach().clone().requires_grad_() for t in inputs]
    outputs = function(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return torch.autograd.grad(outputs, inputs, douts, materialize_grads=True)


def plant(q, k, v, x):
    """k, v and bias with NaN and inf in every slot that is masked for everybody who could read it."""
    hidden = torch.zeros(k.shape[0], k.shape[2], dtype=torch.bool)
    if x.key_mask is not None:
        hidden |= ~x.key_mask
    if x.kv_lens is not None:
        hidden |= torch.arange(k.shape[2]) >= x.kv_lens[:, None]
    if x.bias is not None:
        seen = reference._seen(q, k, x).expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2])
        x = x._replace(bias=x.bias.masked_fill(seen.double().sum_to_size(x.bias.shape) == 0, math.nan))
    hidden = hidden[:, None, :, None]
    return k.masked_fill(hidden, math.nan), v.masked_fill(hidden, math.inf), x


def check(fwd, bwd, q, k, v, x, *, runs=("",), draws=1, device="cpu", lay_out=lambda t: t):
    """A backend's o, lse, dq, dk, dv, dbias and dsinks against fp64, once for each of runs (whose names the messages hold)."""
    dtype, wide_plain = q.dtype, torch.promote_types(q.dtype, torch.float32)
    differentiable = [n for n in ("bias", "sinks") if getattr(x, n) is not None]
    k_, v_, x_ = plant(q, k, v, x)
    if x.bias is not None:  # autograd makes NaN of a row whose every bias is -inf, and not of one whose every key is masked
        hides = x.bias.isneginf()
        x = x._replace(bias=x.bias.masked_fill(hides, 0.0), mask=~hides if x.mask is None else x.mask & ~hides)

    def attend(function):
        """function(q, k, v, x) as one of q, k, v, bias, sinks, as far as there are any."""
        return lambda q, k, v, *rest: function(q, k, v, x._replace(**dict(zip(differentiable, rest, strict=True))))

    inputs = [q, k, v, *(getattr(x, n) for n in differentiable)]
    wide = [t.double() for t in inputs]
    exact = attend(lambda q, k, v, x: reference.fwd(q, k, v, *x))(*wide)
    do, dlse = torch.randn(exact[0].shape).to(dtype), torch.randn(exact[1].shape).masked_fill(exact[1].isneginf(), 0.0)
    if k.shape[2] == 1:  # dlse alone would be the gradient of such a softmax, and small next to the sums that cancel
        dlse.zero_()
    exact = *exact, *gradients(attend(lambda q, k, v, x: reference.fwd(q, k, v, *x)), wide, do.double(), dlse.double())
    plains = []
    for order in ([], [-1]):  # the sums over the head dim forwards and backwards
        *flipped, do_ = (t.flip(order) for t in (q, k, v, do))
        some = [*flipped, *inputs[3:]]
        o = attend(plain)(*some)[0]
        lse = attend(plain)(*(t.to(torch.promote_types(t.dtype, wide_plain)) for t in some))[1]
        grads = gradients(lambda *t: attend(plain)(*t), some, do_, dlse.to(attend(plain)(*some)[1].dtype))
        plains.append([o.flip(order), lse, *(g.flip(order) for g in grads[:3]), *grads[3:]])
    plains.append([*plains[0][:2], *plain_backward(do, dlse, q, k, v, x, *plains[0][:2])])
    biggest = [t.abs().max() if t.numel() else 0.0 for t in (do, v, q, k)]
    cancelled = biggest[0] * biggest[1] * max(1.0, abs(x.scale) * max(biggest[2:]))

    dlse = dlse.masked_fill(exact[1].isneginf(), math.nan)  # of a query that sees no key nothing from above counts
    do, dlse, q_, k_, v_, x_ = (move(t, device) for t in (do, dlse, q, k_, v_, x_))
    do, q_, k_, v_ = (lay_out(t) for t in (do, q_, k_, v_))
    names = ["o", "lse", "dq", "dk", "dv", *("d" + n for n in differentiable)]
    for run in runs:
        o, lse = fwd(q_, k_, v_, *x_)
        grads = bwd(do, dlse.to(lse.dtype), q_, k_, v_, o, lse, *x_, x.bias is not None)
        fakes = _options.grads_like(q_, k_, v_, x_.bias, x_.sinks, x.bias is not None)
        fakes = _options.like(q_, v_.shape[-1]), _options.lse_like(q_), *fakes
        for name, a, fake in zip(("o", "lse", "dq", "dk", "dv", "dbias", "dsinks"), (o, lse, *grads), fakes, strict=True):
            assert (a.dtype, a.shape, a.stride()) == (fake.dtype, fake.shape, fake.stride()), f"{run} {name}: not what the fake promises"
        actual = o, lse, *grads[:3], *grads[3 if x.bias is not None else 4 : 5 if x.sinks is not None else 4]
        for name, a, e, *p in zip(names, actual, exact, *plains, strict=True):
            judged = wide_plain if name in ("lse", "dsinks") else x.bias.dtype if name == "dbias" else dtype
            assert_close(a.cpu(), p, e, judged, f"{run} {name}", cancelled if name[0] == "d" else 0.0, draws)


def check_hidden_row(fwd, bwd, M, least, dtype, device="cpu", what=""):
    """A row whose bias is one large negative number gives the mean of v, and where it is in no loss reaches no gradient."""
    q, k, v = (t.to(device) for t in make(1, 2, 2, M, M, 8, 8, dtype))
    bias = torch.zeros(1, 1, M, M, dtype=torch.promote_types(dtype, torch.float32), device=device)
    bias[0, 0, 1] = least
    do = torch.randn(1, 2, M, 8, device=device).to(dtype)
    do[:, :, 1] = 0
    x, close = Options(bias=bias, scale=8**-0.5), 1e-2 if dtype.itemsize == 2 else 1e-4
    o, lse = fwd(q, k, v, *x)
    mean = v.double().mean(2)
    assert ((o[:, :, 1].double() - mean).abs() <= 4 * torch.finfo(dtype).eps * v.abs().max()).all(), what
    shown = x._replace(mask=(bias == 0).expand(1, 1, M, M))
    for grad, expected in zip(*(bwd(do, None, q, k, v, o, lse, *options, True)[:4] for options in (x, shown)), strict=True):
        torch.testing.assert_close(grad, expected, rtol=close, atol=close / 10)
