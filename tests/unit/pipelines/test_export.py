from __future__ import annotations

import importlib.util
import json
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from PIL import Image
from torch import Tensor

from convoy.core.crop_policies import Averaging, CropPlan, CropPolicy
from convoy.core.errors import ConfigError, DataError, ExitCode, TrainingError
from convoy.core.progress import Silent
from convoy.pipelines.backbone_loading import load_backbone, read_backbone_state
from convoy.pipelines.classifier_tensors import Readout, classifier_files, stored_head
from convoy.pipelines.classifiers import Classifier, Strategy
from convoy.pipelines.committees import (
    CommitteeRecord,
    EnsembleConfig,
    configured_committee,
    write_ensemble,
)
from convoy.pipelines.dataset import DatasetConfig, freeze
from convoy.pipelines.export import LOGIT_TOLERANCE, ExportConfig, ExportReport, compare_logits, run_export
from convoy.pipelines.feature_plan import FeatureDtype, PrecisionChoice
from convoy.storage.bundles import write_bundle
from convoy.storage.local_store import LocalStore
from convoy.vision.backbone_config import BackboneConfig
from convoy.vision.backbones import build_network
from convoy.vision.decode_rule import DecodeRule
from convoy.vision.engine import FeatureEngine
from convoy.vision.engine_options import EngineOptions, Precision
from convoy.vision.ensembling import joint_logits, member_values
from convoy.vision.head_config import HeadKind, HeadSpec
from convoy.vision.heads import Head
from convoy.vision.presets import EvalPreset
from convoy.vision.weights import load_weights
from made_bundles import DIGITS, FP32, made_classifier, write_classifier

PRESET = EvalPreset(resize_px=None, crop_px=32)

# Its graph adds what its Python code does not.
TWO_FACED = """
import torch


class TwoFaced(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = torch.nn.Conv2d(3, 4, 3)
        self.fc = torch.nn.Linear(4, 10)

    def forward(self, images):
        pooled = self.stem(images).mean((2, 3))
        return self.fc(pooled + 1 if torch.compiler.is_exporting() else pooled)


class Moody(TwoFaced):
    def forward(self, images):
        maps = self.stem(images)
        if images.device.type != "meta" and images.sum() > 0:
            maps = maps.relu()
        return self.fc(maps.mean((2, 3)))


class Spectral(TwoFaced):
    def forward(self, images):
        return self.fc(torch.linalg.svdvals(self.stem(images)).mean(2))


def network():
    return TwoFaced()


def spectral():
    return Spectral()


def moody():
    return Moody()
"""


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(str(tmp_path / "workspace"))


@pytest.fixture
def own_networks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "own_networks.py").write_text(TWO_FACED)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "own_networks", raising=False)
    return "own_networks"


def made_bundle(
    store: LocalStore, *, tap: str, kind: HeadKind | None = HeadKind.SOFTMAX, arch: str = "lenet5"
) -> Classifier:
    """A bundle `digits`, with random weights: a head on a tap, or the network's own logits."""
    backbone = load_backbone(store, BackboneConfig(arch=arch, weights="random", preset=PRESET))
    head = None
    if kind is not None:
        width = next(stage.channels for stage in backbone.axis if stage.name == tap)
        torch.manual_seed(7)
        hidden_width = 24 if kind is HeadKind.MLP else None
        spec = HeadSpec(kind=kind, num_features=width, num_classes=10, hidden_width=hidden_width)
        head = Head(spec).eval()
    classifier = Classifier(
        strategy=Strategy.AS_IS if head is None else Strategy.EARLY_LAYER_PROBE,
        backbone=backbone,
        tap=backbone.resolve_tap(tap),
        head=None if head is None else stored_head(head),
        classes=DIGITS,
        decode_rule=DecodeRule(),
        precision=PrecisionChoice.FP32,
        dtype=FeatureDtype.FLOAT32,
    )
    files = classifier_files(store, classifier) | {"metrics.json": b"{}", "README.md": b"made"}
    write_bundle(store, "digits", files)
    return classifier


