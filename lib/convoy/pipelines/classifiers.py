"""Classifiers as values: a network, a tap of it, and a head or none; read from bundles without torch.

Whoever only tells workers what to compute does not wait for its import; `classifier_tensors` computes.
"""

from __future__ import annotations

import difflib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

from convoy.core.errors import ConfigError, DataError
from convoy.core.fingerprints import canonical_json, digest, digest_bytes
from convoy.pipelines.backbone_record import BackboneRecord
from convoy.pipelines.device_settings import settle_precision
from convoy.pipelines.feature_plan import ExtractionConfig, FeatureDtype, PrecisionChoice
from convoy.storage.bundles import ENSEMBLE_FILE, MODEL_FILE, Bundle
from convoy.storage.documents import exists
from convoy.storage.object_store import ObjectStore
from convoy.storage.runs import RunFolder
from convoy.vision.decode_rule import DecodeRule
from convoy.vision.head_config import HEAD_PREFIX, HeadKind, HeadSpec
from convoy.vision.weight_files import float32_below

# Where the tensors of the network lie in the file of a model.
BACKBONE_PREFIX = "backbone."
CLASSIFIER_FORMAT_VERSION = 1
# How many classes an error names of those that a model does not know.
_NUM_NAMED = 5


class Strategy(StrEnum):
    """How a network is used."""

    AS_IS = "as_is"  # pretrained, no parameter changed
    LINEAR_PROBE = "linear_probe"  # a head on pooled features
    EARLY_LAYER_PROBE = "early_layer_probe"  # a head on features of an early stage
    PARTIAL_REUSE = "partial_reuse"  # early stages, new convolutions, a new MLP
    FINE_TUNE = "fine_tune"  # pretrained weights trained on, down to a freeze depth
    FROM_SCRATCH = "from_scratch"  # random weights


@dataclass(frozen=True, slots=True)
class StoredHead:
    """A head, and its tensors as a safetensors file with names below HEAD_PREFIX."""

    spec: HeadSpec
    tensors: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Classifier:
    """Logits over `classes` from the features of `tap`: those of the head, or without a head the features.

    With `output_groups` a class has several outputs of the network: its probability is the sum of theirs, and
    outputs in no group are left out.
    """

    strategy: Strategy
    backbone: BackboneRecord
    tap: str
    head: StoredHead | None
    classes: tuple[str, ...]
    decode_rule: DecodeRule
    precision: PrecisionChoice
    dtype: FeatureDtype
    output_groups: tuple[tuple[int, ...], ...] | None = None

    def extraction_like(self, extraction: ExtractionConfig) -> ExtractionConfig:
        """The settings of a job, but with what determines the features as this classifier was made with."""
        mine = {"decode": self.decode_rule, "precision": self.precision, "dtype": self.dtype}
        return extraction.model_copy(update=mine)

    def settled(self, store: ObjectStore, dataset: str) -> Classifier:
        """The same with its precision told, which of a pretrained network may be `auto`: see `settle_precision`."""
        extraction, _ = settle_precision(store, dataset, self.extraction_like(ExtractionConfig()))
        return replace(self, precision=extraction.precision)

    @property
    def macs(self) -> int:
        """Multiply-adds of the network for one image at the preset's size: to the tap, where a pass ends."""
        return self.backbone.macs_to(self.tap)

    @property
    def gives_probabilities(self) -> bool:
        """Whether the softmax of the logits is a probability; the margins of a linear SVM are none."""
        return self.head is None or self.head.spec.kind is not HeadKind.LINEAR_SVM

    def order_of(self, classes: tuple[str, ...]) -> tuple[int, ...] | None:
        """For each of its classes, in another order, its place among the logits; None where the order is its own."""
        if classes == self.classes:
            return None
        place_of = {name: place for place, name in enumerate(self.classes)}
        return tuple(place_of[name] for name in classes)


def as_is(
    backbone: BackboneRecord,
    classes: tuple[str, ...] | None,
    extraction: ExtractionConfig,
    *,
    class_map: Mapping[str, str] | None = None,
) -> Classifier:
    """A pretrained network with its own classes, or with those that `class_map` makes of them by name.

    No parameter is changed. Raises ConfigError for classes that are not those of the network, or not told apart.
    """
    if not backbone.num_classes:
        raise ConfigError(
            f"{backbone.arch} with these weights has no classifier",
            where="backbone",
            next_step="train one on its features, with the strategy linear_probe or fine_tune",
        )
    names = classes or backbone.classes
    if not names:
        raise ConfigError(
            f"the weights of {backbone.arch} do not say what their classes are",
            next_step="list them under `classes`, in the order of the network's outputs",
        )
    if len(names) != backbone.num_classes:
        raise ConfigError(
            f"{len(names)} class names for {backbone.num_classes} outputs of {backbone.arch}",
            next_step="give one name for each output, in order",
        )
    mapped, groups = _grouped_outputs(names, class_map) if class_map else (tuple(names), None)
    if repeated := [name for name, times in Counter(mapped).items() if times > 1]:
        raise ConfigError(
            f"several outputs of {backbone.arch} have the same class name: {', '.join(repeated[:5])}",
            where="classes",
            next_step="give every output a name of its own, or map them to one class with class_map",
        )
    return Classifier(
        strategy=Strategy.AS_IS,
        backbone=backbone,
        tap=backbone.resolve_tap("logits"),
        head=None,
        output_groups=groups,
        classes=mapped,
        decode_rule=extraction.decode,
        precision=extraction.precision,
        # Logits are few, and float16 would round them.
        dtype=FeatureDtype.FLOAT32,
    )


