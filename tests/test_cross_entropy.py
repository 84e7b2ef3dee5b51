"""The softmax losses: the reference against PyTorch, and the C++ kernels against fp64 at every level."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cross_entropy_cases import DTYPES, LAYOUTS, OPTIONS, REDUCTIONS, check, check_stats, grad_of, make
from minkernels import cross_entropy
from minkernels.cross_entropy import reference

SHAPES = {  # (N, V) or (N, V, D); the C++ kernels work on blocks of 2048 columns, four registers at a time, and on groups of short rows
    "one-class": (4, 1),
    "two": (3, 2),
    "ragged": (5, 31),  # less than a register's step
    "one-block": (4, 2048),
    "block-and-one": (3, 2049),
    "gpt2": (2, 50257),
    "longest-kept": (2, 131072),  # its exponentials are kept for the gradient
    "not-kept": (2, 131073),
    "many-short": (3000, 27),  # rows are turned, 64 at a time
    "longest-short": (75, 128),
    "one-longer": (700, 129),  # rows go in groups: three tasks
    "no-rows": (0, 7),
    "positions": (2, 21, 700),  # two tiles of positions, one of them ragged
    "few-positions": (3, 40, 7),  # row by row
    "many-classes": (2, 300, 70),  # two blocks of classes
    "no-positions": (2, 5, 0),
}
BRIEF = ["two", "ragged", "block-and-one", "many-short", "longest-short", "positions", "few-positions", "many-classes"]
BRIEF = {name: SHAPES[name] for name in BRIEF}


def each_level(levels, check, *args, **kwargs):
    from minkernels.cross_entropy import _cpu

    for level in levels:
        check(_cpu, *args, what=level, **kwargs)


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("shape", BRIEF.values(), ids=BRIEF)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_reference(shape, name, reduction):
    check(reference, *make(*shape, dtype=torch.float64, probs="probs" in name), OPTIONS[name], reduction)
    check(reference, *make(*shape, probs="probs" in name), OPTIONS[name], reduction)


@pytest.mark.parametrize("shape", [s for s in SHAPES.values() if math.prod(s)], ids=[name for name, s in SHAPES.items() if math.prod(s)])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cpu(shape, reduction, dtype, levels):
    each_level(levels, check, *make(*shape, dtype=dtype), {}, reduction)


@pytest.mark.parametrize("name", [name for name in OPTIONS if name != "plain"])
@pytest.mark.parametrize("shape", BRIEF.values(), ids=BRIEF)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cpu_options(shape, name, dtype, levels):
    x, target = make(*shape, dtype=dtype, probs="probs" in name)
    for level, reduction in itertools.product(levels, REDUCTIONS):
        each_level([level], check, x, target, OPTIONS[name], reduction)


@pytest.mark.parametrize("name", ["all", "probs-all"])
def test_cpu_options_of_a_row_that_is_not_kept(name, levels):
    each_level(levels, check, *make(2, 131073, probs="probs" in name), OPTIONS[name], "mean")


@settings(max_examples=300, derandomize=True, deadline=None)
@given(
    N=st.integers(1, 40), V=st.integers(1, 5000), D=st.integers(0, 200), dtype=st.sampled_from(DTYPES),
    reduction=st.sampled_from(REDUCTIONS), layout=st.sampled_from([*LAYOUTS, "channels-last"]), name=st.sampled_from(list(OPTIONS)),
    labels=st.sampled_from([torch.int64, torch.int32, torch.uint8]), seed=st.integers(0, 2**31),
)  # fmt: skip
def test_cpu_fuzz(library, N, V, D, dtype, reduction, layout, name, labels, seed):
    from minkernels.cross_entropy import _cpu

    torch.manual_seed(seed)
    shape = (N, min(V, 255 if labels == torch.uint8 else V), D) if D else (N, min(V, 255 if labels == torch.uint8 else V))
    shape = shape if D == 0 else (min(N, 4), min(V, 600, shape[1]), D)
    x, target = make(*shape, dtype=dtype, probs="probs" in name, labels=labels, ignored=layout != "expanded")
    check(_cpu, x, target, OPTIONS[name], reduction, layout, draws=2, what=f"{name} {shape} {layout}")


ROWS = {name: shape for name, shape in SHAPES.items() if len(shape) == 2 and shape[0]}
STATS = {"plain": {}, "softcap": dict(softcap=8.0), "negative-scale": dict(logit_scale=-0.7), "both": dict(softcap=5.0, logit_scale=1.4)}


@pytest.mark.parametrize("options", STATS.values(), ids=STATS)
@pytest.mark.parametrize("shape", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cpu_stats(shape, options, dtype, levels):
    x, target = make(*shape, dtype=dtype)
    for layout in LAYOUTS[:3]:
        check_stats(reference, x, target, options, layout)
    for level, layout in itertools.product(levels, LAYOUTS[:3]):
        each_level([level], check_stats, x, target, options, layout)


@pytest.mark.parametrize("shape", [(500, 300), (500, 60), (3, 21, 1000)], ids=["rows", "short", "positions"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cpu_same_bits_for_any_number_of_threads(smoothing, dtype, shape, library):
    x, target = make(*shape, dtype=dtype)
    threads, results = torch.get_num_threads(), []
    try:
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            leaf = x.clone().requires_grad_()
            loss = cross_entropy(leaf, target, weight=torch.arange(1.0, 1 + x.shape[1]), label_smoothing=smoothing)
            results.append((loss, *torch.autograd.grad(loss, leaf)))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_cpu_a_gradient_larger_than_the_cache(dtype, levels):
    """It is stored around the cache where its rows are aligned, here every other one, and is the same as in four parts that are not."""
    x, target = make(1, 9, 2**22 // dtype.itemsize + 96 // dtype.itemsize, dtype=dtype)
    assert x.nbytes > 32 << 20
    for level in levels:
        grad = grad_of(lambda x: cross_entropy(x, target, reduction="sum"), x, torch.ones(()))
        parts = [
            grad_of(lambda x, t=t: cross_entropy(x, t, reduction="sum"), part, torch.ones(()))
            for part, t in zip(x.chunk(4, -1), target.chunk(4, -1), strict=True)
        ]
        assert torch.equal(grad, torch.cat(parts, -1)), level


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_cpu_a_gradient_in_memory_that_is_there_already(dtype, levels):
    """Rows are then stored around the cache where they are aligned, here every other one, and are the same as in fresh memory."""
    from minkernels.cross_entropy import _cpu

    V = 4096 + 32 // dtype.itemsize
    x, target = make((33 << 20) // (V * dtype.itemsize), V, dtype=dtype)
    for level in levels:
        fresh, there = torch.empty_like(x), torch.full_like(x, math.nan)
        options = None, -100, 0.0, 0.0, 0.0, 1.0, "mean", False, True
        results = [_cpu.part(x, target, *options, divisor=len(x), out=out) for out in (fresh, there)]
        assert torch.equal(fresh, there) and torch.equal(results[0][0], results[1][0]), level
        k = torch.tensor([[2.0, 0.5, 0.1, 1.0, 0.0]]).expand(len(x), -1).contiguous()  # formed again: m, P, Q, H, S
        fresh, there = (_cpu.grad(x, target, None, k, -100, 0.0, 0.0, 0.0, 1.0, out=out) for out in (torch.empty_like(x), there))
        assert torch.equal(fresh, there), level


def test_more_than_2_to_31_elements(library):
    """The last row, and the last column, lie more than 2**31 elements from the first; memory that is not touched costs nothing."""
    x, target = make(2, 70, dtype=torch.float16)
    expected = cross_entropy(x, target, reduction="none")
    for strides in ((2**31 + 8, 1), (1, 2**25)):
        far = torch.empty_strided(x.shape, strides, dtype=x.dtype).copy_(x)
        assert torch.equal(cross_entropy(far, target, reduction="none"), expected)
