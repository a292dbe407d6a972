from __future__ import annotations

import copy
from dataclasses import dataclass

import pytest
import torch
import torchvision
from pydantic import TypeAdapter
from torch import Tensor, nn

from convoy.core.errors import ConfigError
from convoy.vision.backbone_config import BackboneConfig
from convoy.vision.backbones import build_network, native_px
from convoy.vision.depth_axis import count_macs, count_tap_macs, derive_depth_axis
from convoy.vision.stages import DepthAxis, StageKind, TapSide, resolve_tap
from convoy.vision.tapping import TappedNetwork


@dataclass(frozen=True, kw_only=True)
class Expected:
    """What the papers and the libraries' code say of a network."""

    maps: int
    vectors: int
    pooled: int
    stem_px: int
    last_px: int
    deepest: str


# Stages: `maps` spatial ones, then `pooled`, then `vectors` layers of the classifier, logits included.
EXPECTED = {
    "lenet5": Expected(maps=2, vectors=3, pooled=16, stem_px=14, last_px=5, deepest="c3"),
    "cifar_resnet20": Expected(maps=10, vectors=1, pooled=64, stem_px=32, last_px=8, deepest="layer3.2"),
    "torchvision:alexnet": Expected(
        maps=5, vectors=3, pooled=256, stem_px=27, last_px=6, deepest="features.10"
    ),
    "torchvision:vgg16": Expected(
        maps=13, vectors=3, pooled=512, stem_px=224, last_px=7, deepest="features.28"
    ),
    "torchvision:vgg19": Expected(
        maps=16, vectors=3, pooled=512, stem_px=224, last_px=7, deepest="features.34"
    ),
    # Three convolutions and nine Inception modules.
    "torchvision:googlenet": Expected(
        maps=12, vectors=1, pooled=1024, stem_px=56, last_px=7, deepest="inception5b"
    ),
    "torchvision:inception_v3": Expected(
        maps=16, vectors=1, pooled=2048, stem_px=149, last_px=8, deepest="Mixed_7c"
    ),
    "torchvision:resnet18": Expected(
        maps=9, vectors=1, pooled=512, stem_px=56, last_px=7, deepest="layer4.1"
    ),
    "torchvision:resnet50": Expected(
        maps=17, vectors=1, pooled=2048, stem_px=56, last_px=7, deepest="layer4.2"
    ),
    # A dense block reads all of its maps to its end; the transitions between the four are one convolution each.
    "torchvision:densenet121": Expected(
        maps=8, vectors=1, pooled=1024, stem_px=56, last_px=7, deepest="features.denseblock4"
    ),
    # Chollet's own; of its separable convolutions behind the twelve blocks, each half is a stage.
    "timm:legacy_xception": Expected(
        maps=18, vectors=1, pooled=2048, stem_px=149, last_px=10, deepest="conv4.pointwise"
    ),
    "timm:xception41": Expected(
        maps=15, vectors=1, pooled=2048, stem_px=150, last_px=10, deepest="blocks.12"
    ),
    # Five convolutions, mixed_5b, 10 blocks, mixed_6a, 20 blocks, mixed_7a, 9 + 1 blocks, one convolution.
    "timm:inception_resnet_v2": Expected(
        maps=49, vectors=1, pooled=1536, stem_px=149, last_px=8, deepest="conv2d_7b.conv"
    ),
    # 13 depthwise and 13 pointwise convolutions behind the stem, as the paper counts them.
    "timm:mobilenetv1_100": Expected(
        maps=27, vectors=1, pooled=1024, stem_px=112, last_px=7, deepest="blocks.4.1.conv_pw"
    ),
    "torchvision:mobilenet_v2": Expected(
        maps=19, vectors=1, pooled=1280, stem_px=112, last_px=7, deepest="features.18.0"
    ),
    "timm:nasnetalarge": Expected(
        maps=23, vectors=1, pooled=4032, stem_px=165, last_px=11, deepest="cell_17"
    ),
    "torchvision:efficientnet_b0": Expected(
        maps=18, vectors=1, pooled=1280, stem_px=112, last_px=7, deepest="features.8.0"
    ),
    # Stem, 3 + 3 + 9 + 3 blocks, and three convolutions that halve the resolution between them.
    "torchvision:convnext_tiny": Expected(
        maps=22, vectors=1, pooled=768, stem_px=56, last_px=7, deepest="features.7.2"
    ),
    "timm:convnext_tiny": Expected(
        maps=22, vectors=1, pooled=768, stem_px=56, last_px=7, deepest="stages.3.blocks.2"
    ),
    # Two networks whose classifiers are convolutions.
    "torchvision:squeezenet1_0": Expected(
        maps=9, vectors=1, pooled=512, stem_px=54, last_px=13, deepest="features.12"
    ),
    "timm:mobilenetv3_small_100": Expected(
        maps=15, vectors=2, pooled=576, stem_px=112, last_px=7, deepest="blocks.5.0.conv"
    ),
}


