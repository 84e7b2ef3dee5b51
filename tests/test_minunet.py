"""minUNet: the network of the paper, its loss against plain PyTorch, what it learns, and its data."""

import numpy as np
import pytest
import torch

pytest.importorskip("PIL")  # of the extra "models"
from importlib.metadata import PackageNotFoundError, distribution

from PIL import Image

from minmodels import UserError
from minmodels.data import images, masks
from minmodels.kernels import using
from minmodels.minunet import UNet, UNetConfig
from minmodels.options import KERNELS
from vision_cases import squares


def targets(classes, *shape):
    return torch.randint(2, (shape[0], 1, *shape[1:]), dtype=torch.uint8) if classes == 1 else torch.randint(classes, shape)


def test_the_papers_network_has_its_31_million_parameters():
    with torch.device("meta"):
        model = UNet(UNetConfig(in_channels=3))
    assert sum(p.numel() for p in model.parameters()) == 31_037_633  # section 2's convolutions, and batch norm for their biases
    assert sum(isinstance(m, torch.nn.Conv2d | torch.nn.ConvTranspose2d) for m in model.modules()) == 23  # "in total 23 ... layers"


@pytest.mark.parametrize("size", [(1, 1), (16, 16), (17, 33), (50, 37)], ids=str)
@pytest.mark.parametrize("classes", [1, 3])
def test_any_size_gives_a_logit_for_each_pixel_and_class(size, classes, device):
    model = UNet(UNetConfig(2, classes, width=4, depth=4)).to(device).eval()
    x = torch.randn(3, 2, *size, device=device)
    assert model(x).shape == (3, classes, *size)
    found = model.segment(x)
    assert found.shape == (3, *size) and found.dtype == torch.uint8 and found.max() < max(2, classes)


def test_a_pixel_sees_far_through_the_levels_and_near_through_the_skips(device):
    model = UNet(UNetConfig(1, 1, width=4, depth=2)).to(device).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.constant_(module.bias, 5.0)  # no ReLU is off
    spans = []
    for _ in range(2):
        x = torch.randn(1, 1, 64, 64, device=device, requires_grad=True)
        model(x)[0, 0, 32, 32].backward()
        seen = x.grad[0, 0].nonzero()
        spans.append((seen.amax(0) - seen.amin(0) + 1).tolist())
        for up in model.up:
            torch.nn.init.zeros_(up.weight)
    assert min(spans[0]) > 24 and spans[1] == [9, 9]  # four 3 x 3 convolutions


@pytest.mark.parametrize("classes", [1, 3])
def test_fifty_steps_are_those_of_plain_pytorch(classes, device):
    torch.manual_seed(0)
    model = UNet(UNetConfig(1, classes, width=4, depth=2)).to(device)
    start, x, y = model.state_dict(), torch.randn(4, 1, 20, 28, device=device), targets(classes, 4, 20, 28).to(device)
    start = {name: t.clone() for name, t in start.items()}
    losses = {}
    for kernels in KERNELS:
        model.load_state_dict(start)
        optimizer = torch.optim.SGD(model.parameters(), 0.05)
        losses[kernels] = []
        for _ in range(50):
            with using(kernels):
                loss = model(x, y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[kernels].append(loss.item())
    assert losses["fused"] == pytest.approx(losses["torch"], rel=1e-4) and losses["fused"][-1] < losses["fused"][0] - 0.01


def test_bad_configs_are_named():
    with pytest.raises(ValueError, match="width must be a positive int, got 0"):
        UNetConfig(width=0)
    with pytest.raises(ValueError, match="classes must be a positive int, got True"):
        UNetConfig(classes=True)
    with pytest.raises(ValueError, match="classes must be at most 256, the values of a byte, got 257"):
        UNetConfig(classes=257)


def test_a_folder_of_images_and_masks(tmp_path):
    squares(tmp_path, 7, classes=2)
    data = masks.load(tmp_path / "images", tmp_path / "masks", 3)
    assert [len(data.train), len(data.heldout), data.channels] == [6, 1, 1] and data.heldout[0].name == "4"
    assert {tuple(np.unique(e.mask)) for e in data.train} == {(0, 1, 2)}
    binary = masks.load(tmp_path / "images", tmp_path / "masks", 1)
    assert {tuple(np.unique(e.mask)) for e in binary.train} == {(0, 1)} and binary.sha256 != data.sha256
    assert masks.load(tmp_path / "images", tmp_path / "masks", 3).sha256 == data.sha256


def test_of_one_class_any_colour_but_black_is_the_foreground(tmp_path):
    squares(tmp_path, 2)
    size = Image.open(tmp_path / "masks" / "0.png").size
    for mode, black, dark in (("RGB", (0, 0, 0), (0, 0, 1)), ("RGBA", (0, 0, 0, 255), (1, 0, 0, 255)), ("LA", (0, 255), (1, 255))):
        mask = Image.new(mode, size, black)
        mask.putpixel((1, 2), dark)
        mask.save(tmp_path / "masks" / "0.png")
        assert np.argwhere(masks.load(tmp_path / "images", tmp_path / "masks", 1).train[0].mask).tolist() == [[2, 1]]


@pytest.mark.parametrize("crop", [16, 64], ids=["inside", "larger-than-the-image"])
def test_crops_are_parts_of_the_image_and_of_its_mask_alike(crop):
    pixels = np.arange(40 * 50, dtype=np.float32).reshape(40, 50)
    example = masks.Example("ramp", pixels, (pixels % 7 < 3).astype(np.uint8))
    x, y = masks.sample([example], 1, 20, crop, torch.Generator().manual_seed(0))
    assert x.shape == (20, 1, crop, crop) and y.shape == (20, crop, crop)
    values = (x[:, 0].double() * pixels.std() + pixels.mean()).round()
    assert torch.equal((values % 7 < 3).to(torch.uint8), y)
    if crop < 40:
        right, down = ((v - values[:, 0, 0]).abs().int().tolist() for v in (values[:, 0, 1], values[:, 1, 0]))
        steps = set(zip(right, down, strict=True))
        assert steps == {(1, 50), (50, 1)} and len({int(v) for v in values[:, 0, 0]}) > 10  # turned, and from many places


def test_images_become_floats_of_mean_0_and_deviation_1():
    gray, colour = np.arange(12, dtype=np.uint16).reshape(3, 4), np.random.default_rng(0).integers(0, 255, (5, 4, 3)).astype(np.uint8)
    for image in (gray, colour):
        for channels in (1, 3):
            x = images.floats(image, channels)
            assert x.shape == (channels, *image.shape[:2]) and abs(x.mean()) < 1e-6 and x.std(correction=0) == pytest.approx(1, rel=1e-5)
    assert images.floats(np.full((3, 3), 7, np.uint8), 1).abs().max() == 0  # no contrast: 0, not NaN


def installed(package):
    try:
        return bool(distribution(package))
    except PackageNotFoundError:
        return False


@pytest.mark.skipif(not installed("stardist"), reason="stardist is not installed: make installs it")
def test_the_nuclei():
    data = masks.nuclei(1)
    assert [e.image.shape for e in data.train + data.heldout] == [(512, 341), (512, 171)] and data.channels == 1
    assert 0.15 < data.heldout[0].mask.mean() < 0.19
    rims = masks.nuclei(3)
    assert np.array_equal(rims.train[0].mask > 0, data.train[0].mask > 0) and 0.02 < (rims.train[0].mask == 2).mean() < 0.06
    with pytest.raises(UserError, match="--classes 4: the nuclei have 1 "):
        masks.nuclei(4)