def export(store: LocalStore, output: Path | None, to: str, **settings: Any) -> ExportReport:
    config = ExportConfig(
        workspace=store.root_uri,
        to=to,
        output=None if output is None else str(output),
        **{"bundle": "digits", "images": 20, **settings},
    )
    return run_export(config, progress=Silent())


def bundle_logits(store: LocalStore, classifier: Classifier, images_BCHW: Tensor) -> Tensor:
    """The logits of the job's own path: engine, tap, head."""
    network = build_network(classifier.backbone.config)
    load_weights(network, read_backbone_state(store, classifier.backbone))
    options = EngineOptions(
        precision=Precision.FP32, batch_size=len(images_BCHW), compiled=False, num_threads=1
    )
    engine = FeatureEngine(network, classifier.backbone.axis, PRESET, taps=[classifier.tap], options=options)
    return Readout(classifier).logits(engine.run(images_BCHW)[classifier.tap].cpu())


def file_logits(path: Path, to: str, images_BCHW: Tensor) -> Tensor:
    """The logits of the file, by nothing but torch or ONNX Runtime."""
    if to == "torch":
        with torch.no_grad():
            return torch.export.load(path).module()(images_BCHW)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(["logits"], {"images": images_BCHW.numpy()})[0])


@pytest.mark.parametrize("to", ["onnx", "torch"])
@pytest.mark.parametrize(
    ("tap", "kind"),
    [("f6", HeadKind.SOFTMAX), ("c3", HeadKind.MLP), ("f6", HeadKind.LINEAR_SVM), ("logits", None)],
)
def test_the_file_computes_the_logits_of_the_bundle(
    store: LocalStore, tmp_path: Path, tap: str, kind: HeadKind | None, to: str
) -> None:
    classifier = made_bundle(store, tap=tap, kind=kind)
    report = export(store, tmp_path / "model", to)
    images_BCHW = torch.from_numpy(np.random.default_rng(5).integers(0, 256, (7, 3, 32, 32), np.uint8))
    for batch in (images_BCHW, images_BCHW[:1]):
        found = file_logits(tmp_path / "model", to, batch)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, bundle_logits(store, classifier, batch), rtol=1e-5, atol=1e-6)
    assert (report.num_images, report.top1_agreement, report.num_classes) == (20, 1.0, 10)
    assert report.max_abs_difference <= report.tolerance
    assert report.size_bytes == (tmp_path / "model").stat().st_size


def made_ensemble(store: LocalStore, averaging: Averaging, policy: CropPolicy) -> CommitteeRecord:
    """The ensemble `both`: a network and a head on another one, whose classes come in another order."""
    first = write_classifier(store, "one", made_classifier(store, 0))
    head = made_classifier(store, 1, classes=DIGITS[::-1], head=HeadKind.SOFTMAX)
    second = write_classifier(store, "two", head)
    config = EnsembleConfig.model_validate(
        {
            "members": [
                {"bundle": str(first), "weight": 3, "temperature": 1.5},
                {"bundle": str(second), "temperature": 0.7},
            ],
            "averaging": averaging.value,
            "temperature": 0.8,
        }
    )
    committee = configured_committee(store, config, FP32).with_plan(CropPlan(policy=policy))
    write_ensemble(store, "both", committee, metrics={}, card="# both")
    return committee


