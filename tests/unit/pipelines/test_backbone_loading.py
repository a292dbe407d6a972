"""Networks of named weights, as workers build them from their records."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn

from convoy.core.errors import ConfigError, DataError, ObjectNotFound
from convoy.core.fingerprints import canonical_json, digest
from convoy.pipelines import backbone_loading
from convoy.pipelines.backbone_loading import backbone_preset, read_backbone_state
from convoy.pipelines.backbone_record import BACKBONES, BackboneRecord
from convoy.pipelines.classifiers import as_is
from convoy.pipelines.feature_plan import ExtractionConfig
from convoy.pipelines.models import fetch_backbone
from convoy.pipelines.network_building import NewNetwork
from convoy.storage.bundles import MODEL_FILE
from convoy.storage.local_store import LocalStore
from convoy.vision.backbone_config import BackboneConfig, ConvLayer, NewLayers
from convoy.vision.backbones import build_network, default_preset
from convoy.vision.libraries import Timm
from convoy.vision.presets import EvalPreset
from convoy.vision.weights import load_weights, state_to_safetensors, weights_digest
from made_bundles import DIGITS, made_classifier, write_classifier


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LocalStore:
    """A workspace, and timm's networks of any tag as they are, but for the download."""

    def without_download(self: Timm, name: str, weights: str) -> nn.Module:
        config = self._pretrained_config(name, weights)
        network: nn.Module = timm.create_model(name, pretrained=False, pretrained_cfg=config)
        return network

    monkeypatch.setattr(Timm, "pretrained", without_download)
    return LocalStore(str(tmp_path))


@pytest.mark.parametrize(
    ("arch", "weights", "num_classes", "recorded"),
    [
        ("timm:resnet10t", "c3_in1k", None, None),
        ("timm:resnet10t", "DEFAULT", 1000, 1000),
        ("timm:resnet10t", "c3_in1k", 7, 1000),
        ("timm:mobilenetv3_large_100", "miil_in21k", None, 11221),
        ("timm:convnextv2_atto", "fcmae", None, 0),
    ],
)
def test_workers_build_the_network_of_named_weights_with_its_number_of_outputs(
    store: LocalStore, arch: str, weights: str, num_classes: int | None, recorded: int | None
) -> None:
    record = fetch_backbone(store, BackboneConfig(arch=arch, weights=weights, num_classes=num_classes))
    assert record.config.num_classes == recorded
    assert load_weights(build_network(record.config), read_backbone_state(store, record)) == ()


@pytest.mark.parametrize(
    ("arch", "weights"), [("timm:mobilenetv3_large_100", "miil_in21k"), ("timm:convnextv2_atto", "fcmae")]
)
def test_a_training_begins_with_named_weights_of_any_number_of_outputs(
    store: LocalStore, arch: str, weights: str
) -> None:
    record = fetch_backbone(store, BackboneConfig(arch=arch, weights=weights))
    new = NewNetwork(BackboneConfig(arch=arch, weights="trained", num_classes=5))
    assert new.take_weights(store, record, tuple("abcde")) is None
    state, taken = read_backbone_state(store, record), new.network.state_dict()
    classifier = new.axis.stages[-1].parameter_names
    assert new.axis.num_classes == 5
    assert all(torch.equal(taken[name], state[name]) for name in taken if name not in classifier)


def taken_from(store: LocalStore, record: BackboneRecord, config: BackboneConfig) -> set[str]:
    """The parts of a network (body, convs, mlp.<n>) that began with the weights of a record, under names alike."""
    new = NewNetwork(config.model_copy(update={"weights": "trained", "seed": 1}))
    new.take_weights(store, record, tuple(map(str, range(new.axis.num_classes))))
    state = read_backbone_state(store, record)
    fresh, taken = build_network(new.config).state_dict(), new.network.state_dict()
    weights = [name for name in taken if not torch.equal(taken[name], fresh[name])]
    assert all(torch.equal(taken[name], state[name]) for name in weights)
    return {re.match(r"body|convs|mlp\.\d+", name)[0] for name in weights}  # type: ignore[index]


