"""Attention on a GPU, in plain Triton: launchers, and the tiles that they launch. _triton_fwd.py and _triton_bwd.py hold the kernels.

A kernel owns one tile of a sequence and streams the tiles of the other past it, in two passes: those that are seen whole,
then the edges, where a band, a mask of keys or the end of the sequence cuts and alone is paid for.
"""

import functools
import math

import torch
import triton

from minkernels._triton_launch import cdiv, next_power_of_2, processors
from minkernels._triton_math import ASSERT, FUSED
from minkernels.attention._options import Options, grads_like, like, lse_like, row_deltas, sinks_grad
from minkernels.attention._triton_bwd import _dbias_kernel, _dkdv_kernel, _dq_kernel
from minkernels.attention._triton_fwd import _fwd_kernel, _merge_kernel

L2_BYTES = 2**25  # keys and values that stay in the L2 cache (40 MB on an A100, 50 on an H100)
FEW_QUERIES = 16  # up to so many, as in decoding, the heads that share a key head share a tile, and the keys are split
SPLIT_KEYS = 256  # at least, to a part
MOST_PARTS = 128
DBIAS_PROGRAMS = 256  # enough to fill a GPU
LOG2E = math.log2(math.e)

# how the architecture's name begins: (kernel, bytes of an element): {head dims up to: (BLOCK_M, BLOCK_N, num_warps, num_stages)}. The row
# of 512 is for head dims to 256 with options that take registers too.
TILES = {
    "any": {  # within the 99 KB of shared memory that every NVIDIA GPU since sm_80 has
        ("fwd", 2): {64: (128, 64, 8, 3), 128: (128, 32, 8, 3), 256: (64, 32, 8, 2)},
        ("dq", 2): {64: (128, 64, 8, 2), 96: (64, 32, 8, 2), 128: (64, 64, 8, 2), 256: (32, 32, 4, 2)},
        ("dkdv", 2): {64: (64, 128, 8, 2), 96: (32, 128, 8, 2), 128: (64, 64, 8, 2), 256: (32, 32, 8, 2)},
        ("dbias", 2): {64: (32, 32, 4, 1), 128: (32, 32, 8, 1), 256: (16, 32, 4, 1)},
        ("decode", 2): {64: (64, 64, 4, 3), 96: (64, 32, 8, 2), 128: (64, 64, 4, 2), 256: (32, 32, 4, 2)},
        ("fwd", 4): {64: (64, 32, 8, 2), 128: (32, 32, 8, 1), 256: (32, 16, 8, 1)},
        ("dq", 4): {64: (64, 32, 8, 2), 128: (32, 16, 8, 2), 256: (16, 16, 8, 2)},
        ("dkdv", 4): {64: (32, 32, 8, 1), 128: (16, 16, 8, 2), 256: (16, 16, 8, 1)},
        ("dbias", 4): {64: (32, 32, 8, 1), 256: (16, 16, 8, 1)},
        ("decode", 4): {96: (32, 32, 8, 2), 128: (16, 16, 8, 2), 256: (16, 16, 8, 1)},
    },
    "sm_90": {  # within 227 KB; fp32, which uses no tensor core, is as above
        ("fwd", 2): {64: (128, 64, 8, 3), 128: (128, 128, 8, 2), 256: (128, 32, 8, 2)},
        ("dq", 2): {64: (128, 64, 8, 3), 128: (128, 64, 8, 2), 256: (128, 32, 8, 2), 512: (64, 32, 8, 2)},
        ("dkdv", 2): {64: (64, 128, 8, 3), 128: (64, 128, 8, 2), 256: (64, 32, 8, 2), 512: (32, 32, 8, 2)},
    },
    "sm_10": {  # every Blackwell with tcgen05: sm_100, sm_103
        ("fwd", 2): {128: (128, 64, 8, 2), 256: (64, 32, 8, 2)},
        ("dq", 2): {64: (128, 64, 8, 2), 96: (64, 32, 8, 2), 128: (64, 64, 8, 2), 256: (64, 32, 8, 2), 512: (32, 32, 8, 2)},
        ("fwd", 4): {128: (32, 32, 8, 1), 256: (32, 16, 8, 1)},  # from 64 rows on Triton takes TF32, whatever input_precision says
        ("dq", 4): {64: (32, 32, 8, 2), 128: (32, 16, 8, 2), 256: (16, 16, 8, 2)},
    },
    "gfx": {  # within the 64 KB of gfx942; four warps of 64 threads may have 512 registers each, eight have 256
        ("fwd", 2): {64: (128, 64, 4, 2), 128: (128, 32, 8, 2), 256: (64, 32, 4, 1)},
        ("dq", 2): {64: (64, 32, 4, 2), 128: (64, 32, 4, 2), 256: (32, 32, 4, 1)},
        ("dkdv", 2): {64: (32, 64, 4, 1), 128: (32, 64, 4, 1), 256: (16, 32, 4, 1)},
        ("dbias", 2): {64: (64, 64, 8, 1), 128: (32, 64, 4, 1), 256: (32, 32, 4, 1)},
        ("dq", 4): {64: (32, 32, 4, 1), 128: (32, 16, 8, 2), 256: (16, 16, 4, 2)},
        ("dkdv", 4): {64: (32, 32, 4, 1), 128: (16, 16, 8, 2), 256: (16, 16, 4, 1)},
    },
}
if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 8):
    TILES["sm_90"]["fwd", 2] |= {128: (128, 64, 8, 3)}  # there the wider ones spill
    TILES["sm_90"]["dkdv", 2] |= {128: (64, 64, 8, 2)}
    TILES["any"]["dq", 2] |= {256: (32, 32, 8, 2)}


