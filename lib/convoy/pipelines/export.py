"""`convoy models export`: bundle → one graph → file → proof that the file computes the same → where it shall lie."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field
from torch import Tensor

from convoy.core.config import StrictModel
from convoy.core.crop_policies import CropPolicy
from convoy.core.errors import ConfigError, TrainingError
from convoy.core.fingerprints import canonical_json
from convoy.core.progress import Progress
from convoy.pipelines.backbone_loading import read_backbone_state
from convoy.pipelines.classifier_tensors import Readout
from convoy.pipelines.classifiers import Classifier, read_classifier
from convoy.pipelines.committees import CommitteeRecord, is_ensemble, open_committee
from convoy.pipelines.export_images import (
    batches_of_two_sizes,
    held_out_images,
    images_split,
    random_images,
)
from convoy.pipelines.workspace import workspace_store
from convoy.storage.bundles import Bundle, open_bundle
from convoy.storage.datasets import open_dataset
from convoy.storage.object_store import ObjectStore
from convoy.storage.stores import open_object
from convoy.vision.backbones import build_network
from convoy.vision.decode_rule import DecodeRule
from convoy.vision.exporting import (
    INPUT_NAME,
    OUTPUT_NAME,
    ExportedMember,
    ExportFormat,
    ImageClassifier,
    ImageEnsemble,
    load_predictor,
    paired_logits,
    require_export_packages,
    save_program,
    trace_classifier,
)
from convoy.vision.presets import geometry_of
from convoy.vision.weights import load_weights

# As a share of the largest logit. Float32 sums in another order differ by some 1e-6; a wrong graph by more.
LOGIT_TOLERANCE = 1e-4
_SUFFIXES = {ExportFormat.ONNX: ".onnx", ExportFormat.TORCH: ".pt2"}


class ExportConfig(StrictModel):
    """Which bundle, as what, to which file; `images` are those that the file is checked on.

    They are spread evenly over the held-out split of `dataset`, or random pixels where there is none. Without an
    `output` the file has the bundle's name, lies in the current folder, and replaces no other.
    """

    workspace: str | None = None
    bundle: str
    to: ExportFormat
    output: str | None = None
    dataset: str | None = None
    images: int = Field(default=64, gt=0)


class Parity(StrictModel):
    """The exported file against the bundle in float32: its logits may differ by `tolerance`."""

    num_images: int
    max_abs_difference: float
    tolerance: float
    top1_agreement: float


class ExportReport(Parity):
    """What was written: the file, and beside it a JSON with the classes and how images are prepared."""

    bundle: str
    to: ExportFormat
    output: str
    description: str
    size_bytes: int
    num_classes: int
    checked_on: str


def run_export(config: ExportConfig, *, progress: Progress) -> ExportReport:
    """Export a bundle. Nothing is written unless the file, loaded back, gives the bundle's own float32 logits.

    The graph takes uint8 images_BCHW in RGB at the preset's crop size, any number of them, normalises inside,
    and gives float32 logits_BK; softmax is left to the caller. That of an ensemble has all members, each behind
    its own normalisation, and the mirror image of the crop if its crops are `flip`, see `ImageEnsemble`; a gate
    is left out. Raises ConfigError where a format's packages are missing, for an ensemble that sees other
    crops, and where a file that nobody named is there already, DataError for a network that cannot be traced,
    TrainingError for a file that computes other logits.
    """
    require_export_packages(config.to)
    store = workspace_store(config.workspace)
    bundle = open_bundle(store, config.bundle)
    target, key = open_object(config.output or _new_file(f"{bundle.ref.name}{_SUFFIXES[config.to]}"))
    model = _read_model(store, bundle)
    progress.stage("tracing the network")
    program = trace_classifier(model.module)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"model{_SUFFIXES[config.to]}"
        save_program(program, config.to, path)
        progress.stage("checking the file")
        checked_on, batches = _check_batches(store, model, config)
        parity = compare_logits(*paired_logits(batches, model.module, load_predictor(path, config.to)))
        _require_parity(parity, config)
        data = path.read_bytes()
    description_key = f"{key}.json"
    target.put(description_key, canonical_json(_description(bundle, model, config, parity)))
    target.put(key, data)
    return ExportReport(
        **parity.model_dump(),
        bundle=str(bundle.ref),
        to=config.to,
        output=target.uri(key),
        description=target.uri(description_key),
        size_bytes=len(data),
        num_classes=len(model.classes),
        checked_on=checked_on,
    )


def compare_logits(expected_NK: Tensor, found_NK: Tensor) -> Parity:
    """How far two models' logits of the same images are apart; the tolerance scales with the largest logit."""
    if expected_NK.shape != found_NK.shape:
        raise TrainingError(
            f"the exported file gives logits {tuple(found_NK.shape)} instead of {tuple(expected_NK.shape)}",
            next_step="report it, with the network's name",
        )
    return Parity(
        num_images=len(expected_NK),
        max_abs_difference=float((expected_NK - found_NK).abs().max()),
        tolerance=LOGIT_TOLERANCE * float(expected_NK.abs().max()),
        top1_agreement=float((expected_NK.argmax(1) == found_NK.argmax(1)).float().mean()),
    )