@pytest.mark.parametrize(
    ("num_classes", "changes", "taken"),
    [
        (7, {}, {"body", "convs", "mlp.0"}),
        (5, {}, {"body", "convs", "mlp.0"}),
        (7, {"convs": (ConvLayer(width=16),)}, {"body"}),
        (7, {"after": "layer1.0"}, {"body"}),
    ],
)
def test_a_training_begins_with_the_layers_of_a_network_with_new_layers(
    store: LocalStore, tmp_path: Path, num_classes: int, changes: dict[str, Any], taken: set[str]
) -> None:
    layers = NewLayers(after="layer1", convs=(ConvLayer(width=8),), hidden_widths=(16,))
    config = BackboneConfig(arch="cifar_resnet20", weights="random", num_classes=7, new_layers=layers)
    (tmp_path / "model.safetensors").write_bytes(state_to_safetensors(build_network(config).state_dict()))
    path = str(tmp_path / "model.safetensors")
    record = fetch_backbone(store, config.model_copy(update={"weights": path}))
    wanted = layers.model_copy(update=changes)
    update = {"num_classes": num_classes, "new_layers": wanted}
    assert taken_from(store, record, config.model_copy(update=update)) == taken


def test_a_training_begins_with_named_weights_below_new_layers(store: LocalStore) -> None:
    layers = NewLayers(after="layer1", convs=(ConvLayer(width=8),), hidden_widths=(16,))
    config = BackboneConfig(arch="timm:resnet10t", weights="c3_in1k", num_classes=7, new_layers=layers)
    record = fetch_backbone(store, config)
    new = NewNetwork(config.model_copy(update={"weights": "trained"}))
    assert new.take_weights(store, record, tuple("abcdefg")) is None
    state, body = read_backbone_state(store, record), new.network.get_submodule("body").state_dict()
    assert all(torch.equal(body[name], state[name]) for name in body)


def classifier_beginnings(
    store: LocalStore, record: BackboneRecord, classes: tuple[str, ...]
) -> tuple[str | None, bool, bool]:
    """The note, and whether the classifier is that of the weights, and the one that the seed gives."""
    new = NewNetwork(BackboneConfig(arch=record.arch, weights="trained", num_classes=len(classes), seed=1))
    note = new.take_weights(store, record, classes)
    state, taken = read_backbone_state(store, record), new.network.state_dict()
    fresh = build_network(new.config).state_dict()
    classifier = new.axis.stages[-1].parameter_names
    assert all(torch.equal(taken[name], state[name]) for name in taken if name not in classifier)
    same = (all(torch.equal(taken[name], other[name]) for name in classifier) for other in (state, fresh))
    return note, *same


def test_a_training_keeps_a_classifier_only_where_its_classes_are_known_to_be_the_datasets(
    store: LocalStore, tmp_path: Path
) -> None:
    named = fetch_backbone(store, BackboneConfig(arch="timm:resnet10t", weights="c3_in1k"))
    assert named.classes is not None
    kept, other = named.classes, tuple(reversed(named.classes))
    kept_note = "the classifier begins as that of the weights, whose classes are the dataset's"
    assert classifier_beginnings(store, named, kept) == (kept_note, True, False)
    note, *beginnings = classifier_beginnings(store, named, other)
    assert "begins anew" in str(note)
    assert "name others, or another order" in str(note)
    assert beginnings == [False, True]
    # Ten kinds of animals and ten digits: a file does not tell one from the other.
    config = BackboneConfig(arch="cifar_resnet20", weights="random", num_classes=10)
    (tmp_path / "animals.safetensors").write_bytes(state_to_safetensors(build_network(config).state_dict()))
    path = str(tmp_path / "animals.safetensors")
    of_file = fetch_backbone(store, config.model_copy(update={"weights": path}))
    note, *beginnings = classifier_beginnings(store, of_file, tuple("0123456789"))
    assert "do not name their classes" in str(note)
    assert beginnings == [False, True]