def fwd(q, k, v, *options):
    x = Options(*options)
    H, (Hkv, _, Dv) = q.shape[1], v.shape[1:]
    sequences, M, N = _sizes(q, k, x)
    o, lse = like(q, Dv), lse_like(q)
    few = M <= FEW_QUERIES
    fold = H // Hkv if few else 1
    config = _config("decode" if few else "fwd", q, Dv, x)
    if few:
        config["BLOCK_M"] = min(config["BLOCK_M"], max(16, next_power_of_2(M * fold)))
    programs, part = cdiv(M * fold, config["BLOCK_M"]) * sequences * H // fold, lse.numel()
    parts = min(processors(q.device) * 2 // max(1, programs), N // SPLIT_KEYS, MOST_PARTS) if few else 1
    split, out = parts > 1, (o, lse)
    if split:
        out = q.new_empty((parts, *o.shape), dtype=torch.float32), lse.new_empty((parts, *lse.shape))
    with torch.cuda.device_of(q):
        _fwd_kernel[programs, max(1, parts)](
            q, k, v, *out, **_tensors(x), Sinks=x.sinks,
            q_strides=q.stride(), k_strides=k.stride(), v_strides=v.stride(), o_strides=out[0].stride()[-4:], **_strides(x),
            **_extent(q, k, x, H // fold, k, v), **_numbers(q, k, x), parts=max(1, parts), part=part,
            scale_log2=max(abs(_inner(x)), 2.0**-126),  # not 0 in fp32: 0 * -inf is NaN
            SIGN=(x.scale > 0) - (x.scale < 0), UNIT=_unit(q, k, v), FOLD=fold, SPLIT=split, **config,
        )  # fmt: skip
        if split:
            _merge_kernel[(part,)](
                *out, o, lse, o.stride(), H, q.shape[2], parts, part,
                Dv=Dv, BLOCK_DV=next_power_of_2(Dv), BLOCK_PARTS=MOST_PARTS, TURN=16, num_warps=4, **FUSED,
            )  # fmt: skip
    return o, lse


def bwd(do, dlse, q, k, v, o, lse, *options):
    *options, bias_grad = options
    x, H, Hkv, Dv = Options(*options), q.shape[1], k.shape[1], v.shape[3]
    sequences, M, N = _sizes(q, k, x)
    dq, dk, dv, dbias, dsinks = grads_like(q, k, v, x.bias, x.sinks, bias_grad)
    shared = bias_grad and x.bias.shape != (*q.shape[:3], k.shape[2])
    full = dbias.zero_() if bias_grad and not shared else None  # zero: what no query sees is not visited
    config = _config("dq", q, Dv, x)
    tiles, rows = cdiv(M, config["BLOCK_M"]), q.shape[2]
    pad = 0 if x.cu_seqlens_q is None else config["BLOCK_M"]
    stats = q.new_empty((3, q.shape[0], H, rows + sequences * pad if pad else tiles * config["BLOCK_M"]), dtype=torch.float32)
    lse2, rest, delta = stats[0], stats[1] if q.dtype == torch.float32 else None, stats[2]
    strides = dict(do_strides=do.stride(), q_strides=q.stride(), k_strides=k.stride(), v_strides=v.stride(), **_strides(x))
    numbers = dict(stats_stride=stats.stride(2), scale_log2=_inner(x), **_numbers(q, k, x))
    kept, unit = (lse2, rest, delta), _unit(do, q, k, v)
    with torch.cuda.device_of(q):
        _dq_kernel[(tiles * sequences * H,)](
            do, None if dlse is None else dlse.contiguous(), q, k, v, o, lse.contiguous(), dq, full, *kept,
            **_tensors(x), **strides, o_strides=o.stride(), dq_strides=dq.stride(), dbias_strides=_shared(full),
            **_extent(q, k, x, H, k, v), **numbers, pad=pad, scale=x.scale, UNIT=unit, **config,
        )  # fmt: skip
        config = _config("dkdv", q, Dv, x)
        _dkdv_kernel[(cdiv(N, config["BLOCK_N"]) * sequences * Hkv,)](
            do, q, k, v, dk, dv, *kept, **_tensors(x), **strides, dk_strides=dk.stride(), dv_strides=dv.stride(),
            **_extent(q, k, x, Hkv, q, do), **numbers, pad=pad, scale=x.scale, UNIT=unit, **config,
        )  # fmt: skip
        if shared:
            _dbias(dbias, do, q, k, v, *kept, x, strides, numbers)
    if x.sinks is not None:
        deltas = row_deltas(do, o, dlse, lse, x.sinks.dtype) if pad else delta[:, :, :rows]  # of packed sequences they lie apart
        dsinks.copy_(sinks_grad(deltas, lse, x.sinks))
    return dq, dk, dv, dbias, dsinks


def _dbias(dbias, do, q, k, v, lse2, rest, delta, x, strides, numbers):
    """The gradient of a bias that something shares."""
    (B, H, M, _), N, own = q.shape, k.shape[2], dbias.shape
    config = _config("dbias", q, v.shape[3], x)
    tiles_m, tiles_n = cdiv(M, config["BLOCK_M"]), cdiv(N, config["BLOCK_N"])
    programs = own[0] * own[1] * cdiv(own[2], config["BLOCK_M"]) * cdiv(own[3], config["BLOCK_N"])
    turns = dict(
        turns_b=B if own[0] == 1 else 1, turns_h=H if own[1] == 1 else 1,
        turns_m=tiles_m if own[2] == 1 else 1, turns_n=tiles_n if own[3] == 1 else 1,
    )  # fmt: skip
    parts = max(1, min(DBIAS_PROGRAMS // max(1, programs), math.prod(turns.values())))
    out = dbias if parts == 1 else q.new_empty((parts, *own), dtype=torch.float32)
    _dbias_kernel[programs, parts](
        do, q, k, v, out, lse2, rest, delta, **_tensors(x), **strides,
        H=H, Hkv=k.shape[1], M=M, N=N, bias_h=own[1], bias_m=own[2], bias_n=own[3], **turns, parts=parts, part=dbias.numel(),
        **numbers, SHARED_M=own[2] == 1, SHARED_N=own[3] == 1, **config,
    )  # fmt: skip
    if parts > 1:
        dbias.copy_(out.sum(0))


def _sizes(q, k, x):
    """How many sequences, and the queries and keys of the longest."""
    if x.cu_seqlens_q is None:
        return q.shape[0], q.shape[2], k.shape[2]
    sequences = x.cu_seqlens_q.numel() - 1
    for name, t, longest in (("q", q, x.max_seqlen_q), ("k", k, x.max_seqlen_k)):
        if sequences * longest < t.shape[2]:  # kernels assert the rest, but of no sequences, or of length 0, none runs
            held = f"{sequences} sequences of up to max_seqlen_{name}={longest}"
            raise ValueError(f"cu_seqlens_{name} must end at {t.shape[2]}, the length of {name}, and cannot: it holds {held}")
    return sequences, min(x.max_seqlen_q, q.shape[2]), min(x.max_seqlen_k, k.shape[2])


def _extent(q, k, x, heads, read, also):
    """Sizes for a kernel with programs for so many heads of each sequence, which read two tensors between them."""
    sequences, M, N = _sizes(q, k, x)
    at_once = min(sequences * heads, sequences * heads * L2_BYTES // max(1, read.nbytes + also.nbytes))  # their part stays in the L2 cache
    return dict(
        H=q.shape[1], Hkv=k.shape[1], M=M, N=N, rows=q.shape[2], cols=k.shape[2], heads=sequences * heads, heads_at_once=max(1, at_once),
    )  # fmt: skip


def _tensors(x):
    cu_q, cu_k, kv_lens = (t if t is None else t.contiguous() for t in (x.cu_seqlens_q, x.cu_seqlens_k, x.kv_lens))
    seed = x.seed if x.dropout_p else None
    return dict(Bias=x.bias, KeyMask=x.key_mask, KvLens=kv_lens, Mask=x.mask, CuQ=cu_q, CuK=cu_k, Seed=seed)


def _strides(x):
    key_strides = (0, 0) if x.key_mask is None else x.key_mask.stride()
    return dict(bias_strides=_shared(x.bias), mask_strides=_shared(x.mask), key_strides=key_strides)


def _shared(t):
    """Strides that repeat what has size 1."""
    return (0, 0, 0, 0) if t is None else tuple(stride if n > 1 else 0 for n, stride in zip(t.shape, t.stride(), strict=True))


def _numbers(q, k, x):
    drop = min(round(x.dropout_p * 2**32), 2**32 - 1)
    everything = q.shape[2] + k.shape[2]  # a wider band is none, and might pass 2**31
    return dict(
        left=None if x.left is None else min(x.left, everything), right=None if x.right is None else min(x.right, everything),
        cap_log2=x.softcap * LOG2E if x.softcap else None, drop=drop - 2**32 if drop >= 2**31 else drop,  # 32 bits, signed
        keep_scale=1 / (1 - x.dropout_p), TOP_LEFT=x.top_left,
    )  # fmt: skip


def _inner(x):
    """scale_log2 of scores()."""
    return x.scale / x.softcap if x.softcap else x.scale * LOG2E


def _config(kernel, q, Dv, x):
    """What a kernel is compiled for: tiles from the table, and head dims as tl.dot takes them."""
    heavy = x.bias is not None or x.mask is not None or x.dropout_p > 0 or x.softcap > 0
    lengths = x.kv_lens is not None or x.cu_seqlens_q is not None
    return dict(_config_for(_arch(q.device), kernel, q.element_size(), q.shape[3], Dv, heavy, lengths))


@functools.cache
def _config_for(arch, kernel, element_size, D, Dv, heavy, lengths):
    DIMS, VDIMS = _dims(D), _dims(Dv)
    width = max(sum(DIMS[1:]), sum(VDIMS[1:]))
    if kernel != "dbias" and heavy:
        width = 256 if width <= 128 else 512  # what they load and compute takes registers too
    BLOCK_M, BLOCK_N, num_warps, num_stages = _tiles(arch, kernel, element_size, width)
    options = dict(num_warps=num_warps, num_stages=num_stages, **FUSED)
    if (kernel == "dq" and arch in ("sm_86", "sm_89")) or (element_size == 4 and kernel != "dbias" and not arch.startswith("gfx")):
        options["maxnreg"] = 255  # all there are; else ptxas spills here, to make room for programs that never come; dbias spills with it
    if lengths:
        options |= ASSERT
    return dict(DIMS=DIMS, VDIMS=VDIMS, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N) | options


def _tiles(arch, kernel, element_size, width):
    family = next((family for family in TILES if arch.startswith(family)), "any")
    table = TILES[family].get((kernel, element_size)) or TILES["any"][kernel, element_size]
    return next((tiles for widest, tiles in table.items() if width <= widest), [*table.values()][-1])


def _dims(D):
    """(D, first width, second or 0): powers of two from 16 that hold D, two where that is less than one."""
    whole = max(16, next_power_of_2(D))
    rest = max(16, next_power_of_2(D - whole // 2))
    return (D, whole // 2, rest) if whole > 32 and rest < whole // 2 else (D, whole, 0)


@functools.cache
def _arch(device):
    if device.type != "cuda":
        return "any"
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))


def _unit(*tensors):
    """How many elements every row of the tensors starts at a multiple of: 16 bytes of them, for wide loads, or 1."""
    unit = 16 // tensors[0].element_size()
    return unit if all(stride % unit == 0 for t in tensors for stride in t.stride()[:3]) else 1