def class_indices(
    dataset_classes: Sequence[str],
    model_classes: Sequence[str],
    *,
    model: str = "the model",
    where: str = "",
    next_step: str = "take a dataset and a model with the same class names",
) -> list[int]:
    """For each class of a dataset its index in the model, matched by name; never guessed from the order.

    Raises ConfigError for classes that the model does not know: what the error calls it, where it was named and what
    to do about it is the caller's to say.
    """
    index_of = {name: index for index, name in enumerate(model_classes)}
    unknown = [name for name in dataset_classes if name not in index_of]
    if unknown:
        more = f" and {len(unknown) - _NUM_NAMED} more" if unknown[_NUM_NAMED:] else ""
        raise ConfigError(
            f"{model} does not know {len(unknown)} classes of the dataset: {', '.join(unknown[:_NUM_NAMED])}{more}",
            where=where,
            next_step=next_step,
        )
    return [index_of[name] for name in dataset_classes]


def _grouped_outputs(
    names: Sequence[str], class_map: Mapping[str, str]
) -> tuple[tuple[str, ...], tuple[tuple[int, ...], ...]]:
    """The classes that a map makes of the network's, sorted, and the outputs of each."""
    unknown = [name for name in class_map if name not in names]
    if unknown:
        nearest = difflib.get_close_matches(unknown[0], names, n=1)
        raise ConfigError(
            f"the network has no class '{unknown[0]}'" + (f" ({len(unknown)} such)" if unknown[1:] else ""),
            where="class_map",
            next_step=f"did you mean '{nearest[0]}'?" if nearest else "map classes that the network has",
        )
    mapped = tuple(sorted(set(class_map.values())))
    groups = tuple(
        tuple(output for output, name in enumerate(names) if class_map.get(name) == wanted)
        for wanted in mapped
    )
    return mapped, groups


def keep_head(folder: RunFolder, classifier: Classifier) -> str | None:
    """Put the head into a run's folder, for its workers; its key names the digest. None where there is no head."""
    if classifier.head is None:
        return None
    key = folder.key(f"heads/{digest_bytes(classifier.head.tensors).hex()}.safetensors")
    folder.store.put(key, classifier.head.tensors)
    return key


def classifier_digest(classifier: Classifier) -> str:
    """A digest of everything that determines predictions, for classifiers that are no bundles."""
    config = classifier_config(classifier)
    # Counted of the network, and unknown in older records of the same one.
    del config["backbone"]["tap_macs"]
    return digest(config | {"classes": classifier.classes})


def read_classifier(store: ObjectStore, bundle: Bundle) -> Classifier:
    """The classifier of a bundle; its network's weights are put back into the workspace if they left it.

    Raises ConfigError for an ensemble.
    """
    if ENSEMBLE_FILE in bundle.files:
        raise ConfigError(
            "this is an ensemble, where a single model is needed",
            where=str(bundle.ref),
            next_step=f"name one of its members: see `convoy models show {bundle.ref.name}`",
        )
    config = bundle.read_json("config.json")
    if config.get("format_version") != CLASSIFIER_FORMAT_VERSION:
        raise DataError(
            f"the bundle's config has format {config.get('format_version')}",
            where=bundle.ref.uri,
            next_step="upgrade Convoy, or train again",
        )
    data = bundle.files[MODEL_FILE]
    backbone = BackboneRecord.model_validate(config["backbone"])
    if not exists(store, backbone.weights_key):
        _restore_backbone(store, backbone, data)
    preprocess = bundle.read_json("preprocess.json")
    spec = None if config["head"] is None else HeadSpec.model_validate(config["head"])
    return Classifier(
        strategy=Strategy(config["strategy"]),
        backbone=backbone,
        tap=config["tap"],
        head=None
        if spec is None
        else StoredHead(spec, float32_below(data, HEAD_PREFIX, where=bundle.ref.uri)),
        output_groups=config.get("output_groups"),
        classes=tuple(bundle.read_json("classes.json")),
        decode_rule=DecodeRule.model_validate(preprocess["decode_rule"]),
        precision=PrecisionChoice(preprocess["precision"]),
        dtype=FeatureDtype(preprocess["dtype"]),
    )


def classifier_config(classifier: Classifier) -> dict[str, Any]:
    """The `config.json` of its bundle."""
    head = None if classifier.head is None else classifier.head.spec
    config: dict[str, Any] = json.loads(
        canonical_json(
            {
                "format_version": CLASSIFIER_FORMAT_VERSION,
                "strategy": classifier.strategy.value,
                "backbone": classifier.backbone,
                "tap": classifier.tap,
                "head": head,
                **({"output_groups": groups} if (groups := classifier.output_groups) else {}),
            }
        )
    )
    return config


def _restore_backbone(store: ObjectStore, backbone: BackboneRecord, data: bytes) -> None:
    from convoy.pipelines.backbone_loading import restore_backbone  # noqa: PLC0415 (needs torch)
    from convoy.vision.weights import read_state_dict, state_below  # noqa: PLC0415

    restore_backbone(store, backbone, state_below(read_state_dict(data), BACKBONE_PREFIX))