def _new_file(name: str) -> str:
    for path in (Path(name), Path(f"{name}.json")):
        if path.exists():
            raise ConfigError(
                "the file exists, and may be that of another bundle",
                where=str(path.absolute()),
                next_step="give --output, which replaces what is there, or move the file away",
            )
    return name


def _require_parity(parity: Parity, config: ExportConfig) -> None:
    # Written so that logits that are not finite fail too.
    if not parity.max_abs_difference <= parity.tolerance:
        raise TrainingError(
            f"the exported file computes other logits: they differ by up to {parity.max_abs_difference:.3g},"
            f" {parity.tolerance:.3g} are allowed; top-1 agrees on {parity.top1_agreement:.1%} of"
            f" {parity.num_images} images. No file was written",
            where=config.bundle,
            next_step="try the other format of --to, and report it with the network's name",
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Model:
    """What is exported: a bundle's network, or the networks of an ensemble."""

    module: ImageClassifier | ImageEnsemble
    classes: tuple[str, ...]
    decode_rule: DecodeRule
    gives_probabilities: bool
    mirrors: bool = False


def _read_model(store: ObjectStore, bundle: Bundle) -> _Model:
    if is_ensemble(bundle):
        committee = open_committee(store, str(bundle.ref))
        return _Model(
            module=_image_ensemble(store, committee),
            classes=committee.classes,
            decode_rule=committee.members[0].classifier.decode_rule,
            gives_probabilities=committee.gives_probabilities,
            mirrors=committee.plan.policy is CropPolicy.FLIP,
        )
    classifier = read_classifier(store, bundle)
    return _Model(
        module=_image_classifier(store, classifier),
        classes=classifier.classes,
        decode_rule=classifier.decode_rule,
        gives_probabilities=classifier.gives_probabilities,
    )


def _image_ensemble(store: ObjectStore, committee: CommitteeRecord) -> ImageEnsemble:
    """The members of an ensemble as one module; ConfigError where one image of one size is not all that they see."""
    policy = committee.plan.policy
    if policy not in (CropPolicy.CENTER, CropPolicy.FLIP):
        raise ConfigError(
            f"the ensemble looks at the crops {policy}, and a graph sees one image: its centre, or that and its mirror",
            where="crops",
            next_step="build it with --set 'ensemble.crops=[center, flip]', or export its members one by one",
        )
    geometries = {geometry_of(member.classifier.backbone.preset) for member in committee.members}
    if len(geometries) > 1:
        sizes = ", ".join(
            f"{one.crop_px} of {one.resize_px or 'the whole'}" for one in sorted(geometries, key=str)
        )
        raise ConfigError(
            f"the members see images of several sizes, and a graph has one input: {sizes} pixels",
            where="members",
            next_step="export its members one by one",
        )
    members = [
        ExportedMember(
            classifier=_image_classifier(store, member.classifier),
            weight=member.weight,
            temperature=member.temperature,
            class_order=member.classifier.order_of(committee.classes),
        )
        for member in committee.members
    ]
    return ImageEnsemble(
        members,
        averaging=committee.averaging,
        temperature=committee.temperature,
        mirrors=policy is CropPolicy.FLIP,
    ).eval()


def _image_classifier(store: ObjectStore, classifier: Classifier) -> ImageClassifier:
    backbone = classifier.backbone
    network = build_network(backbone.config)
    load_weights(network, read_backbone_state(store, backbone))
    return ImageClassifier(
        network, backbone.axis, backbone.preset, tap=classifier.tap, head=Readout(classifier).module
    ).eval()


def _description(bundle: Bundle, model: _Model, config: ExportConfig, parity: Parity) -> dict[str, object]:
    size_px = model.module.preset.crop_px
    return {
        "bundle": str(bundle.ref),
        "format": config.to.value,
        "classes": list(model.classes),
        "preprocess": bundle.read_json("preprocess.json"),
        "input": {
            "name": INPUT_NAME,
            "dtype": "uint8",
            "shape": ["batch", 3, size_px, size_px],
            "content": "RGB pixels after the preset's resize and crop; normalisation is inside the graph"
            + (", and so is the mirror image of these pixels" if model.mirrors else ""),
        },
        "output": {
            "name": OUTPUT_NAME,
            "dtype": "float32",
            "shape": ["batch", len(model.classes)],
            "content": "logits: apply softmax for probabilities"
            if model.gives_probabilities
            else "margins of a linear SVM: no probabilities, with or without softmax",
        },
        "parity": parity.model_dump(),
    }


def _check_batches(store: ObjectStore, model: _Model, config: ExportConfig) -> tuple[str, Iterator[Tensor]]:
    """In words what the file is checked on, and these images."""
    preset = model.module.preset
    if config.dataset is None:
        return "random pixels", batches_of_two_sizes(random_images(preset.crop_px, config.images))
    manifest = open_dataset(store, config.dataset)
    images = held_out_images(manifest, model.decode_rule, preset, config.images)
    return f"{config.dataset}, {images_split(manifest).value} split", batches_of_two_sizes(images)