@pytest.mark.parametrize("to", ["onnx", "torch"])
@pytest.mark.parametrize("averaging", list(Averaging))
@pytest.mark.parametrize("policy", [CropPolicy.CENTER, CropPolicy.FLIP])
def test_the_file_of_an_ensemble_computes_its_joint_logits(
    store: LocalStore, tmp_path: Path, policy: CropPolicy, averaging: Averaging, to: str
) -> None:
    committee = made_ensemble(store, averaging, policy)
    report = export(store, tmp_path / "model", to, bundle="both")
    images_BCHW = torch.from_numpy(np.random.default_rng(5).integers(0, 256, (7, 3, 32, 32), np.uint8))
    views = [images_BCHW, images_BCHW.flip(3)] if policy is CropPolicy.FLIP else [images_BCHW]
    logits_MVNK = np.stack(
        [
            [
                bundle_logits(store, member.classifier, view)[
                    :, member.classifier.order_of(DIGITS) or range(10)
                ]
                for view in views
            ]
            for member in committee.members
        ]
    )
    temperatures = [member.temperature for member in committee.members]
    values_MNK = member_values(logits_MVNK, range(len(views)), averaging, temperatures)
    weights = [member.weight for member in committee.members]
    expected_NK = torch.from_numpy(joint_logits(values_MNK, weights, averaging, committee.temperature))
    for batch in (slice(None), slice(1)):
        found = file_logits(tmp_path / "model", to, images_BCHW[batch])
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), expected_NK[batch], rtol=1e-4, atol=1e-5)
    assert (report.top1_agreement, report.num_classes) == (1.0, 10)
    description = json.loads((tmp_path / "model.json").read_bytes())
    assert description["classes"] == list(DIGITS)
    assert len(description["preprocess"]["presets"]) == 2


def test_an_ensemble_that_sees_more_than_a_graph_has_is_refused(store: LocalStore, tmp_path: Path) -> None:
    made_ensemble(store, Averaging.PROBABILITIES, CropPolicy.TEN)
    with pytest.raises(ConfigError, match="the ensemble looks at the crops ten"):
        export(store, tmp_path / "model.pt2", "torch", bundle="both")
    assert not (tmp_path / "model.pt2").exists()


def test_what_lies_behind_the_tap_is_not_in_the_file(store: LocalStore, tmp_path: Path) -> None:
    classifier = made_bundle(store, tap="c3")
    export(store, tmp_path / "model.pt2", "torch")
    export(store, tmp_path / "model.onnx", "onnx")
    stages = classifier.backbone.axis.stages
    needed = sum(stage.num_parameters for stage in stages[:2])
    head = Readout(classifier).module
    assert head is not None
    needed += sum(parameter.numel() for parameter in head.parameters())
    state = torch.export.load(tmp_path / "model.pt2").state_dict
    assert sum(tensor.numel() for tensor in state.values()) == needed
    weights = onnx.load(tmp_path / "model.onnx").graph.initializer
    num_values = sum(int(np.prod(tensor.dims)) for tensor in weights)
    # Equal tensors are stored once.
    assert num_values == pytest.approx(needed, abs=100)
    assert needed < classifier.backbone.num_parameters / 10