def build_on_meta(arch: str) -> tuple[nn.Module, DepthAxis]:
    config = BackboneConfig(arch=arch, weights="random")
    with torch.device("meta"):
        network = build_network(config)
    return network, derive_depth_axis(network, input_px=native_px(config))


@pytest.fixture(scope="module", params=EXPECTED)
def known(request: pytest.FixtureRequest) -> tuple[Expected, nn.Module, DepthAxis]:
    return EXPECTED[request.param], *build_on_meta(request.param)


def test_stages_are_those_of_the_architecture(known: tuple[Expected, nn.Module, DepthAxis]) -> None:
    expected, _, axis = known
    kinds = [stage.kind for stage in axis]
    assert kinds == [StageKind.SPATIAL] * expected.maps + [StageKind.VECTOR] * (1 + expected.vectors)
    assert [stage.index for stage in axis] == list(range(len(axis)))
    deepest, pooled = axis[expected.maps - 1], axis[expected.maps]
    assert (deepest.name, deepest.resolution_px) == (expected.deepest, expected.last_px)
    assert (pooled.name, pooled.channels) == ("pooled", expected.pooled)
    assert axis[0].resolution_px == expected.stem_px
    assert axis[len(axis) - 1].channels == (10 if len(axis) == 12 or expected.pooled == 16 else 1000)


def test_every_parameter_is_in_exactly_one_place(known: tuple[Expected, nn.Module, DepthAxis]) -> None:
    _, network, axis = known
    sizes = {name: parameter.numel() for name, parameter in network.named_parameters()}
    names = [name for stage in axis for name in stage.parameter_names]
    assert sorted(names) == sorted(sizes)
    assert axis.off_axis == ()
    for stage in axis:
        assert stage.num_parameters == sum(sizes[name] for name in stage.parameter_names)


def test_every_stage_but_pooled_brings_a_weight(known: tuple[Expected, nn.Module, DepthAxis]) -> None:
    _, network, axis = known
    for stage in axis:
        weights = [name for name in stage.parameter_names if network.get_parameter(name).ndim >= 2]
        assert bool(weights) != (stage.name == "pooled")
        assert all(any(name.startswith(module) for module in stage.module_names) for name in weights)


def test_resolution_never_grows_with_depth(known: tuple[Expected, nn.Module, DepthAxis]) -> None:
    resolutions_px = [stage.resolution_px for stage in known[2]]
    assert resolutions_px == sorted(resolutions_px, reverse=True)


@pytest.mark.parametrize("arch", ["torchvision:resnet18", "torchvision:vgg16", "torchvision:densenet121"])
def test_a_stage_depends_on_nothing_deeper(arch: str) -> None:
    """The gradient of a stage's activation reaches the stages up to it, all of them, and only them."""
    config = BackboneConfig(arch=arch, weights="random", num_classes=2)
    network = build_network(config)
    axis = derive_depth_axis(network, input_px=native_px(config))
    seen: dict[str, Tensor] = {}
    stage = axis[3]
    module = network.get_submodule(stage.tap_point.module_name)
    module.register_forward_pre_hook(lambda _, args: seen.update(activation=args[0]))
    network(torch.rand(1, 3, 64, 64))
    # A sum would not depend on what a norm in between normalises away.
    seen["activation"].square().mean().backward()
    reached = {name for name, parameter in network.named_parameters() if parameter.grad is not None}
    assert reached == {name for earlier in axis.stages[:4] for name in earlier.parameter_names}