@pytest.mark.parametrize(
    ("name", "words", "todo"),
    [
        ("empty.pt", "no plain state dict: it is empty", "bring the file"),
        ("text.pt", "no plain state dict: it is damaged, or a file of another kind", "bring the file"),
        ("folder", "this is a folder, not a file", "name a file of weights in backbone.weights"),
        ("absent.pt", "the file does not exist", "name a file of weights in backbone.weights"),
    ],
)
def test_a_path_without_weights_is_named_with_what_to_do(
    store: LocalStore, tmp_path: Path, name: str, words: str, todo: str
) -> None:
    (tmp_path / "empty.pt").touch()
    (tmp_path / "text.pt").write_text("epoch,top1\n")
    (tmp_path / "folder").mkdir()
    path = str(tmp_path / name)
    with pytest.raises((DataError, ObjectNotFound), match=words) as caught:
        fetch_backbone(store, BackboneConfig(arch="lenet5", weights=path))
    assert caught.value.where == path
    assert todo in caught.value.next_step


def test_a_training_keeps_the_classifier_of_a_bundle_of_the_same_classes(store: LocalStore) -> None:
    ref = write_classifier(store, "digits", made_classifier(store, 0))
    weights = store.uri(f"{ref.folder}{MODEL_FILE}")
    config = BackboneConfig(arch="lenet5", weights=weights, preset=EvalPreset(resize_px=None, crop_px=32))
    record = fetch_backbone(store, config)
    assert record.classes == DIGITS
    note, is_kept, _ = classifier_beginnings(store, record, DIGITS)
    assert "whose classes are the dataset's" in str(note)
    assert is_kept
    assert not classifier_beginnings(store, record, tuple("abcdefghij"))[1]


def test_a_record_of_before_bundles_were_asked_for_classes_is_renewed(store: LocalStore) -> None:
    ref = write_classifier(store, "digits", made_classifier(store, 0))
    weights = store.uri(f"{ref.folder}{MODEL_FILE}")
    config = BackboneConfig(arch="lenet5", weights=weights, preset=EvalPreset(resize_px=None, crop_px=32))
    before = {info.key for info in store.list_objects(f"{BACKBONES}requests/")}
    record = fetch_backbone(store, config)
    (request,) = {info.key for info in store.list_objects(f"{BACKBONES}requests/")} - before
    store.put(request, canonical_json(record.model_copy(update={"classes": None, "tap_macs": ()})))
    assert fetch_backbone(store, config) == record


@pytest.mark.parametrize("told", [None, EvalPreset(resize_px=None, crop_px=32)])
def test_the_file_of_a_bundle_brings_its_preset_unless_the_config_says_another(
    store: LocalStore, told: EvalPreset | None
) -> None:
    own = EvalPreset(resize_px=40, crop_px=32, mean=(0.4, 0.4, 0.4), std=(0.2, 0.2, 0.2))
    made = made_classifier(store, 0)
    ref = write_classifier(
        store, "digits", replace(made, backbone=made.backbone.model_copy(update={"preset": own}))
    )
    config = BackboneConfig(arch="lenet5", weights=store.uri(f"{ref.folder}{MODEL_FILE}"), preset=told)
    assert backbone_preset(config) == (told or own)
    assert fetch_backbone(store, config).preset == (told or own)


def test_a_record_of_before_bundles_were_asked_for_their_preset_is_renewed(store: LocalStore) -> None:
    ref = write_classifier(store, "digits", made_classifier(store, 0))
    weights = store.uri(f"{ref.folder}{MODEL_FILE}")
    config = BackboneConfig(arch="lenet5", weights=weights)
    record = fetch_backbone(store, config)
    store.delete(entry.key for entry in list(store.list_objects(f"{BACKBONES}requests/")))
    blob = store.head(f"{ref.folder}{MODEL_FILE}")
    wrong = record.model_copy(update={"preset": EvalPreset(resize_px=99)})
    store.put(f"{BACKBONES}requests/{digest([3, config, blob.etag])}.json", canonical_json(wrong))
    assert fetch_backbone(store, config) == record
    assert fetch_backbone(store, config) == record


