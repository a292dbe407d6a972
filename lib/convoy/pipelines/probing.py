"""Heads on cached features: the probes, and the head that a fine-tuning begins with."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from statistics import fmean
from typing import NamedTuple

import pyarrow as pa
from pydantic import Field

from convoy.core.config import StrictModel
from convoy.core.progress import Progress
from convoy.core.records import Split
from convoy.core.statistics import wilson_interval
from convoy.pipelines.backbone_record import BackboneRecord
from convoy.pipelines.distillation import TaughtRows
from convoy.pipelines.feature_plan import FeatureRequest, holding_features
from convoy.pipelines.feature_source import LabelledRows, count_rejects, open_features
from convoy.pipelines.feature_summary import seconds_under_way
from convoy.pipelines.features import FeatureJob
from convoy.pipelines.pixel_statistics import resolve_augmentation
from convoy.pipelines.train_config import PROBES, TrainConfig
from convoy.pipelines.training_rows import has_labels, has_validation_rows, read_split, validation_rows
from convoy.storage.commits import read_commits, read_manifest
from convoy.storage.feature_cache import FeatureCache
from convoy.storage.manifests import Manifest
from convoy.storage.object_store import ObjectStore
from convoy.storage.runs import RunFolder
from convoy.vision.distillation import Teacher
from convoy.vision.head_config import check_choice
from convoy.vision.head_fitting import FittedHead, fit_head
from convoy.vision.head_path import KeptPoints

# Of fewer images most of the time is that of starting: they tell nothing of a pass.
_FEWEST_TIMED = 300


class TrainingInputs(NamedTuple):
    """What heads and networks are trained from: a dataset of a workspace, a network, and the config of the job."""

    store: ObjectStore
    manifest: Manifest
    backbone: BackboneRecord
    config: TrainConfig


class HeadTrialSummary(StrictModel):
    """One candidate of the head's search: its C (null for an MLP's epochs) and its accuracy on val."""

    C: float | None
    converged: bool | None
    val_top1: float | None
    val_nll: float | None


class HeadSummary(StrictModel):
    """A head that was fitted on cached features, and what that saved.

    The fit took `fit_seconds`, reading the features included, and went `num_passes` times over the rows. Through the
    frozen body each pass would have taken `body_pass_s`, by the run that computed most of the features; `saved_s` is
    that for all passes, less the fit, and less the share of a pass that computed features for it now: for a probe the
    passes of the same fit, for a fine-tuning (`in_place_of`) the epochs that the fit replaces. Null where no run timed
    some hundreds of images. `reject_codes` count the training images that have no features, and were left out;
    `val_rejects` is the number of such validation images. `val_top1` is that of the chosen trial, null without
    validation rows, and in summaries of before.
    """

    num_rows: int
    fit_seconds: float
    num_passes: int
    body_pass_s: float | None
    saved_s: float | None
    converged: bool
    trials: list[HeadTrialSummary]
    reject_codes: dict[str, int] = Field(default_factory=dict)
    val_rejects: int = 0
    val_top1: float | None = None

    def in_place_of(self, num_epochs: int, *, num_views: int) -> HeadSummary:
        """The summary of a fit that replaces so many epochs through the body, each of one view of every image.

        It saves nothing, and `saved_s` is negative, where features took as many passes now: one a view.
        """
        if self.body_pass_s is None or self.saved_s is None:
            return self
        # The rows of the fit, and so its passes, are of all views.
        saved_s = self.saved_s + self.body_pass_s * (num_epochs / num_views - self.num_passes)
        return self.model_copy(update={"saved_s": saved_s})

    def notes_of_loss(self, val_top1: float | None, num_val_rows: int) -> tuple[str, ...]:
        """That a network which began with the head ended below it on so many validation rows, by more than chance."""
        if self.val_top1 is None or val_top1 is None:
            return ()
        if wilson_interval(val_top1 * num_val_rows, num_val_rows).high >= self.val_top1:
            return ()
        return (
            "the network ends below the fitted head that it began with: top-1 on the validation rows is"
            f" {val_top1:.4f}, and was {self.val_top1:.4f}; lower learning_rate, or keep that head with the strategy"
            " linear_probe",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """A fitted head, its summary, and how many images there were to choose it by, rejects included."""

    fitted: FittedHead
    summary: HeadSummary
    num_val_images: int


def check_head(manifest: Manifest, config: TrainConfig) -> None:
    """Raise ConfigError, before any feature is computed, where no row could choose among several values of C."""
    check_choice(config.head, has_val=has_validation_rows(manifest, config.rows))


def fit_probe(
    inputs: TrainingInputs,
    *,
    tap: str,
    taught: TaughtRows,
    progress: Progress,
    new_run: bool,
    kept: KeptPoints | None = None,
) -> Probe:
    """Cache what is missing, then fit: view 0 of all splits, and the other views of the train split only.

    Where `rows` takes a few of each class, no other training image is looked at, and of the other splits only `val`.
    So it is for the head of a network, which is measured through itself, and not from these features: unlabelled images
    and those of `test` are left out. The head learns from the rows of `taught`, and from what a teacher says of them.
    What of the fit is `kept` is not fitted again.
    Errors are those of `check_head`.
    """
    store, manifest, backbone, config = inputs
    check_head(manifest, config)
    config = config.model_copy(update={"extraction": holding_features(config.extraction, backbone)})
    request = FeatureRequest(dataset=config.dataset, backbone=backbone.config, taps=(tap,))
    few, judges = _few_rows(manifest, config)
    plain = FeatureJob(
        store,
        manifest,
        backbone,
        request,
        config.extraction,
        rows=None if few is None else pa.concat_tables([few, *judges]),
    )
    features = plain.ensure(progress=progress, new_run=new_run)
    train_sets, shares_computed = [plain.set_id(tap)], [features.share_computed]
    if config.views > 1:
        augmented = _augmented_job(inputs._replace(config=config), request, few, progress)
        drawn = augmented.ensure(progress=progress, new_run=new_run)
        train_sets = [augmented.set_id(tap, view) for view in range(config.views)]
        shares_computed += [drawn.share_computed] * (config.views - 1)
    progress.stage("fitting the head")
    cache, started_s = FeatureCache(store), time.monotonic()
    train = open_features(cache, train_sets, LabelledRows.of(taught.rows, _teacher(taught, config)))
    watched = validation_rows(manifest, config.rows)
    val = None if watched is None else open_features(cache, [plain.set_id(tap)], LabelledRows.of(watched))
    read_s = time.monotonic() - started_s
    fitted = fit_head(config.head, train, val, num_classes=len(manifest.classes), kept=kept)
    fitted = replace(fitted, seconds=read_s + fitted.seconds)
    is_whole = train.num_rows == len(train_sets) * taught.rows.num_rows
    reject_codes = {} if is_whole else count_rejects(cache, train_sets[:1], taught.rows)
    num_val_images = 0 if watched is None else watched.num_rows
    val_rejects = 0 if val is None else num_val_images - val.num_rows
    image_s = _seconds_an_image(store, train_sets[0])
    summary = _summarise(fitted, image_s, fmean(shares_computed)).model_copy(
        update={"reject_codes": reject_codes, "val_rejects": val_rejects}
    )
    return Probe(fitted=fitted, summary=summary, num_val_images=num_val_images)


def _teacher(taught: TaughtRows, config: TrainConfig) -> Teacher | None:
    if taught.teacher_logits_NK is None or config.distill is None:
        return None
    return Teacher(taught.teacher_logits_NK, config.distill)


def _augmented_job(
    inputs: TrainingInputs, request: FeatureRequest, few: pa.Table | None, progress: Progress
) -> FeatureJob:
    store, manifest, backbone, config = inputs
    policy = resolve_augmentation(
        store, manifest, config.dataset, config.augmentation, config.extraction.decode, progress
    )
    update = {"splits": (Split.TRAIN,), "views": config.views, "augmentation": policy}
    return FeatureJob(
        store, manifest, backbone, request.model_copy(update=update), config.extraction, rows=few
    )


def _few_rows(manifest: Manifest, config: TrainConfig) -> tuple[pa.Table | None, list[pa.Table]]:
    """The training rows of a limit, or of a network, and those of `val`; None for a probe that looks at all splits."""
    if config.rows.max_per_class is None and config.strategy in PROBES:
        return None, []
    judges = [read_split(manifest, Split.VAL)] if has_labels(manifest, Split.VAL) else []
    # Those of all folds, so that their trainings share one run.
    return read_split(manifest, Split.TRAIN, config.rows.without_fold), judges


def _summarise(fitted: FittedHead, image_s: float | None, share_computed: float) -> HeadSummary:
    """The summary where an image takes so long through the body, and this share of the rows was computed now."""
    iterations = [trial.num_iterations for trial in fitted.trials]
    # The epochs of an MLP are counted on, the iterations for each C begin anew.
    num_passes = iterations[-1] if fitted.trials[-1].C is None else sum(iterations)
    body_pass_s = None if image_s is None else image_s * fitted.num_train_rows
    return HeadSummary(
        num_rows=fitted.num_train_rows,
        fit_seconds=fitted.seconds,
        num_passes=num_passes,
        body_pass_s=body_pass_s,
        saved_s=None if body_pass_s is None else body_pass_s * (num_passes - share_computed) - fitted.seconds,
        converged=fitted.converged,
        trials=_trials(fitted),
        val_top1=fitted.chosen.val.top1 if fitted.chosen.val else None,
    )


def _seconds_an_image(store: ObjectStore, set_id: str) -> float | None:
    """What an image took in the run that computed most of a set, by all workers beside each other."""
    commits = read_commits(store, set_id)
    largest = max(commits, key=lambda one: sum(part.num_rows for part in one.parts), default=None)
    manifest = None if largest is None else read_manifest(RunFolder(store, largest.run_id))
    if manifest is None or manifest.num_results < _FEWEST_TIMED:
        return None
    return seconds_under_way(manifest.slices) / manifest.num_results


def _trials(fitted: FittedHead) -> list[HeadTrialSummary]:
    return [
        HeadTrialSummary(
            C=trial.C,
            converged=trial.converged,
            val_top1=trial.val.top1 if trial.val else None,
            val_nll=trial.val.nll if trial.val else None,
        )
        for trial in fitted.trials
    ]
