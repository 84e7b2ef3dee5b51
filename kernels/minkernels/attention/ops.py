"""Fused attention: what it promises."""

from numbers import Integral

import torch
from torch import Tensor

from minkernels._checks import FLOATS, as_int, check_number, check_tensor, is_dense
from minkernels._library import apply, autocast_dtype, define, needs_grad, once_differentiable, traceable
from minkernels.attention import reference
from minkernels.attention._options import SCHEMA, Options, grads_like, like, lse_like

MAX_HEAD_DIM = 256
TENSORS = 8  # of Options, the first


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool | str = False,
    key_mask: Tensor | None = None,
    kv_lens: Tensor | None = None,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    window: tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(softcap(scale * q @ k.T) + bias, where seen) @ v, without storing the M x N scores.

    Shapes: B batch, H heads, Hkv key heads (H a multiple of it), M queries, N keys, D and Dv head dims (1 to 256).
    Args:
        q: (B, H, M, D) float16, bfloat16, float32, or float64 (CPU only); any strides.
        k: (B, Hkv, N, D), v: (B, Hkv, N, Dv); same dtype and device. Query head h reads key head h // (H // Hkv). Heads come
            before the length: tensors in flash_attn's layout, (B, M, H, D), must be transposed, and are not told apart where they fit.
        causal: query i sees no key after i + N - M: aligned to the bottom right, so that decoding works. "top-left": none after
            i, as is_causal of F.scaled_dot_product_attention has it. Where kv_lens is given, its b-th length stands for N.
        key_mask: (B, N) bool, True where a key may be seen (False is padding: the opposite of PyTorch's key_padding_mask), any pattern.
        kv_lens: (B,) int32 or int64, 0 to N (a ValueError else; on a GPU an assert): keys from there on do not exist. NaN or inf in a
            key or value that key_mask or kv_lens hides reaches nothing.
        mask: bool, True where a query sees a key, any shape that broadcasts to (B, H, M, N).
        bias: float, added to the scores (in nats), any shape that broadcasts to (B, H, M, N); has a gradient.
        window: (left, right): query i sees keys i + off - left to i + off + right, where off is N - M, or 0 for causal="top-left".
            None or a negative number is unbounded.
        softcap: c makes every score c * tanh(score / c), before bias and masks.
        sinks: (H,) a logit for each head that takes part in the softmax without a value, neither scaled nor capped; has a gradient.
        scale: multiplies q @ k.T to give nats; default D ** -0.5.
        dropout_p: the share of probabilities, 0 <= p < 1, that are set to 0, the others divided by 1 - p. The seed comes from
            torch's generator of q's device.
        return_lse: return (o, lse) as well: the log of the sum of exp(scores), sink included, (B, H, M), nats, float32 (float64
            for float64 inputs), differentiable, and not affected by dropout.
    Returns: (B, H, M, Dv) in q.dtype, dense, in q's dimension order (where Dv is not D, batch first, heads and queries as in q).
    A query that sees no key gives zeros, lse = -inf (or the sink), and zero gradients. Deterministic, forward and backward.
    Under autocast q, k and v are cast to the autocast dtype, as F.scaled_dot_product_attention does.
    Raises: ValueError for shapes or values that do not fit; TypeError for mixed or unsupported dtypes and devices.
    Source: FlashAttention-2, Dao 2023, arXiv:2307.08691, algorithms 1 and 2.
    """
    q, k, v = _autocast(q, k, v)
    _check_qkv(q, k, v, 4, "(batch, heads, length, head dim)")
    if key_mask is not None or kv_lens is not None or mask is not None or bias is not None:
        bias, key_mask, kv_lens, mask = _lower_masks(q, k, bias, key_mask, kv_lens, mask)
    lowered = _lower(q, causal, window, softcap, sinks, scale, dropout_p, bias, key_mask, kv_lens, mask)
    return _attend(q, k, v, return_lse, lowered)


def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    max_seqlen_q: int,
    max_seqlen_k: int,
    causal: bool | str = False,
    window: tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """attention of sequences that lie end to end, each query seeing the keys of its own sequence alone.

    Args:
        q: (T, H, D), k: (Tk, Hkv, D), v: (Tk, Hkv, Dv), as those of attention.
        cu_seqlens_q: (sequences + 1,) int32 or int64: sequence b has queries cu_seqlens_q[b] to cu_seqlens_q[b + 1] - 1; it starts
            with 0 and ends with T. cu_seqlens_k: the same for keys. Sequences may be empty, of queries, of keys or of both.
        max_seqlen_q, max_seqlen_k: at least the length of the longest sequence.
        The others: as those of attention, N and M being the keys and queries of the sequence.
    Returns: (T, H, Dv), and with return_lse also lse, (T, H).
    Raises: as attention; for CPU tensors ValueError also if cu_seqlens fall or do not end at the length: on a GPU that is asserted.
    """
    q, k, v = _autocast(q, k, v)
    _check_qkv(q, k, v, 3, "(length, heads, head dim)")
    for name, cu in (("q", cu_seqlens_q), ("k", cu_seqlens_k)):
        count = cu_seqlens_q.numel() if isinstance(cu_seqlens_q, Tensor) else 0
        _check_tensor(f"cu_seqlens_{name}", cu, (max(count, 1),), "({},), at least one", (torch.int32, torch.int64), q)
    longest = as_int("max_seqlen_q", max_seqlen_q, 0), as_int("max_seqlen_k", max_seqlen_k, 0)
    q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))
    packed = _int32(cu_seqlens_q), _int32(cu_seqlens_k), *longest
    result = _attend(q, k, v, return_lse, _lower(q, causal, window, softcap, sinks, scale, dropout_p, None, None, None, None, *packed))
    return (result[0][0].transpose(0, 1), result[1][0].T) if return_lse else result[0].transpose(0, 1)


def _autocast(*tensors):
    """Before they are checked: they may be of several dtypes."""
    if not torch._C._is_any_autocast_enabled():  # before the rest, which most calls need not look at
        return tensors
    if not all(isinstance(t, Tensor) and t.dtype in FLOATS and t.dtype != torch.float64 for t in tensors):
        return tensors
    low = autocast_dtype(tensors[0])
    return tensors if low is None else tuple(t.to(low) for t in tensors)


def _attend(q, k, v, return_lse, options):
    args = traceable(q, k, v, *options)
    o, lse = apply(_Attention, *args) if needs_grad(*args[:5]) else _fwd(*args)
    return (o, lse.to(torch.promote_types(q.dtype, torch.float32))) if return_lse else o


def _lower(
    q, causal, window, softcap, sinks, scale, dropout_p, bias, key_mask, kv_lens, mask,
    cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=0, max_seqlen_k=0,
):  # fmt: skip
    """What attention and attention_varlen share: checked, and everything in the operators' terms."""
    if causal is not True and causal is not False and causal != "top-left":
        raise ValueError(f'causal must be True, False or "top-left", got {causal!r}')
    left = right = None
    if window is not None:
        if not isinstance(window, tuple | list) or len(window) != 2 or not all(n is None or _is_int(n) for n in window):
            raise TypeError(f"window must be two ints or None, (left, right), got {window!r}")
        left, right = (None if n is None or n < 0 or (not isinstance(n, torch.SymInt) and n >= 2**31) else n for n in window)
    if scale is not None:
        check_number("scale", scale)
    if softcap is not None:
        check_number("softcap", softcap)
        if softcap <= 0:
            raise ValueError(f"softcap must be positive, got {softcap}")
    if dropout_p != 0.0:
        check_number("dropout_p", dropout_p)
        if not 0 <= dropout_p < 1:
            raise ValueError(f"dropout_p must be at least 0 and under 1, got {dropout_p}")
    if sinks is not None:
        _check_tensor("sinks", sinks, (q.shape[1],), "(H={},)", FLOATS, q)
        sinks = sinks.to(torch.promote_types(q.dtype, torch.float32)).contiguous()
    seed = torch.randint(2**62, (), device=q.device) if dropout_p else None
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    softcap = 0.0 if softcap is None else min(float(softcap), 1e30)  # as good as none, and finite in log2 units
    return Options(
        bias, sinks, key_mask, kv_lens, mask, cu_seqlens_q, cu_seqlens_k, seed, left, 0 if causal else right, causal == "top-left",
        scale, softcap, float(dropout_p), max_seqlen_q, max_seqlen_k,
    )  # fmt: skip


def _lower_masks(q, k, bias, key_mask, kv_lens, mask):
    (B, H, M), N = q.shape[:3], k.shape[2]
    if key_mask is not None:
        _check_tensor("key_mask", key_mask, (B, N), "(B={}, N={})", (torch.bool,), q)
    if kv_lens is not None:
        _check_tensor("kv_lens", kv_lens, (B,), "(B={},)", (torch.int32, torch.int64), q)
        kv_lens = _int32(kv_lens)
    if mask is not None:
        mask = _four(mask, "mask", (torch.bool,), (B, H, M, N), q)
        if mask.shape[1:3] == (1, 1):  # nothing but keys: those hidden are skipped, not computed and masked
            hides = mask.squeeze((1, 2)).expand(B, N)
            key_mask, mask = hides if key_mask is None else key_mask & hides, None
    if bias is not None:
        bias = _four(bias, "bias", FLOATS, (B, H, M, N), q)
    return bias, key_mask, kv_lens, mask


def _check_qkv(q, k, v, dims, layout):
    for name, t in (("q", q), ("k", k), ("v", v)):
        if not isinstance(t, Tensor) or not is_dense(t) or t.dim() != dims:
            check_tensor(name, t)
            raise ValueError(f"{name} must have {dims} dimensions {layout}, got shape {tuple(t.shape)}")
    dtype, device = q.dtype, q.device
    if dtype not in FLOATS:
        raise TypeError(f"q must be float16, bfloat16, float32 or float64, got {dtype}")
    for name, t in (("k", k), ("v", v)):
        if t.dtype != dtype or t.device != device:
            raise TypeError(f"{name} is {t.dtype} on {t.device}, but q is {dtype} on {device}: they must agree")
    if dtype == torch.float64 and device.type != "cpu":
        raise TypeError(f"float64 runs on the CPU only, got q on {device}")
    q_shape, k_shape, v_shape, heads = q.shape, k.shape, v.shape, 1 if dims == 4 else -2
    D, Dv = q_shape[-1], v_shape[-1]
    if k_shape[-1] != D or (dims == 4 and k_shape[0] != q_shape[0]):
        batch = f"B={q_shape[0]}, heads, length" if dims == 4 else "length, heads"
        raise ValueError(f"k must be ({batch}, D={D}) to fit q {tuple(q_shape)}, got {tuple(k_shape)}")
    if v_shape != k_shape and v_shape[:-1] != k_shape[:-1]:
        raise ValueError(f"v must share all but the head dim with k {tuple(k_shape)}, got {tuple(v_shape)}")
    if k_shape[heads] == 0 or q_shape[heads] % k_shape[heads]:
        raise ValueError(f"q has {q_shape[heads]} heads, no multiple of the {k_shape[heads]} heads of k; q and k must be {layout}")
    if not (1 <= D <= MAX_HEAD_DIM and 1 <= Dv <= MAX_HEAD_DIM):
        raise ValueError(f"the head dims of q and v must be 1 to {MAX_HEAD_DIM}, got {D} and {Dv}")


def _check_tensor(name, t, shape, shown, dtypes, q):
    if isinstance(t, Tensor):
        check_tensor(name, t)  # a nested one has no shape
    if not isinstance(t, Tensor) or t.dtype not in dtypes:
        kinds = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{name} must be a tensor of {kinds}, got {getattr(t, 'dtype', type(t).__name__)}")
    if shape is not None and t.shape != shape:
        raise ValueError(f"{name} must be {shown.format(*shape)}, got {tuple(t.shape)}")
    if t.device != q.device:
        raise TypeError(f"{name} is on {t.device}, but q is on {q.device}")


def _four(t, name, dtypes, full, q):
    """mask or bias in four dimensions, not expanded: a size of 1 stands for all."""
    _check_tensor(name, t, None, "", dtypes, q)
    shape = t.shape if t.dim() >= 4 else (1,) * (4 - t.dim()) + tuple(t.shape)
    for i, n in enumerate(shape):  # any() of a generator takes three times as long
        if i == 4 or (n != 1 and n != full[i]):
            raise ValueError(f"{name} must broadcast to (B, H, M, N) = {tuple(full)}, got {tuple(t.shape)}")
    return t.reshape(shape) if t.dim() < 4 else t


def _int32(lengths):
    """What does not fit stays too large, or negative: it is found where lengths are looked at."""
    return lengths if lengths.dtype == torch.int32 else lengths.clamp(-1, 2**31 - 1).to(torch.int32)


def _is_int(n):
    return isinstance(n, Integral | torch.SymInt) and not isinstance(n, bool)


def _scores_counted(q, v, options):
    """Queries times keys, of shapes. What masks hide is counted, as for F.scaled_dot_product_attention."""
    B, H, M, _ = q
    return B * H * M * (v[2] if Options(*options).cu_seqlens_k is None else min(v[2], Options(*options).max_seqlen_k))


def _fwd_flops(q, k, v, *options, **_):
    return 2 * _scores_counted(q, v, options) * (q[3] + v[3])


def _bwd_flops(do, dlse, q, k, v, o, lse, *options, **_):
    return 2 * _scores_counted(q, v, options[:-1]) * (3 * q[3] + 2 * v[3])


_fwd = define(
    "attention_fwd",
    f"(Tensor q, Tensor k, Tensor v, {SCHEMA}) -> (Tensor o, Tensor lse)",
    fake=lambda q, k, v, *_: (like(q, v.shape[-1]), lse_like(q)),
    reference=reference.fwd,
    cpu=None,
    cuda="minkernels.attention._triton:fwd",
    flops=_fwd_flops,
)
_bwd = once_differentiable(
    define(
        "attention_bwd",
        f"(Tensor do, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, {SCHEMA}, bool bias_grad)"
        " -> (Tensor dq, Tensor dk, Tensor dv, Tensor dbias, Tensor dsinks)",
        fake=lambda do, dlse, q, k, v, o, lse, bias, sinks, *rest: grads_like(q, k, v, bias, sinks, rest[-1]),
        reference=reference.bwd,
        cpu=None,
        cuda="minkernels.attention._triton:bwd",
        flops=_bwd_flops,
    )
)


class _Attention(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(q, k, v, *options):
        return _fwd(q, k, v, *options)

    @staticmethod
    def setup_context(ctx, inputs, output):
        q, k, v, *options = inputs
        ctx.save_for_backward(q, k, v, *output, *options[:TENSORS])  # p is rebuilt from lse, so nothing M x N is kept
        ctx.numbers = options[TENSORS:]
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, do, dlse):
        if do is None and dlse is None:
            return (None,) * (3 + len(Options._fields))
        q, k, v, o, lse, bias, sinks, *tensors = ctx.saved_tensors
        do = torch.zeros_like(o) if do is None else do
        bias_grad = ctx.needs_input_grad[3]
        dq, dk, dv, dbias, dsinks = _bwd(do, dlse, q, k, v, o, lse, bias, sinks, *tensors, *ctx.numbers, bias_grad)
        dsinks = None if sinks is None else dsinks
        return dq, dk, dv, dbias if bias_grad else None, dsinks, *(None,) * (len(Options._fields) - 2)
