"""`convoy train`: config → strategy → features → head → evaluation → bundle."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from convoy.core.config import StrictModel
from convoy.core.fingerprints import canonical_json
from convoy.core.progress import Progress
from convoy.core.records import Split
from convoy.pipelines.backbone_record import BackboneRecord
from convoy.pipelines.classifiers import Classifier, Strategy, classifier_files
from convoy.pipelines.evaluation import Evaluation, EvaluationTask, evaluate_classifier
from convoy.pipelines.feature_plan import ErrorBudget, ExtractionConfig, FeatureRequest, resolve_precision
from convoy.pipelines.feature_source import open_features, read_labelled_rows
from convoy.pipelines.features import FeatureJob
from convoy.pipelines.models import fetch_backbone
from convoy.pipelines.workspace import WriterMode, open_workspace
from convoy.storage.bundles import ModelCard, bundle_digest, check_bundle_name, model_card, write_bundle
from convoy.storage.datasets import open_dataset
from convoy.storage.feature_cache import FeatureCache
from convoy.storage.manifests import Manifest
from convoy.storage.object_store import ObjectStore
from convoy.vision.augmentation_policy import AugmentationPolicy
from convoy.vision.backbone_config import BackboneConfig
from convoy.vision.head_fitting import FittedHead, fit_head
from convoy.vision.heads import HeadConfig

PROBES = (Strategy.LINEAR_PROBE, Strategy.EARLY_LAYER_PROBE)


class TrainConfig(StrictModel):
    """A head on frozen features. `name` is the bundle's; `tap` is `pooled` unless the strategy is another."""

    workspace: str | None = None
    writers: WriterMode = WriterMode.MANY
    name: str
    dataset: str
    strategy: Strategy = Strategy.LINEAR_PROBE
    backbone: BackboneConfig
    tap: str | int | None = None
    views: int = Field(default=1, ge=1)
    augmentation: AugmentationPolicy = AugmentationPolicy()
    head: HeadConfig = HeadConfig()
    extraction: ExtractionConfig = ExtractionConfig()
    error_budget: ErrorBudget = ErrorBudget()

    @model_validator(mode="after")
    def _probe_with_a_tap(self) -> Self:
        if self.strategy not in PROBES:
            raise ValueError(f"strategy must be one of {', '.join(PROBES)}")
        if self.strategy is Strategy.EARLY_LAYER_PROBE and self.tap is None:
            raise ValueError("early_layer_probe needs a tap: the name or number of a stage, such as layer2")
        return self


class TrialSummary(StrictModel):
    """One candidate of the head's search: its C (null for an MLP's epochs) and its accuracy on val."""

    C: float | None
    converged: bool | None
    val_top1: float | None
    val_nll: float | None


class TrainReport(Evaluation):
    """The bundle, how its head was chosen, and what it is worth on the evaluated split."""

    bundle: str
    strategy: Strategy
    tap: str
    num_train_rows: int
    converged: bool
    fit_seconds: float
    trials: list[TrialSummary]
    within_error_budget: bool


