from __future__ import annotations

import copy
import pickle
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from convoy.core.errors import ConfigError
from convoy.vision.backbone_config import BackboneConfig, NewLayers
from convoy.vision.backbones import build_network, depth_axis
from convoy.vision.depth_axis import count_macs
from convoy.vision.freezing import automatic_freeze_depth, freeze, resolve_freeze_depth, set_train_mode
from convoy.vision.optimisation import build_optimiser
from convoy.vision.partial_reuse import PartialReuseNetwork
from convoy.vision.recipes import reuse_phases
from convoy.vision.stages import DepthAxis, StageKind, TapSide
from convoy.vision.tapping import TappedNetwork
from convoy.vision.training_config import AUTO, BODY, Optimiser
from convoy.vision.weights import load_weights, read_state_dict, state_to_safetensors

NUM_CLASSES = 4
LAYERS = {"convs": [{"width": 12}, {"width": 8, "kernel_px": 1, "stride": 2}], "hidden_widths": [10, 6]}
# Sequential, residual, dense, with branches, with inverted residuals, with pre-activation or in-place layers.
CASES = [
    ("lenet5", "c1", 32),
    ("cifar_resnet20", "layer2", 32),
    ("torchvision:vgg11_bn", 2, 64),
    ("torchvision:resnet18", "layer2", 64),
    ("torchvision:resnet18", "stem", 64),
    ("torchvision:densenet121", "features.denseblock2", 64),
    ("torchvision:densenet121", "features.denseblock4", 64),
    ("torchvision:googlenet", "inception3b", 64),
    ("torchvision:mobilenet_v2", "features.4", 64),
    ("torchvision:efficientnet_b0", "features.2", 64),
    ("torchvision:convnext_tiny", "features.3", 64),
    ("torchvision:squeezenet1_0", "features.5", 64),
    ("timm:xception41", "blocks.3", 96),
    ("timm:xception41p", "blocks.3", 96),
    ("timm:inception_resnet_v2", "mixed_5b", 96),
    ("timm:mobilenetv3_small_100", "blocks.1", 64),
]


def reuse_config(arch: str, after: str | int, **changes: Any) -> BackboneConfig:
    layers = NewLayers.model_validate({"after": after, **LAYERS, **changes})
    return BackboneConfig(arch=arch, weights="random", num_classes=NUM_CLASSES, new_layers=layers)


class Case:
    """A network that reuses another, and that other with the very same weights."""

    def __init__(self, arch: str, after: str | int, px: int) -> None:
        config = BackboneConfig(arch=arch, weights="random", seed=1)
        self.full = build_network(config)
        self.full_axis = depth_axis(config, self.full)
        self.reuse = reuse_config(arch, after)
        network = build_network(self.reuse)
        assert isinstance(network, PartialReuseNetwork)
        self.network, self.axis = network, depth_axis(self.reuse, network)
        self.network.load_body(self.full.state_dict())
        self.px = px
        self.images_BCHW = torch.randn(3, 3, px, px, generator=torch.Generator().manual_seed(0))

    @property
    def num_reused(self) -> int:
        return sum(stage.name.startswith("body.") for stage in self.axis)


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"{case[0]}-{case[1]}")
def case(request: pytest.FixtureRequest) -> Case:
    return Case(*request.param)


def features(network: nn.Module, axis: DepthAxis, taps: list[str | int], images: Tensor) -> dict[str, Tensor]:
    with torch.no_grad():
        found: dict[str, Tensor] = TappedNetwork(copy.deepcopy(network), axis, taps)(images)
    return found


def test_it_gives_logits_and_holds_nothing_behind_the_reused_stages(case: Case) -> None:
    with torch.no_grad():
        assert case.network(case.images_BCHW).shape == (3, NUM_CLASSES)
    reused = {
        f"body.{name}" for stage in case.full_axis.stages[: case.num_reused] for name in stage.parameter_names
    }
    parameters = {name for name, _ in case.network.named_parameters()}
    assert {name for name in parameters if name.startswith("body.")} == reused
    # Norms without parameters of their own do not occur here, so buffers go with parameters.
    modules = {name.rpartition(".")[0] for name in reused}
    buffers = {name.rpartition(".")[0] for name, _ in case.network.body.named_buffers(prefix="body")}
    assert buffers <= modules


