from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from convoy.core.errors import ConfigError
from convoy.vision.backbone_config import BackboneConfig
from convoy.vision.backbones import build_network, native_px
from convoy.vision.depth_axis import derive_depth_axis
from convoy.vision.stages import DepthAxis
from convoy.vision.tapping import TappedNetwork

TAPS = ["stem", "layer2", "pooled", "logits"]


def build(arch: str) -> tuple[nn.Module, DepthAxis]:
    config = BackboneConfig(arch=arch, weights="random")
    network = build_network(config)
    return network, derive_depth_axis(network, input_px=native_px(config))


@pytest.fixture(scope="module")
def resnet() -> tuple[nn.Module, DepthAxis]:
    return build("cifar_resnet20")


@pytest.fixture(scope="module")
def images_BCHW() -> Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def no_gradients() -> Any:
    with torch.no_grad():
        yield


def close(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(
        torch.allclose(left[tap], right[tap], atol=1e-4, rtol=1e-4) for tap in left
    )


def test_features_are_those_of_the_forward_pass_by_hand(
    resnet: tuple[nn.Module, DepthAxis], images_BCHW: Tensor
) -> None:
    network, axis = resnet
    stem = network.relu(network.bn1(network.conv1(images_BCHW)))
    layer2 = network.layer2(network.layer1(stem))
    pooled = network.layer3(layer2).mean((2, 3))
    by_hand = {
        "stem": stem.mean((2, 3)),
        "layer2": layer2.mean((2, 3)),
        "pooled": pooled,
        "logits": network(images_BCHW),
    }
    assert close(TappedNetwork(network, axis, TAPS)(images_BCHW), by_hand)
    assert torch.allclose(network.linear(pooled), by_hand["logits"], atol=1e-5)


@pytest.mark.parametrize(
    ("arch", "pooled_by_hand"),
    [
        ("torchvision:densenet121", lambda network, x: network.features(x).relu().mean((2, 3))),
        ("torchvision:mobilenet_v2", lambda network, x: network.features(x).mean((2, 3))),
        ("torchvision:alexnet", lambda network, x: network.avgpool(network.features(x)).mean((2, 3))),
        ("torchvision:squeezenet1_1", lambda network, x: network.features(x).mean((2, 3))),
        ("timm:mobilenetv3_small_050", lambda network, x: network.forward_features(x).mean((2, 3))),
        (
            "timm:resnet10t",
            lambda network, x: network.forward_head(network.forward_features(x), pre_logits=True),
        ),
    ],
)
def test_pooled_is_what_the_libraries_pool(
    arch: str, pooled_by_hand: Callable[[nn.Module, Tensor], Tensor]
) -> None:
    network, axis = build(arch)
    images_BCHW = torch.randn(2, 3, 64, 64)
    features = TappedNetwork(network, axis, ["pooled"])(images_BCHW)
    assert close(features, {"pooled": pooled_by_hand(network, images_BCHW)})


def test_every_stage_of_every_kind_of_network_can_be_tapped() -> None:
    for arch in ("lenet5", "cifar_resnet20"):
        network, axis = build(arch)
        taps = [stage.name for stage in axis]
        features = TappedNetwork(network, axis, taps)(torch.randn(2, 3, 32, 32))
        assert list(features) == taps
        for stage in axis:
            assert features[stage.name].shape == (2, stage.channels)
            assert features[stage.name].dtype == torch.float32


def test_numbers_and_two_names_of_one_stage_are_taps_too(
    resnet: tuple[nn.Module, DepthAxis], images_BCHW: Tensor
) -> None:
    features = TappedNetwork(*resnet, [6, "layer2", "layer2.2"])(images_BCHW)
    assert list(features) == ["6", "layer2", "layer2.2"]
    assert torch.equal(features["6"], features["layer2"])
    assert torch.equal(features["6"], features["layer2.2"])


def test_nothing_runs_behind_the_deepest_tap(images_BCHW: Tensor) -> None:
    network, axis = build("cifar_resnet20")
    ran = []
    for name, module in network.named_modules():
        module.register_forward_pre_hook(lambda _, args, name=name: ran.append(name))
    TappedNetwork(network, axis, ["stem", "layer1"])(images_BCHW)
    assert "layer1.2.bn2" in ran
    # The first block behind the tap is entered, and left at once.
    assert not [name for name in ran if name.startswith(("layer2.0.", "layer3", "linear"))]


def test_the_network_itself_stays_usable(images_BCHW: Tensor) -> None:
    network, axis = build("cifar_resnet20")
    before_BD = network(images_BCHW)
    shallow, deep = TappedNetwork(network, axis, ["stem"]), TappedNetwork(network, axis, ["pooled", "logits"])
    shallow(images_BCHW)
    assert torch.equal(deep(images_BCHW)["logits"], before_BD)
    assert torch.equal(network(images_BCHW), before_BD)


def test_a_failed_pass_leaves_nothing_behind(
    resnet: tuple[nn.Module, DepthAxis], images_BCHW: Tensor
) -> None:
    tapped = TappedNetwork(*resnet, ["stem"])
    with pytest.raises(RuntimeError):
        tapped(torch.zeros(1, 4, 32, 32))
    assert resnet[0](images_BCHW).shape == (2, 10)
    assert tapped(images_BCHW)["stem"].shape == (2, 16)


def test_a_copy_has_taps_of_its_own(images_BCHW: Tensor) -> None:
    network, axis = build("cifar_resnet20")
    tapped = TappedNetwork(network, axis, ["stem"])
    before = tapped(images_BCHW)
    twin = copy.deepcopy(tapped)
    nn.init.zeros_(network.conv1.weight)
    assert close(twin(images_BCHW), before)
    assert not close(tapped(images_BCHW), before)


def test_later_layers_that_work_in_place_do_not_change_features() -> None:
    """torchvision's DenseNet runs a ReLU in place on what its last norm returned."""
    network, axis = build("torchvision:densenet121")
    features = TappedNetwork(network, axis, ["features.denseblock4", "pooled"])(torch.randn(1, 3, 64, 64))
    assert (features["features.denseblock4"] < 0).any()
    assert (features["pooled"] >= 0).all()


class SharedActivation(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)
        self.relu = nn.ReLU()
        self.head = nn.Linear(4, 2)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        maps = self.relu(self.conv2(self.relu(self.conv1(images_BCHW))))
        return self.head(self.relu(maps.mean((2, 3)) - 1))


def test_a_module_that_is_called_several_times_is_tapped_at_the_right_call() -> None:
    network = SharedActivation().eval()
    axis = derive_depth_axis(network, input_px=16)
    images_BCHW = torch.randn(2, 3, 16, 16)
    maps = network.conv2(network.conv1(images_BCHW).relu()).relu()
    by_hand = {"conv2": maps.mean((2, 3)), "pooled": (maps.mean((2, 3)) - 1).relu()}
    assert close(TappedNetwork(network, axis, ["conv2", "pooled"])(images_BCHW), by_hand)


def test_channels_last_and_bfloat16_give_nearly_the_same_in_float32(
    resnet: tuple[nn.Module, DepthAxis], images_BCHW: Tensor
) -> None:
    tapped = TappedNetwork(*resnet, TAPS)
    exact = tapped(images_BCHW)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        reduced = tapped(images_BCHW.to(memory_format=torch.channels_last))
    for tap in TAPS:
        assert reduced[tap].dtype == torch.float32
        assert torch.cosine_similarity(reduced[tap], exact[tap]).min() > 0.999
        assert not torch.equal(reduced[tap], exact[tap])


@pytest.mark.parametrize(("taps", "num_convolutions"), [(["stem"], 1), (["stem", "layer2"], 13), (TAPS, 19)])
def test_compiled_without_breaks_and_without_what_lies_behind(
    resnet: tuple[nn.Module, DepthAxis], images_BCHW: Tensor, taps: list[str], num_convolutions: int
) -> None:
    graphs = []

    def remember(graph: torch.fx.GraphModule, _: Any) -> Any:
        graph.graph.eliminate_dead_code()
        graph.recompile()
        graphs.append(str(graph.graph))
        return graph.forward

    tapped = TappedNetwork(*resnet, taps)
    torch.compiler.reset()
    compiled = torch.compile(tapped, fullgraph=True, dynamic=False, backend=remember)
    assert close(compiled(images_BCHW), tapped(images_BCHW))
    assert close(compiled(images_BCHW), tapped(images_BCHW))
    assert len(graphs) == 1
    assert graphs[0].count("torch.conv2d") == num_convolutions


def test_no_tap_and_an_unknown_tap_are_errors(resnet: tuple[nn.Module, DepthAxis]) -> None:
    with pytest.raises(ConfigError, match="no tap is named"):
        TappedNetwork(*resnet, [])
    with pytest.raises(ConfigError, match="no stage 'layer9'"):
        TappedNetwork(*resnet, ["layer9"])
