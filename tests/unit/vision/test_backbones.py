from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torchvision
from pydantic import ValidationError
from torch import nn

from convoy.core.errors import ConfigError, StoreUnavailable, VersionMismatch
from convoy.vision.backbone_config import BackboneConfig, WeightSource, weight_source
from convoy.vision.backbones import (
    build_network,
    build_pretrained,
    default_preset,
    depth_axis,
    native_px,
    pretrained_classes,
    require_recorded,
    with_published_outputs,
)
from convoy.vision.factories import with_pinned_code
from convoy.vision.libraries import Torchvision
from convoy.vision.presets import EvalPreset, Interpolation
from made_factories import ARCH, write_factory


def random_backbone(arch: str, **fields: object) -> BackboneConfig:
    return BackboneConfig(arch=arch, weights="random", **fields)


def first_weight(network: nn.Module) -> torch.Tensor:
    return next(network.parameters())


@pytest.mark.parametrize("arch", ["lenet5", "cifar_resnet20", "torchvision:squeezenet1_1", "timm:resnet10t"])
def test_the_seed_alone_decides_the_weights(arch: str) -> None:
    torch.manual_seed(1)
    one = build_network(random_backbone(arch))
    torch.manual_seed(2)
    two = build_network(random_backbone(arch))
    other = build_network(random_backbone(arch, seed=1))
    assert all(
        torch.equal(left, right) for left, right in zip(one.parameters(), two.parameters(), strict=True)
    )
    assert not torch.equal(first_weight(one), first_weight(other))
    assert not one.training


def test_building_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    build_network(random_backbone("lenet5", seed=7))
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize(
    "arch", ["lenet5", "cifar_resnet32", "torchvision:mobilenet_v3_small", "timm:resnet10t"]
)
def test_num_classes_sets_the_size_of_the_logits(arch: str) -> None:
    config = random_backbone(arch, num_classes=7)
    with torch.no_grad():
        logits_BD = build_network(config)(torch.zeros(1, 3, native_px(config), native_px(config)))
    assert logits_BD.shape == (1, 7)


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_networks_with_auxiliary_classifiers_come_without(
    name: str, recwarn: pytest.WarningsRecorder
) -> None:
    with torch.device("meta"):
        network = build_network(random_backbone(f"torchvision:{name}"))
        logits_BD = network.train()(torch.empty(2, 3, 299, 299))
    assert isinstance(logits_BD, torch.Tensor)
    assert not any("aux" in parameter.lower() for parameter, _ in network.named_parameters())
    assert not recwarn.list


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_their_preset_replaces_the_normalisation_inside_torchvisions_network(name: str) -> None:
    """torchvision normalises by ImageNet, then again inside; the preset must give the plain network the same."""
    preset = default_preset(BackboneConfig(arch=f"torchvision:{name}"))
    pixels_BCHW = torch.rand(2, 3, 4, 4)
    theirs = torchvision.models.get_model_weights(name).DEFAULT.transforms()
    with torch.device("meta"):
        network = torchvision.models.get_model(
            name, weights=None, transform_input=True, aux_logits=False, init_weights=False
        )
    inside_BCHW = network._transform_input(_normalise(pixels_BCHW, theirs.mean, theirs.std))
    assert torch.allclose(_normalise(pixels_BCHW, preset.mean, preset.std), inside_BCHW, atol=1e-6)


