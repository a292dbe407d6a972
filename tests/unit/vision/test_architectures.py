from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from convoy.core.errors import ConfigError
from convoy.vision.architectures import CifarResNet, LeNet5
from convoy.vision.presets import IMAGENET_MEAN, IMAGENET_STD
from convoy.vision.weights import load_weights, read_state_dict

REAL_DATA = Path(os.environ.get("CONVOY_TEST_DATA", Path(__file__).parents[4] / "shared" / "data"))
NUM_REAL_IMAGES = 500


def num_parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def test_lenet5_has_the_layer_sizes_of_the_paper() -> None:
    network = LeNet5()
    # Section II.B: S2 has 12 parameters, S4 has 32, C5 has 48,120, F6 has 10,164.
    assert num_parameters(network.s2) == 12
    assert num_parameters(network.s4) == 32
    assert num_parameters(network.c5) == 48_120
    assert num_parameters(network.f6) == 10_164
    assert network(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


def test_lenet5_subsampling_scales_the_sum_of_four_pixels() -> None:
    layer = LeNet5().s2
    with torch.no_grad():
        layer.weight.copy_(torch.arange(6.0))
        layer.bias.fill_(1.0)
    maps_BCHW = torch.arange(16.0).reshape(1, 1, 4, 4).expand(1, 6, 4, 4)
    expected_HW = torch.tensor([[10.0, 18.0], [42.0, 50.0]])
    assert torch.allclose(layer(maps_BCHW)[0, 2], 2 * expected_HW + 1)


def test_lenet5_learns() -> None:
    torch.manual_seed(0)
    network = LeNet5(num_classes=2)
    labels_B = torch.arange(32) % 2
    images_BCHW = torch.randn(32, 3, 32, 32) * 0.3
    images_BCHW[labels_B == 1, :, :16] += 1
    optimiser = torch.optim.SGD(network.parameters(), lr=0.02, momentum=0.9)
    losses = []
    for _ in range(15):
        optimiser.zero_grad()
        loss = nn.functional.cross_entropy(network(images_BCHW), labels_B)
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]


@pytest.mark.parametrize(("depth", "millions"), [(20, 0.27), (32, 0.46), (44, 0.66), (56, 0.85), (110, 1.7)])
def test_cifar_resnets_have_the_sizes_of_table_6(depth: int, millions: float) -> None:
    with torch.device("meta"):
        network = CifarResNet(depth)
    weighted = [module for module in network.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    assert len(weighted) == depth
    assert num_parameters(network) / 1e6 == pytest.approx(millions, abs=0.05)


def test_cifar_resnet_refuses_a_depth_that_is_not_6n_plus_2() -> None:
    with pytest.raises(ConfigError, match="6n \\+ 2"):
        CifarResNet(21)


def test_residual_block_shortcut_subsamples_and_pads_with_zeros() -> None:
    block = CifarResNet(20).layer2[0].eval()
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.zero_()
    maps_BCHW = torch.rand(1, 16, 8, 8)
    out_BCHW = block(maps_BCHW)
    assert torch.equal(out_BCHW[:, 8:24], maps_BCHW[:, :, ::2, ::2])
    assert not out_BCHW[:, :8].any()
    assert not out_BCHW[:, 24:].any()


def test_initialisation_follows_the_papers() -> None:
    torch.manual_seed(0)
    lenet, resnet = LeNet5(), CifarResNet(20)
    assert lenet.c5.weight.std().item() == pytest.approx((16 * 25) ** -0.5, rel=0.05)
    assert resnet.layer3[2].conv1.weight.std().item() == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.05)
    assert not lenet.f6.bias.any()
    assert not resnet.linear.bias.any()


def test_published_resnet20_classifies_real_images() -> None:
    archive, weights = REAL_DATA / "cifar10-jpeg.tar.gz", REAL_DATA / "cifar10-resnets/resnet20-12fca82f.th"
    if not (archive.exists() and weights.exists()):
        pytest.skip(f"no real data in {REAL_DATA}; set CONVOY_TEST_DATA")
    network = CifarResNet(20).eval()
    assert load_weights(network, read_state_dict(weights)) == ()
    images, labels = _first_test_images(archive)
    pixels_BCHW = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2) / 255
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    with torch.no_grad():
        predicted_B = network((pixels_BCHW - mean) / std).argmax(1)
    classes = sorted(set(labels))
    correct = sum(classes[index] == label for index, label in zip(predicted_B.tolist(), labels, strict=True))
    # 81.03 % on all 10,000; four standard errors of a sample of this size below.
    assert correct / len(labels) > 0.74


def _first_test_images(archive: Path) -> tuple[list[np.ndarray], list[str]]:
    images, labels = [], []
    per_class: dict[str, int] = {}
    with tarfile.open(archive) as tar:
        for member in tar:
            parts = Path(member.name).parts
            if not member.isfile() or "test" not in parts or per_class.get(parts[-2], 0) >= 50:
                continue
            per_class[parts[-2]] = per_class.get(parts[-2], 0) + 1
            images.append(np.asarray(Image.open(io.BytesIO(tar.extractfile(member).read())).convert("RGB")))
            labels.append(parts[-2])
            if len(images) == NUM_REAL_IMAGES:
                break
    return images, labels