@pytest.mark.parametrize("beside", [b"[1, 2", b'{"0": "cat"}', b"null"])
def test_what_lies_beside_weights_that_are_no_bundles_does_not_matter(
    store: LocalStore, tmp_path: Path, beside: bytes
) -> None:
    config = BackboneConfig(arch="lenet5", weights="random")
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    (folder / MODEL_FILE).write_bytes(state_to_safetensors(build_network(config).state_dict()))
    for name in ("classes.json", "config.json", "preprocess.json"):
        (folder / name).write_bytes(beside)
    record = fetch_backbone(store, config.model_copy(update={"weights": str(folder / MODEL_FILE)}))
    assert (record.classes, record.preset) == (None, default_preset(config))


def test_a_training_from_scratch_begins_with_what_the_seed_gives(store: LocalStore) -> None:
    config = BackboneConfig(arch="lenet5", weights="random", num_classes=10, seed=3)
    new = NewNetwork(config.model_copy(update={"weights": "trained"}))
    assert new.take_weights(store, fetch_backbone(store, config), tuple("0123456789")) is None
    assert weights_digest(new.network.state_dict()) == weights_digest(build_network(config).state_dict())


def test_what_builds_upon_a_record_finds_it(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    record = fetch_backbone(store, BackboneConfig(arch="timm:mobilenetv3_large_100", weights="miil_in21k"))
    monkeypatch.delattr(backbone_loading, "load_backbone")
    assert fetch_backbone(store, record.config) == record


def keep_as_version_2(store: LocalStore, config: BackboneConfig, **fields: Any) -> BackboneRecord:
    """What a workspace has of a network since before records told the outputs of named weights."""
    record = fetch_backbone(store, config)
    store.delete(entry.key for entry in list(store.list_objects(f"{BACKBONES}requests/")))
    former = record.model_copy(update=fields)
    store.put(f"{BACKBONES}requests/{digest([2, config, ''])}.json", canonical_json(former))
    return former


@pytest.mark.parametrize(("weights", "num_classes"), [("c3_in1k", None), ("random", 7)])
def test_records_of_former_versions_count_where_they_are_right(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch, weights: str, num_classes: int | None
) -> None:
    mirrored = BackboneConfig(arch="timm:resnet10t", weights=weights, num_classes=num_classes)
    former = keep_as_version_2(store, mirrored)
    monkeypatch.delattr(backbone_loading, "load_backbone")
    assert fetch_backbone(store, mirrored) == former


def test_records_of_former_versions_are_renewed_where_they_are_wrong(store: LocalStore) -> None:
    config = BackboneConfig(arch="timm:resnet10t", weights="c3_in1k")
    keep_as_version_2(store, config, num_classes=11821)
    assert fetch_backbone(store, config).num_classes == 1000


def test_records_that_took_the_last_layer_for_a_classifier_are_renewed(store: LocalStore) -> None:
    config = BackboneConfig(arch="timm:mobilenetv3_small_100", weights="random", num_classes=0)
    record = fetch_backbone(store, config)
    request = next(iter(store.list_objects(f"{BACKBONES}requests/"))).key
    store.put(request, canonical_json(record.model_copy(update={"num_classes": 1024})))
    assert fetch_backbone(store, config) == record


def test_torchvisions_own_file_of_a_densenet_is_taken(store: LocalStore, tmp_path: Path) -> None:
    config = BackboneConfig(arch="torchvision:densenet121", weights="random")
    own = build_network(config).state_dict()
    older = {re.sub(r"(denselayer\d+\.(?:norm|conv))([12])", r"\1.\2", name): own[name] for name in own}
    torch.save(older, tmp_path / "densenet121-a639ec97.pth")
    weights = str(tmp_path / "densenet121-a639ec97.pth")
    record = fetch_backbone(store, BackboneConfig(arch=config.arch, weights=weights))
    assert record.weights_digest == weights_digest(own)


def test_a_network_without_classifier_is_not_used_as_it_is(store: LocalStore) -> None:
    record = fetch_backbone(store, BackboneConfig(arch="timm:convnextv2_atto", weights="fcmae"))
    assert record.num_classes == 0
    with pytest.raises(ConfigError, match="no classifier") as caught:
        as_is(record, None, ExtractionConfig())
    assert "linear_probe" in caught.value.next_step


ENCODER = """
from torch import nn

def encoder(num_classes=0):
    convs = (nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    return nn.Sequential(*convs, nn.AdaptiveAvgPool2d(1), nn.Flatten())

def fixed(num_classes=10):
    return nn.Sequential(encoder(), nn.Linear(8, 10))
"""


@pytest.mark.parametrize(
    ("factory", "num_classes", "ending"),
    [
        ("encoder", 5, "without a classifier for 5 classes"),
        # The loss would be that of ten classes, and what was trained could not be evaluated.
        ("fixed", 5, "in 10 outputs for 5 classes"),
        ("fixed", 12, "in 10 outputs for 12 classes"),
    ],
)
def test_a_factory_that_does_not_end_in_the_classes_is_not_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, factory: str, num_classes: int, ending: str
) -> None:
    (tmp_path / "made_encoder.py").write_text(ENCODER)
    monkeypatch.syspath_prepend(tmp_path)
    config = BackboneConfig(
        arch=f"made_encoder:{factory}",
        weights="trained",
        num_classes=num_classes,
        preset=EvalPreset(crop_px=32),
    )
    with pytest.raises(ConfigError, match=ending):
        NewNetwork(config)