def test_the_batch_is_the_only_free_size_of_an_onnx_file(store: LocalStore, tmp_path: Path) -> None:
    made_bundle(store, tap="f6")
    export(store, tmp_path / "model.onnx", "onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    (given,), (returned,) = session.get_inputs(), session.get_outputs()
    assert (given.name, given.type, given.shape) == ("images", "tensor(uint8)", ["batch", 3, 32, 32])
    assert (returned.name, returned.type, returned.shape) == ("logits", "tensor(float)", ["batch", 10])


def test_the_description_says_what_goes_in_and_what_comes_out(
    store: LocalStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a file that nobody named: it has the name of the bundle, where the command is given."""
    monkeypatch.chdir(tmp_path)
    classifier = made_bundle(store, tap="f6", kind=HeadKind.LINEAR_SVM)
    report = export(store, None, "torch")
    assert (tmp_path / "digits.pt2").stat().st_size == report.size_bytes
    description = json.loads((tmp_path / "digits.pt2.json").read_bytes())
    assert report.description == f"{report.output}.json"
    assert description["bundle"] == report.bundle
    assert description["classes"] == list(DIGITS)
    assert description["preprocess"]["preset"] == classifier.backbone.preset.model_dump(mode="json")
    assert description["input"]["shape"] == ["batch", 3, 32, 32]
    assert "no probabilities" in description["output"]["content"]
    assert description["parity"]["top1_agreement"] == 1.0


@pytest.mark.parametrize("name", ["digits.pt2", "digits.pt2.json"])
def test_a_file_that_nobody_named_replaces_no_other(
    store: LocalStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    made_bundle(store, tap="f6")
    (tmp_path / name).write_bytes(b"of another day")
    with pytest.raises(ConfigError, match="the file exists") as refused:
        export(store, None, "torch")
    assert refused.value.where == str(tmp_path / name)
    assert (tmp_path / name).read_bytes() == b"of another day"


def test_the_file_can_be_checked_on_held_out_images(store: LocalStore, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    for split, num_images in (("train", 3), ("test", 8)):
        for index in range(num_images):
            path = tmp_path / "images" / split / str(index % 2) / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(random.integers(0, 256, (40, 36, 3), np.uint8)).save(path)
    (tmp_path / "images" / "test" / "0" / "0.png").write_bytes(b"\x89PNG\r\n\x1a\n, and no more")
    config = DatasetConfig(workspace=store.root_uri, source=str(tmp_path / "images"), name="noise")
    freeze(config, progress=Silent())
    made_bundle(store, tap="f6")
    report = export(store, tmp_path / "model.pt2", "torch", dataset="noise")
    assert (report.num_images, report.checked_on) == (7, "noise, test split")
    few = export(store, tmp_path / "model.pt2", "torch", dataset="noise", images=3)
    assert few.num_images in {2, 3}


@pytest.mark.parametrize("to", ["onnx", "torch"])
def test_a_file_that_computes_other_logits_is_not_written(
    store: LocalStore, tmp_path: Path, own_networks: str, to: str
) -> None:
    made_bundle(store, tap="logits", kind=None, arch=f"{own_networks}:network")
    with pytest.raises(TrainingError, match="computes other logits") as caught:
        export(store, tmp_path / "out" / "model", to)
    assert caught.value.exit_code == ExitCode.ERROR
    assert not (tmp_path / "out").exists()


def test_a_network_that_branches_on_its_pixels_is_refused(
    store: LocalStore, tmp_path: Path, own_networks: str
) -> None:
    made_bundle(store, tap="logits", kind=None, arch=f"{own_networks}:moody")
    with pytest.raises(DataError, match="cannot be traced"):
        export(store, tmp_path / "model.pt2", "torch")
    assert not (tmp_path / "model.pt2").exists()


def test_a_network_that_onnx_has_no_words_for_is_refused_with_the_format_that_has(
    store: LocalStore, tmp_path: Path, own_networks: str
) -> None:
    made_bundle(store, tap="logits", kind=None, arch=f"{own_networks}:spectral")
    with pytest.raises(DataError, match="ONNX cannot hold this network") as caught:
        export(store, tmp_path / "model.onnx", "onnx")
    assert "--to torch" in caught.value.next_step
    assert not (tmp_path / "model.onnx").exists()
    assert export(store, tmp_path / "model.pt2", "torch").top1_agreement == 1.0


def test_missing_packages_are_named_with_the_command_that_installs_them(
    store: LocalStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec

    def without_onnxscript(name: str, package: str | None = None) -> ModuleSpec | None:
        return None if name == "onnxscript" else found(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", without_onnxscript)
    with pytest.raises(ConfigError, match=r"not installed: onnxscript") as caught:
        export(store, tmp_path / "model.onnx", "onnx")
    assert "pip install convoy-vision[export]" in str(caught.value)


def test_parity_scales_with_the_logits_and_counts_the_same_answers() -> None:
    expected = torch.tensor([[0.0, 50.0], [20.0, 10.0]])
    parity = compare_logits(expected, torch.tensor([[0.0, 50.02], [9.0, 10.0]]))
    assert (parity.num_images, parity.top1_agreement) == (2, 0.5)
    assert parity.max_abs_difference == 11.0
    assert parity.tolerance == pytest.approx(50 * LOGIT_TOLERANCE)
    with pytest.raises(TrainingError, match=r"\(2, 3\) instead of \(2, 2\)"):
        compare_logits(expected, torch.zeros(2, 3))