def _normalise(pixels_BCHW: torch.Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> torch.Tensor:
    return (pixels_BCHW - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


@pytest.mark.parametrize(
    ("arch", "nearest"),
    [
        ("resnet18", "torchvision:resnet18"),
        ("torchvision:resnet81", "torchvision:resnet18"),
        ("timm:convnext_tinny", "timm:convnext_tiny"),
        ("cifar_resnet21", "cifar_resnet20"),
        ("qqqq", "torchvision:<name>"),
    ],
)
def test_an_unknown_architecture_is_an_error_that_names_near_ones(arch: str, nearest: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build_network(random_backbone(arch))
    assert nearest in caught.value.next_step


@pytest.fixture
def factory_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    write_factory(tmp_path, monkeypatch)
    return ARCH.partition(":")[0]


def test_a_factory_builds_the_users_own_network(factory_module: str) -> None:
    config = random_backbone(f"{factory_module}:network", num_classes=5, preset=EvalPreset(crop_px=48))
    assert build_network(config)(torch.zeros(1, 3, 48, 48)).shape == (1, 5)
    assert native_px(config) == 48


@pytest.mark.parametrize(
    ("arch", "message"),
    [
        ("made_network:absent", "absent"),
        ("no_such_module:network", "no_such_module"),
        ("made_network:nothing", "NoneType"),
    ],
)
def test_a_factory_that_gives_no_network_is_an_error(factory_module: str, arch: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_network(random_backbone(arch))


@pytest.mark.parametrize(
    ("arch", "meant"),
    [
        ("torchvison:resnet18", "torchvision:resnet18"),
        ("Torchvision:resnet18", "torchvision:resnet18"),
        ("tim:convnext_tiny", "timm:convnext_tiny"),
        ("no_such_module:network", None),
        # The package is there: it is one of its modules, or what that imports, that is not.
        ("made_package.torchvison:network", None),
        ("made_importer:network", None),
    ],
)
def test_a_misspelt_library_is_named_where_nothing_is_called_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arch: str, meant: str | None
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "made_package").mkdir()
    (tmp_path / "made_importer.py").write_text("import torchvison\n")
    for refuse in (build_network, with_pinned_code):
        with pytest.raises(ConfigError, match="No module named") as caught:
            refuse(random_backbone(arch))
        offered = caught.value.next_step.partition(";")[0]
        assert offered == (
            "name an importable package.module:function that returns a torch.nn.Module"
            if meant is None
            else f"write {meant} if that is meant"
        )


def test_a_factory_needs_a_preset(factory_module: str) -> None:
    with pytest.raises(ConfigError, match="wants its images"):
        default_preset(random_backbone(f"{factory_module}:network"))


@pytest.mark.parametrize(
    ("weights", "source"),
    [
        ("random", WeightSource.RANDOM),
        ("IMAGENET1K_V1", WeightSource.NAMED),
        ("in12k_ft_in1k", WeightSource.NAMED),
        ("s3://bucket/key/model.safetensors", WeightSource.URI),
        ("/models/resnet20-12fca82f.th", WeightSource.URI),
        ("best.PTH", WeightSource.URI),
        ("model_best.pth.tar", WeightSource.URI),
        ("pytorch_model.bin", WeightSource.URI),
        ("last.ckpt", WeightSource.URI),
        ("s3://bucket/resnet50-a1_0-14fe96d1", WeightSource.URI),
        ("mine/weights", WeightSource.URI),
    ],
)
def test_weights_say_where_they_come_from(weights: str, source: WeightSource) -> None:
    assert weight_source(BackboneConfig(arch="lenet5", weights=weights)) is source


def test_presets_are_those_of_the_named_weights() -> None:
    first = default_preset(BackboneConfig(arch="torchvision:resnet50", weights="IMAGENET1K_V1"))
    second = default_preset(BackboneConfig(arch="torchvision:resnet50", weights="DEFAULT"))
    assert first == EvalPreset()
    assert second == EvalPreset(resize_px=232)


@pytest.mark.parametrize("weights", ["s3://bucket/resnet50-0676ba61.pth", "nets/own.safetensors"])
def test_a_file_of_weights_has_no_preset_where_published_ones_differ(weights: str) -> None:
    config = BackboneConfig(arch="torchvision:resnet50", weights=weights)
    with pytest.raises(ConfigError, match=r"torchvision:resnet50 differ") as refused:
        default_preset(config)
    assert '{"resize_px": 256, "crop_px": 224' in str(refused.value.next_step)
    assert "as IMAGENET1K_V1, or " in str(refused.value.next_step)
    told = config.model_copy(update={"preset": EvalPreset()})
    assert default_preset(told) == EvalPreset()
    assert default_preset(config.model_copy(update={"arch": "torchvision:resnet18"})) == EvalPreset()


def test_torchvisions_full_names_of_weights_are_understood() -> None:
    weights = "ResNet50_Weights.IMAGENET1K_V2"
    assert weight_source(BackboneConfig(arch="torchvision:resnet50", weights=weights)) is WeightSource.NAMED
    found = default_preset(BackboneConfig(arch="torchvision:resnet50", weights=weights))
    assert found == EvalPreset(resize_px=232)
    with pytest.raises(ConfigError, match=r"ResNet50_Weights\.IMAGENET1K_V2"):
        default_preset(BackboneConfig(arch="torchvision:resnet18", weights=weights))


@pytest.mark.parametrize("arch", ["timm:resnet50.a1_in1k", "resnet50.a1_in1k"])
def test_a_name_with_timms_tag_is_told_where_the_tag_goes(arch: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build_network(BackboneConfig(arch=arch))
    assert caught.value.next_step == "write timm's tag into the weights: arch timm:resnet50, weights a1_in1k"


def test_presets_of_timm_are_those_of_the_tag() -> None:
    preset = default_preset(BackboneConfig(arch="timm:xception41", weights="tf_in1k"))
    assert preset == EvalPreset(
        resize_px=math.floor(299 / 0.903),
        crop_px=299,
        interpolation=Interpolation.BICUBIC,
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
    )


@pytest.mark.parametrize("preset", [{"crop_px": 320}, {"resize_px": 200, "crop_px": 224}])
def test_a_preset_that_would_reject_every_image_is_refused(preset: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="set resize_px to as many as crop_px"):
        default_preset(random_backbone("torchvision:inception_v3", preset=preset))


def test_a_preset_says_what_of_named_weights_is_not_as_usual() -> None:
    """Inception-v3 has other means than ImageNet's, whatever the size."""
    named = BackboneConfig(
        arch="torchvision:inception_v3", preset=EvalPreset.model_validate({"crop_px": 320})
    )
    with pytest.raises(ConfigError, match="leaves out resize_px, mean, std") as refused:
        default_preset(named)
    assert "resize_px=342, mean=[0.5, 0.5, 0.5], std=[0.5, 0.5, 0.5]" in str(refused.value.next_step)
    own = EvalPreset(
        resize_px=342, crop_px=320, interpolation=Interpolation.BILINEAR, mean=(0.5,) * 3, std=(0.5,) * 3
    )
    for told in (own, own.model_copy(update={"mean": (0.4, 0.4, 0.4)})):
        assert default_preset(named.model_copy(update={"preset": told})) == told
    files = named.model_copy(update={"weights": "nets/inception.pth", "preset": EvalPreset(crop_px=192)})
    assert default_preset(files) == EvalPreset(crop_px=192)


def test_a_record_that_took_the_last_maps_for_logits_is_not_gone_on_with() -> None:
    config = BackboneConfig(arch="timm:resnet18", weights="random", num_classes=0)
    network = build_network(config)
    axis = depth_axis(config, network)
    require_recorded(config, axis, 0)
    with pytest.raises(VersionMismatch, match="record from before says 512"):
        require_recorded(config, axis, 512)


def test_a_preset_of_the_config_wins_but_does_not_move_the_axis() -> None:
    mine = EvalPreset(resize_px=None, crop_px=64)
    config = random_backbone("torchvision:resnet18", preset=mine)
    assert default_preset(config) == mine
    assert native_px(config) == 224


def test_a_transform_that_cannot_be_said_is_refused() -> None:
    with pytest.raises(ConfigError, match="not cut but squash"):
        default_preset(BackboneConfig(arch="timm:convnextv2_large", weights="fcmae_ft_in22k_in1k_384"))


@pytest.mark.parametrize(("arch", "px"), [("timm:tf_efficientnetv2_b3", 240), ("timm:dm_nfnet_f0", 192)])
def test_a_preset_of_ones_own_serves_where_the_default_weights_squash(arch: str, px: int) -> None:
    mine = EvalPreset(resize_px=px, crop_px=px)
    config = random_backbone(arch, preset=mine)
    assert (default_preset(config), native_px(config)) == (mine, px)


@pytest.mark.parametrize(
    ("arch", "known"), [("torchvision:resnet50", "IMAGENET1K_V2"), ("timm:convnext_tiny", "fb_in1k")]
)
def test_unknown_weights_are_an_error_that_names_the_known(arch: str, known: str) -> None:
    with pytest.raises(ConfigError) as caught:
        default_preset(BackboneConfig(arch=arch, weights="IMAGENET9K"))
    assert known in caught.value.next_step


@pytest.mark.parametrize("arch", ["lenet5", "timm:botnet50ts_256"])
def test_architectures_without_weights_say_so(arch: str) -> None:
    with pytest.raises(ConfigError, match="has no weights 'DEFAULT'"):
        build_pretrained(BackboneConfig(arch=arch))


def test_a_download_that_fails_can_be_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for variable in ("https_proxy", "HTTPS_PROXY"):
        # Nothing listens on the discard port.
        monkeypatch.setenv(variable, "http://127.0.0.1:9")
    with pytest.raises(StoreUnavailable, match="'IMAGENET1K_V1' could not be downloaded") as caught:
        build_pretrained(BackboneConfig(arch="torchvision:resnet18", weights="IMAGENET1K_V1"))
    assert caught.value.retryable
    assert "backbone.weights" in caught.value.next_step
    told = capsys.readouterr()
    assert told.out == "", "stdout is the result of a job"
    assert "Downloading" in told.err


def test_classes_of_named_weights_are_in_the_order_of_the_logits() -> None:
    for arch in ("torchvision:resnet18", "timm:resnet18"):
        classes = pretrained_classes(BackboneConfig(arch=arch))
        assert len(classes) == 1000
        assert classes[0].startswith("tench")
        assert classes[999].startswith("toilet tissue")
    assert pretrained_classes(random_backbone("torchvision:resnet18")) is None


def test_weights_of_which_only_the_features_were_published_name_no_classes() -> None:
    config = BackboneConfig(arch="torchvision:vgg16", weights="IMAGENET1K_FEATURES")
    assert pretrained_classes(config) is None
    assert with_published_outputs(config) == config


def test_classes_that_timm_names_alike_are_told_apart_by_their_synset() -> None:
    classes = pretrained_classes(BackboneConfig(arch="timm:resnet18"))
    assert (classes[134], classes[517]) == ("crane (n02012849)", "crane (n03126707)")
    of_22k = pretrained_classes(BackboneConfig(arch="timm:resnetv2_50x1_bit", weights="goog_in21k"))
    assert len(set(classes)) == len(classes)
    assert len(set(of_22k)) == len(of_22k) > 21000


def test_every_classifier_of_torchvision_has_a_preset() -> None:
    library = Torchvision()
    for name in library.names():
        assert library.preset(name, "DEFAULT").crop_px >= 224


@pytest.mark.parametrize(
    "fields",
    [
        {"seed": -1},
        {"num_classes": -1},
        {"num_classes": 0},
        {"weights_digest": "12"},
        {"weights": None},
        {"depth": 3},
    ],
)
def test_impossible_configs_are_refused(fields: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        BackboneConfig.model_validate({"arch": "lenet5", **fields})