SEVERAL_OUTPUTS = """
import torch
from torch import nn

class Network(nn.Module):
    def __init__(self, outputs, num_classes):
        super().__init__()
        self.outputs, self.conv, self.norm = outputs, nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, num_classes)

    def forward(self, images):
        logits = self.fc(self.norm(self.conv(images)).mean(dim=(2, 3)))
        if self.outputs == "tuple" or (self.outputs == "train_tuple" and self.training):
            return logits, logits
        if self.outputs == "dict":
            return {"logits": logits}
        if self.outputs == "random_depth" and self.training and torch.rand(1).item() < 0.5:
            return logits * 2
        return logits

def network_of(outputs):
    return lambda num_classes: Network(outputs, num_classes)

pair, named, aux, random = map(network_of, ("tuple", "dict", "train_tuple", "random_depth"))
"""


@pytest.mark.parametrize(
    ("factory", "returned"),
    [("pair", "in eval mode .* tuple"), ("named", "in eval mode .* dict"), ("aux", "in train mode .* tuple")],
)
def test_a_factory_whose_network_returns_more_than_logits_is_not_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, factory: str, returned: str
) -> None:
    with pytest.raises(ConfigError, match=returned) as caught:
        NewNetwork(_several_outputs(tmp_path, monkeypatch, factory))
    assert "logits alone" in caught.value.next_step


def test_a_network_that_can_train_with_data_only_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    new = NewNetwork(_several_outputs(tmp_path, monkeypatch, "random"))
    assert new.axis.num_classes == 5
    assert not any(module.training for module in new.network.modules())
    assert new.network.get_buffer("norm.num_batches_tracked") == 0


def _several_outputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, factory: str) -> BackboneConfig:
    monkeypatch.delitem(sys.modules, "made_outputs", raising=False)
    (tmp_path / "made_outputs.py").write_text(SEVERAL_OUTPUTS)
    monkeypatch.syspath_prepend(tmp_path)
    arch = f"made_outputs:{factory}"
    return BackboneConfig(arch=arch, weights="trained", num_classes=5, preset=EvalPreset(crop_px=32))
