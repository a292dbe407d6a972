"""What the card of a trained model says."""

from __future__ import annotations

from collections.abc import Sequence

from convoy.core.records import Split
from convoy.pipelines.classifiers import Classifier, Strategy
from convoy.pipelines.evaluation import Evaluation
from convoy.pipelines.train_config import PROBES, TrainConfig
from convoy.pipelines.training_rows import Fold
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
    measured_fold: Fold | None,
    notes: Sequence[str],
) -> ModelCard:
    """The card of a model of `convoy train`; `measured_fold` is the fold that it was measured on, if it was one."""
    backbone = classifier.backbone
    kind = _kind_of_rows(evaluation, measured_fold)
    limits = [f"Measured on {kind} of the same dataset: other sources of images may differ."]
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
        split=rows_in_words(evaluation, measured_fold),
        metrics=evaluation.intervals,
        intended_use="Images like those of the dataset above, prepared by `preprocess.json`.",
        limits=limits,
        lineage={
            "initial weights": "random"
            if config.strategy is Strategy.FROM_SCRATCH
            else config.backbone.weights,
            "backbone weights": backbone.weights_digest,
            **({} if config.distill is None else {"teacher": config.distill.teacher}),
            "evaluation run": evaluation.run,
        },
    )


def _summary(config: TrainConfig, classifier: Classifier) -> str:
    arch = classifier.backbone.arch
    if config.strategy in PROBES:
        return f"A {config.head.kind.value} head on the `{classifier.tap}` features of {arch}."
    return f"{arch}, {len(classifier.classes)} classes."


def rows_in_words(evaluation: Evaluation, fold: Fold | None) -> str:
    """What a model was measured on: splits, or a fold of one."""
    splits = ", ".join(evaluation.splits)
    return splits if fold is None else f"{splits} (fold {fold.index + 1} of {fold.count})"


def _kind_of_rows(evaluation: Evaluation, fold: Fold | None) -> str:
    if fold is not None:
        return "the training rows that were left out, by which the model may have been chosen,"
    if Split.TEST in evaluation.splits:
        return "the held-out split"
    return "validation rows, by which the model may have been chosen,"


def _listed(notes: Sequence[str]) -> list[str]:
    return ["", *(f"- {note}" for note in notes)] if notes else []
