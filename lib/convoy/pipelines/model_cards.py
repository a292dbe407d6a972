"""What the card of a trained model says."""

from __future__ import annotations

from collections.abc import Sequence

from convoy.core.records import Split
from convoy.pipelines.classifiers import Classifier, Strategy
from convoy.pipelines.evaluation import Evaluation
from convoy.pipelines.train_config import PROBES, TrainConfig
from convoy.storage.bundles import ModelCard
from convoy.storage.manifests import Manifest

_STRATEGIES = {
    Strategy.AS_IS: "the pretrained network as it is, no parameter changed.",
    Strategy.LINEAR_PROBE: "the network is frozen, only the head was trained.",
    Strategy.EARLY_LAYER_PROBE: "the network is frozen, only the head was trained.",
    Strategy.PARTIAL_REUSE: "early stages of a pretrained network under new convolutions and a new MLP.",
    Strategy.FINE_TUNE: "a pretrained network with a new head, trained on down to the freeze depth.",
    Strategy.FROM_SCRATCH: "all weights were random at the start.",
}


def training_card(
    config: TrainConfig,
    manifest: Manifest,
    classifier: Classifier,
    evaluation: Evaluation,
    *,
    notes: Sequence[str],
) -> ModelCard:
    """The card of a model of `convoy train`."""
    backbone = classifier.backbone
    limits = [
        f"Measured on {_kind_of_split(evaluation)} of the same dataset: other sources of images may differ."
    ]
    if not classifier.gives_probabilities:
        limits.append("Scores are margins of a linear SVM, no probabilities.")
    return ModelCard(
        name=config.name,
        summary=_summary(config, classifier),
        strategy="\n".join([f"{config.strategy.value}: {_STRATEGIES[config.strategy]}", *_listed(notes)]),
        dataset=config.dataset,
        dataset_fingerprint=manifest.fingerprint,
        split_rows={split.value: counts.num_samples for split, counts in manifest.counts.items()},
        classes=classifier.classes,
        split=", ".join(evaluation.splits),
        metrics=evaluation.intervals,
        intended_use="Images like those of the dataset above, prepared by `preprocess.json`.",
        limits=limits,
        lineage={
            "initial weights": config.backbone.weights,
            "backbone weights": backbone.weights_digest,
            "evaluation run": evaluation.run,
        },
    )


def _summary(config: TrainConfig, classifier: Classifier) -> str:
    arch = classifier.backbone.arch
    if config.strategy in PROBES:
        return f"A {config.head.kind.value} head on the `{classifier.tap}` features of {arch}."
    return f"{arch}, {len(classifier.classes)} classes."


def _kind_of_split(evaluation: Evaluation) -> str:
    if Split.TEST in evaluation.splits:
        return "the held-out split"
    return "validation rows, by which the model may have been chosen,"


def _listed(notes: Sequence[str]) -> list[str]:
    return ["", *(f"- {note}" for note in notes)] if notes else []
