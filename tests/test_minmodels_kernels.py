"""The two roads of the models: the same results, the same training, each on its own ops, and nothing left behind."""

import re
import threading

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("matplotlib")  # the extra "models"
pytest.importorskip("rich")
pytest.importorskip("safetensors")
from minmodels import files, kernels
from minmodels.kernels import using
from minmodels.options import KERNELS, GPTOptions
from minmodels.train import Run
from test_minmodels_cli import LINE, metrics, run

MODES = torch.ones(2, 7, dtype=torch.bool), torch.tensor([[True] * 4 + [False] * 3, [False, True, False] * 2 + [True]])


class Ours(TorchDispatchMode):
    """The ops of minkernels that are called."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "minkernels":
            self.names.add(func.__name__)
        return func(*args, **(kwargs or {}))


def attention(causal, M, mask):
    q = torch.randn(2, 3, M, 16)
    k, v = torch.randn(2, 2, 3, 7, 16).unbind()
    return kernels.attention, [q, k, v], {"causal": causal, "key_mask": mask}


def labelled(of, *shape):
    target = torch.randint(shape[-1], shape[:-1])
    target.view(-1)[::3] = -1
    return of, [torch.randn(shape), target], {"ignore_index": -1}


def linear(of):
    target = torch.tensor([[3, -1, 4], [0, 10, -1]])
    return of, [torch.randn(2, 3, 16), torch.randn(11, 16), target], {"linear_bias": torch.randn(11), "ignore_index": -1}


def dice(classes):
    target = torch.randint(2, (3, 1, 9, 7), dtype=torch.uint8) if classes == 1 else torch.randint(classes, (3, 9, 7))
    return kernels.bce_dice_loss, [torch.randn(3, classes, 9, 7), target], {}


def match(fmt):
    boxes = torch.rand(5, 9, 4)
    boxes = boxes if fmt == "cxcywh" else torch.cat((boxes[..., :2], boxes[..., :2] + boxes[..., 2:]), -1)
    return kernels.iou_match, [boxes, boxes[:, :4] * 0.9], {"fmt": fmt}


def yolo(multi_label, most):
    sizes = dict(boxes_per_cell=2, num_classes=3, image_size=64, score_threshold=0.1, iou_threshold=0.2)
    return kernels.yolo_detect, [torch.rand(3, 4, 4, 13)], {"head": "v1", "multi_label": multi_label, "max_output": most, **sizes}


def cells():
    targets = dict(boxes=torch.rand(2, 4, 4, 4), classes=torch.randint(-1, 3, (2, 4, 4)))  # which have no gradient
    return kernels.yolo_loss, [torch.rand(2, 4, 4, 13)], {**targets, "boxes_per_cell": 2, "noobj": 0.3}


CASES = {
    "attention": lambda: attention(False, 7, None),
    "attention-causal": lambda: attention(True, 7, None),
    "attention-padded": lambda: attention(False, 7, MODES[1]),
    "attention-causal-decoding": lambda: attention(True, 2, None),  # the last queries of longer keys
    "attention-causal-padded": lambda: attention(True, 7, MODES[0]),
    "attention-a-query-that-sees-nothing": lambda: attention(True, 7, ~MODES[1]),
    "cross-entropy": lambda: labelled(kernels.cross_entropy, 8, 5),
    "cross-entropy-sum": lambda: (kernels.cross_entropy, [torch.randn(4, 5), torch.arange(4)], {"reduction": "sum"}),
    "linear-cross-entropy": lambda: linear(kernels.linear_cross_entropy),
    "token-logprobs": lambda: labelled(kernels.token_logprobs, 2, 4, 5),
    "linear-token-logprobs": lambda: linear(kernels.linear_token_logprobs),
    "bce-dice": lambda: dice(1),
    "bce-dice-classes": lambda: dice(4),
    "iou-match": lambda: match("xyxy"),
    "iou-match-cxcywh": lambda: match("cxcywh"),
    "yolo-loss": cells,
    "yolo-detect": lambda: yolo(False, 100),
    "yolo-detect-multi-label": lambda: yolo(True, 100),
    "yolo-detect-cut-off": lambda: yolo(True, 5),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_both_roads_give_the_same(case, library):
    op, inputs, options = case()
    results = {}
    for road in KERNELS:
        leaves = [t.clone().requires_grad_(t.is_floating_point()) for t in inputs]
        with using(road), Ours() as ours:
            out = op(*leaves, **options)
        assert bool(ours.names) == (road == "fused")
        out = out if isinstance(out, tuple) else (out,)
        wanted = [t for t in out if t.requires_grad]
        of = [t for t in leaves if t.requires_grad]
        torch.manual_seed(1)
        grads = torch.autograd.grad(wanted, of, [torch.randn_like(t) for t in wanted]) if wanted else ()
        results[road] = *(t.detach() for t in out), *grads
    for a, b in zip(*results.values(), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-6)


def test_using_is_undone_and_of_one_thread():
    seen = []
    with pytest.raises(ZeroDivisionError), using("torch"):
        with using("fused"):
            assert kernels._road.kernels == "fused"
        thread = threading.Thread(target=lambda: seen.append(kernels._road.kernels))
        thread.start()
        thread.join()
        assert kernels._road.kernels == "torch"
        1 / 0  # noqa: B018
    assert seen == ["fused"] and kernels._road.kernels == "fused"
    with pytest.raises(ValueError, match="kernels must be one of fused, torch, got 'triton'"), using("triton"):
        pass


def test_a_compiled_function_follows_the_road():
    graphs = []

    def keep(graph, _):
        graphs.append({str(node.target) for node in graph.graph.nodes})
        return graph

    call = torch.compile(lambda q, k, v: kernels.attention(q, k, v, causal=True), fullgraph=True, backend=keep)
    q, k, v = torch.randn(3, 1, 2, 5, 8).unbind()
    first = call(q, k, v)
    with using("torch"):
        second = call(q, k, v)
    torch.testing.assert_close(first, second)
    assert torch.equal(call(q, k, v), first) and len(graphs) == 2
    assert [any("scaled_dot_product_attention" in name for name in graph) for graph in graphs] == [False, True]


LENGTH = "--steps", 20, "--eval-every", 20, "--batch-size", 4, "--warmup", 3
SMALL = "--n-layer", 1, "--n-head", 2, "--n-embd", 16
PIECES = "--vocab-size", 120, "--block-size", 24, *SMALL, "--dtype", "float32"
TRAININGS = {
    "bigram": ("--block-size", 16),
    "gpt": ("--block-size", 16, *SMALL),
    "adder": SMALL,
    "transformer": SMALL,
    "gpt1": PIECES,
    "minbert": PIECES,
    "unet": ("--width", 4, "--depth", 2, "--crop", 32),
    "yolo": ("--width", 4, "--cells", 4),
}


@pytest.fixture
def book(tmp_path):
    path = tmp_path / "book.txt"
    line = LINE.capitalize()
    path.write_text("\n\n\n".join(f"{line}\n{letter} is another one. {line}" for letter in "ABCDEFGHIJKLMNOPQRST"))
    return path


def data(model, folder, book):
    if model in ("unet", "yolo"):
        pytest.importorskip("minkernels._host")
        from test_vision_cli import data

        return data(model, folder)
    if model in ("gpt1", "minbert"):
        pytest.importorskip("tokenizers")
    return () if model in ("adder", "transformer") else ("--text", book)


def trained(model, out, kernels, options):
    with Ours() as ours:
        assert run("train", model, "--out", out, "--kernels", kernels, *LENGTH, *options) == 0
    assert bool(ours.names) == (kernels == "fused") and files.load_checkpoint(out)[1]["options"]["kernels"] == kernels
    return ours.names


@pytest.mark.parametrize("model", TRAININGS)
def test_twenty_steps_of_each_model_agree(model, book, tmp_path, capsys, library):
    options = *TRAININGS[model], *data(model, tmp_path / "data", book)
    for road in KERNELS:
        trained(model, tmp_path / road, road, options)
        assert f", {road} kernels, learns" in capsys.readouterr().out
    ours, theirs = (dict(metrics(tmp_path / road, "loss")) for road in KERNELS)
    assert len(ours) == 20 and ours == pytest.approx(theirs, rel=1e-4) and len(set(ours.values())) == 20
    scores = (metrics(tmp_path / road, "heldout") for road in KERNELS)
    assert next(scores) == [(20, pytest.approx(step[1], rel=1e-4)) for step in next(scores)]


@pytest.mark.parametrize("model", ["gpt1", "minbert"])
def test_fine_tuning_takes_the_road_too(model, book, tmp_path, library):
    trained(model, tmp_path / "run", "fused", (*PIECES, *data(model, tmp_path, book)))
    lines = tmp_path / "lines.tsv"
    lines.write_text("\n".join(f"{'ab'[i % 2]}\tthe {'dog' if i % 2 else 'fox'} number {i}" for i in range(40)))
    task = "--task", "classification", "--examples", lines, "--no-compare", "--dtype", "float32"
    for road in KERNELS:
        with Ours() as ours:
            options = "--kernels", road, "--checkpoint", tmp_path / "run", "--out", tmp_path / road
            assert run("finetune", model, *options, *task, "--steps", 10, "--eval-every", 5, "--batch-size", 4) == 0
            assert run("classify", model, "--checkpoint", tmp_path / road, "--kernels", road, "the dog") == 0
        assert bool(ours.names) == (road == "fused")
    ours, theirs = (dict(metrics(tmp_path / road, "loss")) for road in KERNELS)
    assert ours == pytest.approx(theirs, rel=1e-4) and len(ours) == 10


def test_a_run_goes_on_and_is_used_on_the_other_road(book, tmp_path, capsys, library):
    out, options = tmp_path / "run", (*TRAININGS["gpt"], "--text", book)
    trained("gpt", out, "fused", options)
    with Ours() as ours:
        assert run("train", "gpt", "--out", out, "--resume", "--steps", 24, "--kernels", "torch") == 0
        assert run("train", "gpt", "--out", out, "--resume", "--steps", 26) == 0  # remembered
    assert not ours.names and files.load_checkpoint(out)[1]["options"]["kernels"] == "torch"
    for command in (("eval", "gpt"), ("generate", "gpt", "--tokens", 30, "--temperature", 0)):
        texts = []
        for road in KERNELS:
            capsys.readouterr()
            with Ours() as ours:
                assert run(*command, "--checkpoint", out, "--kernels", road) == 0
            texts.append(capsys.readouterr().out)
            assert bool(ours.names) == (road == "fused")
        assert texts[0] == texts[1]
    assert kernels._road.kernels == "fused"


@pytest.mark.parametrize("model", ["unet", "yolo"])
def test_pictures_are_the_same_on_both_roads(model, book, tmp_path, library):
    options = *TRAININGS[model], *data(model, tmp_path / "data", book)
    trained(model, tmp_path / "run", "fused", options)
    use = {"unet": ("segment",), "yolo": ("detect", "--score", 0.02)}[model]
    for road in KERNELS:
        given = "--checkpoint", tmp_path / "run", "--out", tmp_path / road, "--kernels", road
        assert run(*use, tmp_path / "data" / "images", *given) == 0
    names = sorted(p.name for p in (tmp_path / "fused").iterdir())
    assert len(names) >= 6 and names == sorted(p.name for p in (tmp_path / "torch").iterdir())
    assert all((tmp_path / "fused" / name).read_bytes() == (tmp_path / "torch" / name).read_bytes() for name in names)


def test_a_run_compiles_on_both_roads(book, library):
    losses = []
    for road in KERNELS:
        options = GPTOptions(text=str(book), block_size=16, n_layer=1, n_head=2, n_embd=16, batch_size=4, compile=True, kernels=road)
        compiled = Run("gpt", options)
        compiled.called = torch.compile(compiled.model, backend="aot_eager")
        losses.append([compiled.train_step()["loss"].item() for _ in range(3)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and losses[0][2] < losses[0][0]


COMMANDS = "train gpt", "finetune gpt1", "eval gpt", "generate gpt", "fill minbert x", "classify gpt1 x", "segment x", "detect x"


@pytest.mark.parametrize("command", COMMANDS)
def test_a_bad_road_is_refused(command, capsys):
    assert run(*command.split(), "--kernels", "cuda") == 2
    error = capsys.readouterr().err
    assert re.search(r"argument --kernels: invalid choice: 'cuda' \(choose from '?fused'?, '?torch'?\)", error)