def run_train(config: TrainConfig, *, progress: Progress, new_run: bool = False) -> TrainReport:
    """Train by the config's strategy; equal inputs give a bundle of equal digest."""
    check_bundle_name(config.name)
    store = open_workspace(config.workspace, config.writers)
    manifest = open_dataset(store, config.dataset)
    backbone = fetch_backbone(store, config.backbone)
    tap = backbone.resolve_tap("pooled" if config.tap is None else config.tap)
    fitted = _fit(store, manifest, backbone, config, tap, progress, new_run=new_run)
    classifier = Classifier(
        strategy=config.strategy,
        backbone=backbone,
        tap=tap,
        head=fitted.head,
        classes=manifest.classes,
        decode_rule=config.extraction.decode,
        # As it was resolved here: on another machine "auto" may mean another precision.
        precision=resolve_precision(config.extraction),
        dtype=config.extraction.dtype,
    )
    files = classifier_files(store, classifier)
    task = EvaluationTask(
        classifier=classifier,
        model_digest=bundle_digest(files),
        dataset=config.dataset,
        splits=(held_out_split(manifest),),
        extraction=config.extraction,
        config=config.model_dump(mode="json"),
    )
    evaluation = evaluate_classifier(store, manifest, task, progress=progress, new_run=new_run)
    files["metrics.json"] = canonical_json(evaluation)
    files["README.md"] = model_card(_card(config, manifest, classifier, evaluation)).encode()
    reference = write_bundle(store, config.name, files)
    return TrainReport(
        **evaluation.model_dump(),
        bundle=str(reference),
        strategy=config.strategy,
        tap=tap,
        num_train_rows=fitted.num_train_rows,
        converged=fitted.converged,
        fit_seconds=fitted.seconds,
        trials=_trials(fitted),
        within_error_budget=config.error_budget.allows(evaluation.rejects, evaluation.samples),
    )


def held_out_split(manifest: Manifest) -> Split:
    """Where a model is measured: test, or val where there is no test."""
    return Split.TEST if Split.TEST in manifest.counts else Split.VAL


def _fit(
    store: ObjectStore,
    manifest: Manifest,
    backbone: BackboneRecord,
    config: TrainConfig,
    tap: str,
    progress: Progress,
    *,
    new_run: bool,
) -> FittedHead:
    """Cache what is missing, then fit: view 0 of all splits, and the other views of the train split only."""
    request = FeatureRequest(dataset=config.dataset, backbone=config.backbone, taps=(tap,))
    plain = FeatureJob(store, manifest, backbone, request, config.extraction)
    plain.ensure(progress=progress, new_run=new_run)
    train_sets = [plain.set_id(tap)]
    if config.views > 1:
        update = {"splits": (Split.TRAIN,), "views": config.views, "augmentation": config.augmentation}
        augmented = FeatureJob(
            store, manifest, backbone, request.model_copy(update=update), config.extraction
        )
        augmented.ensure(progress=progress, new_run=new_run)
        train_sets = [augmented.set_id(tap, view) for view in range(config.views)]
    progress.stage("fitting the head")
    cache = FeatureCache(store)
    train = open_features(cache, train_sets, read_labelled_rows(manifest, [Split.TRAIN]))
    val = None
    if Split.VAL in manifest.counts:
        val = open_features(cache, [plain.set_id(tap)], read_labelled_rows(manifest, [Split.VAL]))
    return fit_head(config.head, train, val, num_classes=len(manifest.classes))


def _trials(fitted: FittedHead) -> list[TrialSummary]:
    return [
        TrialSummary(
            C=trial.C,
            converged=trial.converged,
            val_top1=trial.val.top1 if trial.val else None,
            val_nll=trial.val.nll if trial.val else None,
        )
        for trial in fitted.trials
    ]


def _card(
    config: TrainConfig, manifest: Manifest, classifier: Classifier, evaluation: Evaluation
) -> ModelCard:
    backbone = classifier.backbone
    return ModelCard(
        name=config.name,
        summary=f"A {config.head.kind.value} head on the `{classifier.tap}` features of {backbone.arch}.",
        strategy=f"{config.strategy.value}: the network is frozen, only the head was trained.",
        dataset=config.dataset,
        dataset_fingerprint=manifest.fingerprint,
        split_rows={split.value: counts.num_samples for split, counts in manifest.counts.items()},
        classes=classifier.classes,
        split=", ".join(evaluation.splits),
        metrics=evaluation.intervals,
        intended_use="Images like those of the dataset above, prepared by `preprocess.json`.",
        limits=[
            "Measured on the held-out split of the same dataset: other sources of images may differ.",
            *(
                []
                if classifier.gives_probabilities
                else ["Scores are margins of a linear SVM, no probabilities."]
            ),
        ],
        lineage={"backbone weights": backbone.weights_digest, "evaluation run": evaluation.run},
    )