def test_auxiliary_classifiers_are_off_the_axis() -> None:
    with torch.device("meta"):
        network = torchvision.models.get_model("googlenet", weights=None, aux_logits=True, init_weights=False)
    axis = derive_depth_axis(network, input_px=224)
    assert axis.off_axis
    assert all(name.startswith(("aux1.", "aux2.")) for name in axis.off_axis)
    assert len(axis) == 14
    assert network.training


class Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels))

    def forward(self, maps_BCHW: Tensor) -> Tensor:
        return maps_BCHW + self.body(maps_BCHW)


class Unusual(nn.Module):
    """A norm first, a shared ReLU, a layer called twice, a parameter of its own, and two poolings side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)
        self.blocks = nn.Sequential(Residual(8), Residual(8))
        self.twice = nn.Conv2d(8, 8, 1)
        self.scale = nn.Parameter(torch.ones(16))
        self.unused = nn.Linear(5, 5)
        self.head = nn.Linear(16, 1)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        maps = self.blocks(self.relu(self.stem(self.norm(images_BCHW))))
        maps = self.relu(self.twice(self.relu(self.twice(maps))))
        pooled = torch.cat([maps.mean((2, 3)), maps.amax((2, 3))], dim=1)
        return self.head(pooled * self.scale)


def test_an_unusual_network_has_a_sensible_axis() -> None:
    axis = derive_depth_axis(Unusual(), input_px=16)
    assert [stage.name for stage in axis] == ["stem", "blocks.0", "blocks.1", "twice", "pooled", "head"]
    assert axis[0].module_names == ("norm", "stem", "relu")
    assert axis[0].parameter_names[:2] == ("norm.weight", "norm.bias")
    assert axis[3].parameter_names == ("twice.weight", "twice.bias")
    assert axis[4].parameter_names == ("scale",)
    assert (resolve_tap(axis, "pooled").channels, resolve_tap(axis, "logits").channels) == (16, 1)
    assert axis.off_axis == ("unused.weight", "unused.bias")


class OwnWeight(nn.Module):
    """A layer that keeps its weight itself, around a child without any."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(channels, in_channels, 3, 3))
        self.activation = nn.ReLU()

    def forward(self, maps_BCHW: Tensor) -> Tensor:
        return self.activation(nn.functional.conv2d(maps_BCHW, self.weight, padding=1))