def test_reused_stages_give_the_very_features_of_the_whole_network(case: Case) -> None:
    last = case.num_reused - 1
    taps: list[str | int] = sorted({0, last // 2, last})
    expected = features(case.full, case.full_axis, taps, case.images_BCHW)
    found = features(case.network, case.axis, taps, case.images_BCHW)
    for tap in expected:
        assert torch.equal(found[tap], expected[tap]), tap


def test_the_new_layers_see_the_very_maps_at_the_tap(case: Case) -> None:
    seen: list[Tensor] = []
    network = copy.deepcopy(case.network)
    network.convs.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    stage = case.full_axis[case.num_reused - 1]
    full = copy.deepcopy(case.full)
    point = stage.tap_point
    expected: list[Tensor] = []
    module = full.get_submodule(point.module_name)
    if point.side is TapSide.INPUT:
        module.register_forward_pre_hook(lambda _, args: expected.append(args[0].clone()))
    else:
        module.register_forward_hook(lambda _, args, output: expected.append(output.clone()))
    with torch.no_grad():
        network(case.images_BCHW)
        full(case.images_BCHW)
    assert len(seen) == 1
    assert torch.equal(seen[0], expected[point.call_index])
    assert seen[0].shape[1] == stage.channels


def test_the_axis_names_every_parameter_once_and_goes_on_with_the_new_layers(case: Case) -> None:
    names = [name for stage in case.axis for name in stage.parameter_names]
    assert sorted(names) == sorted(name for name, _ in case.network.named_parameters())
    assert case.axis.off_axis == ()
    assert [stage.index for stage in case.axis] == list(range(len(case.axis)))
    new = case.axis.stages[case.num_reused :]
    assert [stage.name for stage in new] == ["convs.0", "convs.1", "pooled", "mlp.0", "mlp.3", "mlp.6"]
    assert [stage.channels for stage in new] == [12, 8, 8, 10, 6, NUM_CLASSES]
    assert [stage.kind for stage in new] == [StageKind.SPATIAL] * 2 + [StageKind.VECTOR] * 4
    for stage in case.axis:
        assert stage.num_parameters == sum(
            case.network.get_parameter(name).numel() for name in stage.parameter_names
        )


def test_every_kind_of_stage_can_be_tapped_in_one_pass(case: Case) -> None:
    taps: list[str | int] = [case.num_reused - 1, "convs.0", "convs.1", "pooled", "mlp.0", "logits"]
    found = features(case.network, case.axis, taps, case.images_BCHW)
    for tap in taps:
        stage = case.axis[tap] if isinstance(tap, int) else None
        channels = (
            stage.channels if stage else {"convs.0": 12, "mlp.0": 10, "logits": NUM_CLASSES}.get(str(tap), 8)
        )
        assert found[str(tap)].shape == (3, channels)
        assert torch.equal(
            found[str(tap)], features(case.network, case.axis, [tap], case.images_BCHW)[str(tap)]
        )
    with torch.no_grad():
        assert torch.equal(found["logits"], case.network(case.images_BCHW))
    assert torch.allclose(found["convs.1"], found["pooled"], atol=1e-6)
    # As on every axis, behind the activation.
    assert float(found["mlp.0"].min()) >= 0


def test_a_deep_copy_is_a_network_of_its_own(case: Case) -> None:
    copied = copy.deepcopy(case.network)
    with torch.no_grad():
        expected = case.network(case.images_BCHW)
        assert torch.equal(copied(case.images_BCHW), expected)
        for parameter in copied.parameters():
            parameter.zero_()
        assert not copied(case.images_BCHW).any()
        assert torch.equal(case.network(case.images_BCHW), expected)


def test_a_frozen_body_keeps_weights_and_statistics_while_new_layers_train(case: Case) -> None:
    network, axis = copy.deepcopy(case.network), case.axis
    freeze(network, axis, case.num_reused)
    set_train_mode(network, axis, case.num_reused)
    for dropout in network.modules():
        if isinstance(dropout, nn.Dropout):
            dropout.p = 0.0  # with three images it may silence all of six units, and then nothing moves
    before = {name: one.clone() for name, one in network.state_dict().items()}
    optimiser = torch.optim.SGD([one for one in network.parameters() if one.requires_grad], lr=0.1)
    nn.functional.cross_entropy(network(case.images_BCHW), torch.tensor([0, 1, 2])).backward()
    optimiser.step()
    after = network.state_dict()
    assert all(torch.equal(after[name], one) for name, one in before.items() if name.startswith("body."))
    moved = {name for name, one in before.items() if not torch.equal(after[name], one)}
    assert {"convs.0.0.weight", "convs.0.1.running_mean", "mlp.6.weight"} <= moved


def test_its_weights_survive_a_file(case: Case) -> None:
    data = state_to_safetensors(case.network.state_dict())
    other = build_network(case.reuse.model_copy(update={"seed": 9}))
    with torch.no_grad():
        expected = case.network(case.images_BCHW)
        assert not torch.equal(other(case.images_BCHW), expected)
        load_weights(other, read_state_dict(data))
        assert torch.equal(other(case.images_BCHW), expected)


def test_it_costs_less_than_the_whole_network(case: Case) -> None:
    macs = count_macs(case.network, case.px)
    assert macs > 0
    assert macs < count_macs(case.full, case.px) or case.num_reused == len(case.full_axis) - 2


def small(**changes: Any) -> PartialReuseNetwork:
    network = build_network(reuse_config("cifar_resnet20", "layer1", **changes))
    assert isinstance(network, PartialReuseNetwork)
    return network


def test_new_layers_depend_on_the_seed_and_nothing_else() -> None:
    config = reuse_config("cifar_resnet20", "layer1")
    torch.manual_seed(1)
    first = build_network(config).state_dict()
    torch.manual_seed(2)
    state_before = torch.get_rng_state()
    second = build_network(config).state_dict()
    assert torch.equal(torch.get_rng_state(), state_before)
    assert all(torch.equal(second[name], one) for name, one in first.items())
    other = build_network(config.model_copy(update={"seed": 1})).state_dict()
    assert not torch.equal(other["convs.0.0.weight"], first["convs.0.0.weight"])


def test_layers_are_as_configured() -> None:
    network = small(dropout=0.4, convs=[{"width": 6, "kernel_px": 5, "stride": 2}], hidden_widths=[])
    with torch.no_grad():
        assert network(torch.randn(2, 3, 32, 32)).shape == (2, NUM_CLASSES)
    assert [stage.name for stage in network.axis][-3:] == ["convs.0", "pooled", "mlp.0"]
    assert network.axis[len(network.axis) - 3].resolution_px == 16
    deeper = small(dropout=0.4)
    assert [one.p for one in deeper.modules() if isinstance(one, nn.Dropout)] == [0.4, 0.4]
    # Without new convolutions the maps are pooled at once.
    bare = small(convs=[], hidden_widths=[7])
    with torch.no_grad():
        assert bare(torch.randn(2, 3, 32, 32)).shape == (2, NUM_CLASSES)
        tapped = TappedNetwork(bare, bare.axis, ["body.layer1.2", "pooled"])(torch.randn(2, 3, 32, 32))
    assert torch.allclose(tapped["body.layer1.2"], tapped["pooled"], atol=1e-6)


def test_dropout_behind_frozen_hidden_layers_is_that_of_the_layer_that_trains() -> None:
    network = small()
    set_train_mode(network, network.axis, len(network.axis) - 2)
    assert [one.training for one in network.mlp] == [False, False, True] + [True] * 4
    set_train_mode(network, network.axis, len(network.axis) - 1)
    assert [one.training for one in network.mlp] == [False] * 5 + [True] * 2


def test_weights_of_another_network_are_refused_with_the_misfits() -> None:
    network = small()
    state = build_network(BackboneConfig(arch="cifar_resnet20", weights="random")).state_dict()
    state["conv1.weight"] = torch.zeros(3, 3, 3, 3)
    del state["layer1.0.conv1.weight"]
    told = "conv1.weight is (3, 3, 3, 3), not (16, 3, 3, 3); layer1.0.conv1.weight is missing, not"
    with pytest.raises(ConfigError, match=re.escape(told)):
        network.load_body(state)


@pytest.mark.parametrize("after", ["pooled", "linear", "logits"])
def test_new_convolutions_need_maps(after: str) -> None:
    with pytest.raises(ConfigError, match="gives vectors"):
        build_network(reuse_config("cifar_resnet20", after))


def test_an_unknown_stage_to_reuse_is_an_error_of_that_key() -> None:
    with pytest.raises(ConfigError, match="no stage 'layer9'") as caught:
        build_network(reuse_config("cifar_resnet20", "layer9"))
    assert caught.value.where == "reuse.after"


@pytest.mark.parametrize(
    ("wanted", "depth"), [("layer1", 4), ("body.layer1", 4), ("layer1.0", 2), ("convs.0", 6), ("stem", 1)]
)
def test_a_freeze_depth_below_new_layers_may_be_named_as_in_the_original_network(
    wanted: str, depth: int
) -> None:
    config = reuse_config("cifar_resnet20", "layer2.0")
    axis = depth_axis(config, build_network(config))
    assert resolve_freeze_depth(axis, wanted, images_per_class=100) == depth
    with pytest.raises(ConfigError, match="no stage 'layer9'") as caught:
        resolve_freeze_depth(axis, "layer9", images_per_class=100)
    assert caught.value.where == "freeze_depth"


def test_new_layers_need_a_number_of_classes() -> None:
    with pytest.raises(ValueError, match="need num_classes"):
        BackboneConfig(arch="lenet5", new_layers=NewLayers(after="c1"))


def test_it_pickles() -> None:
    network = small()
    images_BCHW = torch.randn(2, 3, 32, 32)
    copied = pickle.loads(pickle.dumps(network))
    with torch.no_grad():
        assert torch.equal(copied(images_BCHW), network(images_BCHW))


# Behind their maps DenseNets have a ReLU in place, and VoVNets modules that an identity cannot stand in for.
IN_PLACE, OF_SEVERAL_INPUTS = "torchvision:densenet121", "timm:vovnet39a"


@pytest.mark.parametrize(
    ("arch", "after", "px"),
    [
        ("cifar_resnet20", "layer1", 32),
        (IN_PLACE, "features.transition1.conv", 64),
        (OF_SEVERAL_INPUTS, "stages.2.blocks.1.conv_concat.conv", 64),
    ],
)
def test_compiled_it_gives_the_same_logits(arch: str, after: str | int, px: int) -> None:
    network = build_network(reuse_config(arch, after)).eval()
    images_BCHW = torch.randn(2, 3, px, px)
    torch.compiler.reset()
    with torch.no_grad():
        compiled = torch.compile(network, backend="eager", fullgraph=True)
        assert torch.allclose(compiled(images_BCHW), network(images_BCHW), atol=1e-6)


def test_exported_it_gives_the_same_logits() -> None:
    network = build_network(reuse_config(IN_PLACE, "features.transition1.conv")).eval()
    images_BCHW = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        exported = torch.export.export(network, (images_BCHW,)).module()
        assert torch.allclose(exported(images_BCHW), network(images_BCHW), atol=1e-6)


@pytest.mark.parametrize("images_per_class", [5, 91, 5000])
def test_auto_and_body_freeze_no_new_layer(images_per_class: float) -> None:
    config = reuse_config("torchvision:resnet18", "layer2")
    axis = depth_axis(config, build_network(config))
    assert axis[axis.num_reused - 1].name.startswith("body.")
    assert axis[axis.num_reused].name == "convs.0"
    assert resolve_freeze_depth(axis, BODY, images_per_class=images_per_class) == axis.num_reused
    automatic = resolve_freeze_depth(axis, AUTO, images_per_class=images_per_class)
    assert automatic == automatic_freeze_depth(axis.num_reused, images_per_class)


def test_new_layers_train_at_the_full_rate_and_reused_ones_at_their_share() -> None:
    config = reuse_config("torchvision:resnet18", "layer2")
    network = build_network(config)
    (phase,) = reuse_phases(4, 0)
    optimiser = build_optimiser(network, depth_axis(config, network), phase, Optimiser())
    rates = {id(parameter): group["lr"] for group in optimiser.param_groups for parameter in group["params"]}
    for name, parameter in network.named_parameters():
        share = phase.body_rate if name.startswith("body.") else 1.0
        assert rates[id(parameter)] == pytest.approx(phase.learning_rate * share), name
