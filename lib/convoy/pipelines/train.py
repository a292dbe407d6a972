"""`convoy train`: config → strategy → head or network → evaluation → bundle."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from pydantic import Field

from convoy.cluster.session import ray_session
from convoy.core.errors import ConfigError, DataError
from convoy.core.fingerprints import canonical_json
from convoy.core.progress import Progress
from convoy.core.records import Split
from convoy.core.training_events import EpochResult
from convoy.pipelines.backbone_record import BackboneRecord
from convoy.pipelines.classifier_tensors import classifier_files, stored_head
from convoy.pipelines.classifiers import Classifier, Strategy
from convoy.pipelines.dataset_choice import open_as_begun
from convoy.pipelines.device_settings import settle_precision
from convoy.pipelines.distillation import taught_rows, with_begun_teacher, with_pinned_teacher
from convoy.pipelines.evaluation import Evaluation, EvaluationTask, evaluate_classifier, require_labels
from convoy.pipelines.feature_plan import ExtractionConfig, FeatureDtype, holding_features
from convoy.pipelines.learning_curves import CURVES_FILE
from convoy.pipelines.model_cards import rows_in_words, training_card
from convoy.pipelines.models import fetch_backbone
from convoy.pipelines.network_training import CurveDrawer, TrainedNetwork, network_training, open_training
from convoy.pipelines.probing import HeadSummary, HeadTrialSummary, TrainingInputs, check_head, fit_probe
from convoy.pipelines.train_as_is import as_is_for
from convoy.pipelines.train_config import NETWORKS, PROBES, TrainConfig
from convoy.pipelines.training_rows import (
    Fold,
    balance_notes,
    count_classes,
    fold_rows,
    has_labels,
    read_split,
    row_notes,
    settle_balance,
)
from convoy.pipelines.workspace import open_workspace
from convoy.storage.bundles import bundle_digest, check_bundle_name, model_card, write_bundle
from convoy.storage.datasets import open_dataset
from convoy.storage.leases import WhenHeld
from convoy.storage.manifests import Manifest
from convoy.storage.object_store import ObjectStore
from convoy.storage.runs import RunFolder
from convoy.vision.backbone_config import BackboneConfig
from convoy.vision.factories import with_pinned_code
from convoy.vision.training_config import Phase


class TrainReport(Evaluation):
    """The bundle, how it was trained, and what it is worth on the evaluated split, or on the fold that was left out.

    Which fields are filled depends on the strategy: `trials` and `head` tell of heads on cached features,
    `phases`, `history` and `learning_curves` of networks; `train_run` is the folder under `runs/`.
    `train_rejects` are training images that could not be used, by code, `val_rejects` those that would have chosen.
    """

    bundle: str
    strategy: Strategy
    tap: str
    num_train_rows: int
    converged: bool | None = None
    fit_seconds: float | None = None
    trials: list[HeadTrialSummary] = Field(default_factory=list)
    head: HeadSummary | None = None
    train_run: str | None = None
    phases: list[Phase] = Field(default_factory=list)
    history: list[EpochResult] = Field(default_factory=list)
    learning_curves: str | None = None
    train_rejects: dict[str, int] = Field(default_factory=dict)
    val_rejects: int = 0
    notes: list[str] = Field(default_factory=list)
    within_error_budget: bool

    @property
    def val_top1_by_epoch(self) -> tuple[tuple[int, float], ...]:
        """The validation top-1 after each epoch of a network."""
        return tuple((one.epoch, one.val_top1) for one in self.history if one.val_top1 is not None)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Trained:
    """What a strategy brings: a classifier, its part of the report, and how its run ends.

    It learnt from `num_train_rows`, every view of an image being one, and was given `num_train_images`, and
    `num_val_images` to choose by.
    """

    classifier: Classifier
    num_train_rows: int
    num_train_images: int
    num_val_images: int = 0
    report: dict[str, Any] = field(default_factory=dict)
    finish: Callable[[dict[str, Any]], None] = lambda report: None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    """A call of `convoy train` with what every strategy needs."""

    store: ObjectStore
    manifest: Manifest
    config: TrainConfig
    progress: Progress
    draw_curves: CurveDrawer
    new_run: bool
    when_held: WhenHeld
    target: str | None
    measured_split: Split
    measured_fold: Fold | None


def run_train(
    config: TrainConfig,
    *,
    progress: Progress,
    draw_curves: CurveDrawer,
    new_run: bool = False,
    when_held: WhenHeld = WhenHeld.REFUSE,
    evaluated: Split | None = None,
    fingerprint: str | None = None,
    target: str | None = None,
) -> TrainReport:
    """Train by the config's strategy; on one machine equal inputs give a bundle of equal digest.

    `draw_curves` makes the picture of the learning curves that is kept in the run folder. The model is measured on
    the split `evaluated`, by default on its own fold, or else on the held-out split: a search measures on val, and
    leaves test alone. `fingerprint` names a version of the dataset, see `training_dataset`. An unfinished network of
    the same `target`, by default the config's name, is gone on with; where another driver trains it, LeaseHeld is
    raised, or its end waited for. DataError where nothing could be measured.
    """
    check_bundle_name(config.name)
    store = open_workspace(config.workspace, config.writers)
    manifest, version_notes = training_dataset(store, config, fingerprint, new_run=new_run, target=target)
    config = config.model_copy(update={"backbone": with_pinned_code(config.backbone)})
    notes = list(version_notes)
    if config.strategy is not Strategy.AS_IS:
        # Before any network is fetched or Ray is there: a class without images can be learnt by no strategy.
        count_classes(read_split(manifest, Split.TRAIN, config.rows), manifest.classes)
        open_run = open_training(store, target or config.name)
        config, teacher_notes = with_begun_teacher(config, open_run, new_run=new_run)
        config = with_pinned_teacher(store, manifest, config)
        notes += teacher_notes
    # Before hours of training: a bundle is written with what it is worth, or not at all.
    split, fold = measured_on(manifest, config, evaluated)
    if config.strategy in PROBES:
        check_head(manifest, config)
    job = _Job(
        store=store,
        manifest=manifest,
        config=config,
        progress=progress,
        draw_curves=draw_curves,
        new_run=new_run,
        when_held=when_held,
        target=target,
        measured_split=split,
        measured_fold=fold,
    )
    # One Ray for head, training and evaluation of a network; each of them alone would start its own.
    with ray_session() if config.strategy in NETWORKS else nullcontext():
        report = _run(job)
    return report.model_copy(update={"notes": [*notes, *report.notes]})


def training_dataset(
    store: ObjectStore,
    config: TrainConfig,
    fingerprint: str | None = None,
    *,
    new_run: bool = False,
    target: str | None = None,
) -> tuple[Manifest, list[str]]:
    """The dataset of a training in the version of a fingerprint, and a note where that may surprise.

    By default it is the current one; an unfinished training of a network goes on with that on which it began.
    """
    if fingerprint is not None or config.strategy not in NETWORKS:
        return open_dataset(store, config.dataset, fingerprint), []
    return open_as_begun(store, open_training(store, target or config.name), config.dataset, new_run=new_run)


def measured_on(
    manifest: Manifest, config: TrainConfig, evaluated: Split | None = None
) -> tuple[Split, Fold | None]:
    """The split that a model is measured on, and which fold of it; DataError where it has no labelled row."""
    if evaluated is not None:
        require_labels(manifest, [evaluated])
        return evaluated, None
    if config.rows.fold is not None:
        return Split.TRAIN, config.rows.fold
    for split in (Split.TEST, Split.VAL):
        if has_labels(manifest, split):
            return split, None
    raise DataError(
        "neither test nor val has a labelled sample: nothing could be measured",
        where=manifest.uri,
        next_step="leave a fold of the training images out with --set 'rows.fold={index: 0, count: 5}', or add labels",
    )


def _run(job: _Job) -> TrainReport:
    """Train, evaluate on the split of the job, and write the bundle."""
    store, manifest, config = job.store, job.manifest, job.config
    with _train(job) as trained:
        classifier = trained.classifier
        files = classifier_files(store, classifier)
        measured = _evaluate(job, classifier, bundle_digest(files))
        evaluation = measured.model_copy(update={"rows": rows_in_words(measured, job.measured_fold)})
        described = {**evaluation.model_dump(mode="json"), "dataset_fingerprint": manifest.fingerprint}
        files["metrics.json"] = canonical_json(described)
        card = training_card(
            config,
            manifest,
            classifier,
            evaluation,
            measured_fold=job.measured_fold,
            notes=trained.report.get("notes", ()),
        )
        files["README.md"] = model_card(card).encode()
        reference = write_bundle(store, config.name, files)
        num_rejects = evaluation.rejects + sum(trained.report.get("train_rejects", {}).values())
        num_images = evaluation.samples + trained.num_train_images
        # A fold, or val where there is no test, is both: it chooses, and it is measured.
        if job.measured_fold is None and job.measured_split is not Split.VAL:
            num_rejects += trained.report.get("val_rejects", 0)
            num_images += trained.num_val_images
        rows_told = [] if config.strategy is Strategy.AS_IS else row_notes(manifest, config.rows)
        notes = [*config.unused_keys_notes, *rows_told, *trained.report.get("notes", ())]
        report = TrainReport(
            **evaluation.model_dump(),
            **(trained.report | {"notes": notes}),
            bundle=str(reference),
            strategy=config.strategy,
            tap=classifier.tap,
            num_train_rows=trained.num_train_rows,
            within_error_budget=config.error_budget.allows(num_rejects, num_images),
        )
        trained.finish(report.model_dump(mode="json"))
        return report


def _evaluate(job: _Job, classifier: Classifier, model_digest: str) -> Evaluation:
    """What the classifier is worth on the rows that the job says."""
    config, fold = job.config, job.measured_fold
    task = EvaluationTask(
        classifier=classifier,
        model_digest=model_digest,
        dataset=config.dataset,
        splits=(job.measured_split,),
        extraction=classifier.extraction_like(config.extraction),
        config=config.model_dump(mode="json"),
        rows=fold_rows(job.manifest, config.rows) if fold else None,
    )
    return evaluate_classifier(job.store, job.manifest, task, progress=job.progress, new_run=job.new_run)


def _train(job: _Job) -> AbstractContextManager[_Trained]:
    """What the strategy brings; a run that it has is held until the context ends."""
    config = job.config
    if config.strategy is Strategy.AS_IS:
        return nullcontext(_use_as_is(job, fetch_backbone(job.store, config.backbone)))
    if config.strategy is Strategy.FROM_SCRATCH:
        return _train_network(job, fetch_backbone(job.store, random_weights(config, job.manifest)))
    backbone = fetch_backbone(job.store, config.backbone)
    if config.strategy in NETWORKS:
        return _train_network(job, backbone)
    return nullcontext(_train_probe(job, backbone))


def _use_as_is(job: _Job, backbone: BackboneRecord) -> _Trained:
    classifier = as_is_for(job.manifest, job.config, backbone)
    return _Trained(classifier=classifier, num_train_rows=0, num_train_images=0)


def first_network(config: TrainConfig, manifest: Manifest) -> BackboneConfig:
    """The network that a training begins with; ConfigError where it is a new one and the config names weights."""
    is_new = config.strategy is Strategy.FROM_SCRATCH
    return random_weights(config, manifest) if is_new else config.backbone


def random_weights(config: TrainConfig, manifest: Manifest) -> BackboneConfig:
    """The backbone of a training from scratch; ConfigError if the config names pretrained weights."""
    if config.backbone.weights not in ("random", "DEFAULT"):
        raise ConfigError(
            "from_scratch takes no pretrained weights",
            where="backbone.weights",
            next_step="leave them out, or choose the strategy fine_tune",
        )
    return config.backbone.model_copy(update={"weights": "random", "num_classes": len(manifest.classes)})


def _train_probe(job: _Job, backbone: BackboneRecord) -> _Trained:
    config = job.config
    tap = backbone.resolve_tap(config.wanted_tap)
    rows = read_split(job.manifest, Split.TRAIN, config.rows)
    taught = taught_rows(job.store, job.manifest, config, rows, progress=job.progress)
    counts = count_classes(taught.rows, job.manifest.classes)
    probe = fit_probe(
        TrainingInputs(job.store, job.manifest, backbone, config),
        tap=tap,
        taught=taught.balanced(settle_balance(config.recipe.balance, counts), job.manifest.classes),
        progress=job.progress,
        new_run=job.new_run,
    )
    # As it was settled here: on another machine "auto" may mean another precision.
    extraction, precision_notes = settle_precision(
        job.store, config.dataset, holding_features(config.extraction, backbone)
    )
    classifier = Classifier(
        strategy=config.strategy,
        backbone=backbone,
        tap=tap,
        head=stored_head(probe.fitted.head),
        classes=job.manifest.classes,
        decode_rule=config.extraction.decode,
        precision=extraction.precision,
        dtype=extraction.dtype,
    )
    summary = probe.summary
    report = {
        "converged": summary.converged,
        "fit_seconds": summary.fit_seconds,
        "trials": summary.trials,
        "head": summary,
        "train_rejects": dict(Counter(taught.reject_codes) + Counter(summary.reject_codes)),
        "val_rejects": summary.val_rejects,
        "notes": [*taught.notes, *balance_notes(config.recipe.balance, counts), *precision_notes],
    }
    return _Trained(
        classifier=classifier,
        num_train_rows=summary.num_rows,
        num_train_images=taught.rows.num_rows,
        num_val_images=probe.num_val_images,
        report=report,
    )


@contextmanager
def _train_network(job: _Job, backbone: BackboneRecord) -> Iterator[_Trained]:
    with network_training(
        job.store,
        job.manifest,
        backbone,
        job.config,
        job.progress,
        new_run=job.new_run,
        when_held=job.when_held,
        target=job.target,
    ) as training:
        network = training.run(job.draw_curves)
        # As it was settled here, as for probes.
        extraction, notes = settle_precision(job.store, job.config.dataset, job.config.network_extraction)
        served = [f"measured and served in {note}" for note in notes if note not in network.notes]
        yield _Trained(
            classifier=_network_classifier(job, network.backbone, extraction),
            num_train_rows=network.num_train_rows,
            num_train_images=network.num_train_images,
            num_val_images=network.num_val_rows,
            report=_network_report(job, training.folder, network) | {"notes": [*network.notes, *served]},
            finish=lambda report: training.finish(network, report, job.draw_curves),
        )


def _network_classifier(job: _Job, trained: BackboneRecord, extraction: ExtractionConfig) -> Classifier:
    return Classifier(
        strategy=job.config.strategy,
        backbone=trained,
        tap=trained.resolve_tap("logits"),
        head=None,
        classes=job.manifest.classes,
        decode_rule=extraction.decode,
        precision=extraction.precision,
        # Logits are few, and float16 would round them.
        dtype=FeatureDtype.FLOAT32,
    )


def _network_report(job: _Job, folder: RunFolder, network: TrainedNetwork) -> dict[str, Any]:
    curves = folder.key(CURVES_FILE)
    return {
        "head": network.setup.head,
        "train_run": folder.run_id,
        "phases": list(network.setup.plan.phases),
        "history": list(network.history),
        "learning_curves": job.store.uri(curves) if network.history else None,
        "train_rejects": network.reject_codes,
        "val_rejects": network.val_rejects,
    }