class TwoPaths(nn.Module):
    """A root whose second layer goes on from the images, like NASNet's cells, and not from the first."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = OwnWeight(3, 4), OwnWeight(3, 8)
        self.head = nn.Linear(12, 2)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        maps = torch.cat([self.left(images_BCHW), self.right(images_BCHW)], dim=1)
        return self.head(maps.mean((2, 3)))


def test_a_layer_that_owns_its_weight_is_a_stage_on_either_path() -> None:
    axis = derive_depth_axis(TwoPaths(), input_px=16)
    assert [(stage.name, stage.channels) for stage in axis] == [
        ("left", 4),
        ("right", 8),
        ("pooled", 12),
        ("head", 2),
    ]
    assert axis[0].module_names == ("left",)
    assert axis[0].tap_point.side is TapSide.OUTPUT


class Encoder(nn.Module):
    """Convolutions, two blocks, and a pooling that the network returns with a norm behind it, or not at all."""

    def __init__(self, *, pools: bool = True) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU())
        self.blocks = nn.Sequential(Residual(8), Residual(8))
        self.norm = nn.LayerNorm(8)
        self.pools = pools

    def forward(self, images_BCHW: Tensor) -> Tensor:
        maps = self.blocks(self.stem(images_BCHW)).relu()
        return self.norm(maps.amax((2, 3))) if self.pools else maps


@pytest.mark.parametrize("pools", [True, False])
def test_a_network_without_classifier_ends_in_pooled_and_returns_it(pools: bool) -> None:
    network = Encoder(pools=pools).eval()
    axis = derive_depth_axis(network, input_px=16)
    assert [stage.name for stage in axis] == ["stem.0", "blocks.0", "blocks.1", "pooled"]
    assert [stage.kind for stage in axis] == [StageKind.SPATIAL] * 3 + [StageKind.VECTOR]
    assert (axis.num_reused, axis.num_classes) == (4, 0)
    nn.init.uniform_(network.norm.weight)
    images_BCHW = torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        pooled_BD = TappedNetwork(network, axis, ["pooled"])(images_BCHW)["pooled"]
        returned = network(images_BCHW)
    assert torch.allclose(pooled_BD, returned if pools else returned.mean((2, 3)))
    with pytest.raises(ConfigError, match="no stage 'logits'") as caught:
        resolve_tap(axis, "logits")
    assert "'pooled'" in caught.value.next_step


def test_timms_networks_without_classifier_end_in_pooled() -> None:
    with torch.device("meta"):
        network = build_network(BackboneConfig(arch="timm:convnextv2_atto", weights="random", num_classes=0))
    axis = derive_depth_axis(network, input_px=224)
    assert axis[len(axis) - 2].name == "stages.3.blocks.1"
    assert axis[len(axis) - 1].name == "pooled"
    assert axis[len(axis) - 1].parameter_names == ("head.norm.weight", "head.norm.bias")


@pytest.mark.parametrize(
    ("arch", "deepest", "layers", "width"),
    [
        ("mobilenetv3_small_100", "blocks.5.0.conv", {"conv_head"}, 1024),
        ("ghostnet_100", "blocks.9.0.conv", {"conv_head"}, 1280),
        ("vgg11", "features.18", {"pre_logits.fc1", "pre_logits.fc2"}, 4096),
    ],
)
def test_layers_behind_the_maps_of_a_network_without_classifier_belong_to_what_it_returns(
    arch: str, deepest: str, layers: set[str], width: int
) -> None:
    network = build_network(BackboneConfig(arch=f"timm:{arch}", weights="random", num_classes=0))
    axis = derive_depth_axis(network, input_px=224, num_classes=0)
    maps, pooled = axis[len(axis) - 2], axis[len(axis) - 1]
    assert (maps.name, maps.kind) == (deepest, StageKind.SPATIAL)
    assert (pooled.name, pooled.channels, axis.num_classes) == ("pooled", width, 0)
    assert layers <= set(pooled.module_names)
    assert sum(stage.num_parameters for stage in axis) == sum(one.numel() for one in network.parameters())
    assert axis.num_reused == len(axis)
    images_BCHW = torch.rand(1, 3, 224, 224)
    with torch.no_grad():
        pooled_BD = TappedNetwork(network, axis, ["pooled"])(images_BCHW)["pooled"]
        assert torch.equal(pooled_BD, network(images_BCHW))


@pytest.mark.parametrize(("num_classes", "last"), [(4, "3"), (None, "pooled"), (7, "pooled")])
def test_a_convolution_with_a_norm_behind_it_is_a_classifier_where_its_maps_are_the_classes(
    num_classes: int | None, last: str
) -> None:
    convs = (nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1), nn.BatchNorm2d(4))
    network = nn.Sequential(*convs, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    axis = derive_depth_axis(network, input_px=16, num_classes=num_classes)
    assert axis[len(axis) - 1].name == last


def test_deriving_leaves_the_network_as_it_was() -> None:
    network = Unusual().train()
    network.norm.eval()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    derive_depth_axis(network, input_px=16)
    assert network.training
    assert not network.norm.training
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())


@pytest.fixture(scope="module")
def resnet18() -> DepthAxis:
    return build_on_meta("torchvision:resnet18")[1]


@pytest.mark.parametrize(
    ("tap", "name"),
    [
        ("stem", "conv1"),
        ("layer1.0", "layer1.0"),
        ("layer2", "layer2.1"),
        ("maxpool", "conv1"),
        ("avgpool", "pooled"),
        ("logits", "fc"),
        (0, "conv1"),
        (10, "fc"),
    ],
)
def test_taps_have_names_aliases_prefixes_and_numbers(resnet18: DepthAxis, tap: str | int, name: str) -> None:
    assert resolve_tap(resnet18, tap).name == name


def test_stem_is_the_first_stage_even_where_a_module_has_that_name() -> None:
    axis = build_on_meta("timm:xception41")[1]
    assert resolve_tap(axis, "stem").index == 0
    assert resolve_tap(axis, "stem.1").index == 1


@pytest.mark.parametrize(
    ("tap", "advice"),
    [
        ("layer2.2", "layer2.1"),
        ("later2.0", "layer2.0"),
        ("poled", "pooled"),
        ("layer2.1.conv1", "the block itself is 'layer2.1'"),
        (11, "from 0 to 10"),
        (-1, "from 0 to 10"),
    ],
)
def test_an_unknown_tap_is_an_error_that_names_near_ones(
    resnet18: DepthAxis, tap: str | int, advice: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve_tap(resnet18, tap)
    assert advice in caught.value.next_step


def test_an_axis_survives_json(resnet18: DepthAxis) -> None:
    adapter = TypeAdapter(DepthAxis)
    assert adapter.validate_json(adapter.dump_json(resnet18)) == resnet18


@pytest.mark.parametrize(
    ("arch", "input_px", "billions"),
    [
        # As torchvision documents them.
        ("torchvision:resnet18", 224, 1.81),
        ("torchvision:vgg16", 224, 15.47),
        ("torchvision:mobilenet_v2", 224, 0.30),
        # By hand: 0.44 in the stem, 14.16, 12.98 and 12.98 in the three stages, in millions.
        ("cifar_resnet20", 32, 0.0406),
    ],
)
def test_macs_are_those_that_are_published(arch: str, input_px: int, billions: float) -> None:
    with torch.device("meta"):
        network = build_network(BackboneConfig(arch=arch, weights="random"))
    assert count_macs(network, input_px) / 1e9 == pytest.approx(billions, rel=0.02)


@pytest.mark.parametrize("arch", ["torchvision:resnet18", "torchvision:densenet121", "torchvision:googlenet"])
def test_macs_to_a_tap_are_those_of_the_pass_that_ends_there(arch: str) -> None:
    with torch.device("meta"):
        network = build_network(BackboneConfig(arch=arch, weights="random"))
    axis = derive_depth_axis(network, input_px=224)
    by_tap = count_tap_macs(network, axis, 160)
    assert list(by_tap) == sorted(by_tap)
    assert by_tap[-1] == count_macs(network, 160)
    for tap in (0, 2, len(axis) // 2, "pooled"):
        place = resolve_tap(axis, tap).index
        tapped = TappedNetwork(copy.deepcopy(network), axis, [tap])
        assert by_tap[place] == count_macs(tapped, 160)
    assert by_tap[2] < by_tap[-1] / 2


def test_macs_to_the_stem_are_those_of_its_convolution() -> None:
    with torch.device("meta"):
        network = build_network(BackboneConfig(arch="torchvision:resnet18", weights="random"))
    axis = derive_depth_axis(network, input_px=224)
    assert count_tap_macs(network, axis, 224)[0] == 64 * 112 * 112 * 3 * 7 * 7


def test_an_image_too_small_for_the_axis_is_refused() -> None:
    network = build_network(BackboneConfig(arch="torchvision:resnet18", weights="random"))
    with pytest.raises(ConfigError, match="32 px are too small"):
        derive_depth_axis(network, input_px=32)


def test_an_input_that_does_not_fit_is_refused() -> None:
    network = build_network(BackboneConfig(arch="lenet5", weights="random"))
    with pytest.raises(ConfigError, match="cannot take images of 48 px"):
        derive_depth_axis(network, input_px=48)


@pytest.mark.parametrize("name", ["swin_t", "swin_v2_t"])
def test_a_transformer_is_refused(name: str) -> None:
    with torch.device("meta"):
        network = torchvision.models.get_model(name, weights=None)
    with pytest.raises(ConfigError, match="no ConvNet"):
        derive_depth_axis(network, input_px=256)


def test_a_single_layer_has_no_axis() -> None:
    with pytest.raises(ConfigError, match="no depth axis"):
        derive_depth_axis(nn.Sequential(nn.Flatten(), nn.Linear(3 * 16, 2)), input_px=4)
