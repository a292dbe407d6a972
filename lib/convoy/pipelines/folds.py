"""k-fold: a training for each fold, and predictions of every training row by the one that left it out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from convoy.cluster.session import ray_session
from convoy.core.config import StrictModel
from convoy.core.crop_policies import CropPlan, MemberOutputs
from convoy.core.errors import ConfigError, DataError
from convoy.core.fingerprints import canonical_json, digest
from convoy.core.progress import Progress
from convoy.core.records import Split
from convoy.pipelines.committee_predictions import CommitteeJob
from convoy.pipelines.committees import open_committee
from convoy.pipelines.distillation import with_pinned_teacher
from convoy.pipelines.models import fetch_backbone
from convoy.pipelines.network_training import CurveDrawer, config_identity
from convoy.pipelines.prediction_request import PredictionRequest
from convoy.pipelines.train import first_network, run_train
from convoy.pipelines.train_config import NETWORKS, PROBES, TrainConfig
from convoy.pipelines.training_rows import Fold, fold_rows, read_split
from convoy.pipelines.workspace import open_workspace
from convoy.storage.bundles import check_bundle_name, peek_bundle, resolve_bundle
from convoy.storage.datasets import open_dataset
from convoy.storage.documents import read_model
from convoy.storage.leases import WhenHeld
from convoy.storage.manifests import Manifest
from convoy.storage.member_predictions import MemberLogits, read_member_logits
from convoy.storage.object_store import ObjectStore
from convoy.storage.parts import read_rejects
from convoy.vision.factories import with_pinned_code
from convoy.vision.training_config import Balance

_POINTERS = "folds/"


class FoldModel(StrictModel):
    """The bundle of a training that left a fold out, and its top-1 on that fold: in the end, and after each epoch."""

    bundle: str
    fold: Fold
    top1: float
    epochs: tuple[tuple[int, float], ...] = ()
    within_error_budget: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class OutOfFold:
    """What the models of all folds say of the training rows: every row by the one model that did not see it.

    `logits` has one member, and the rows in the order of the manifest. `rejected` could not be predicted; `runs` are
    the committed runs of the folds.
    """

    logits: MemberLogits
    rejected: tuple[str, ...]
    runs: tuple[str, ...]


def train_folds(
    config: TrainConfig,
    count: int,
    *,
    progress: Progress,
    draw_curves: CurveDrawer,
    new_run: bool = False,
    fingerprint: str | None = None,
) -> list[FoldModel]:
    """Train one model for each of `count` folds of the training rows, under the name of the config and its fold.

    Each is watched by, and measured on, the fold that it leaves out. A fold that was trained already by the same
    config is not trained again, so a killed call goes on with the fold in which it was.
    """
    if config.rows.fold is not None:
        raise ConfigError("the config is that of one fold", where="rows.fold", next_step="leave it out")
    store = open_workspace(config.workspace, config.writers)
    manifest = open_dataset(store, config.dataset, fingerprint)
    config = config.model_copy(update={"backbone": with_pinned_code(config.backbone)})
    config = with_pinned_teacher(store, manifest, config)
    trainings = [_of_fold(config, Fold(index=index, count=count)) for index in range(count)]
    for training, fold in trainings:
        check_bundle_name(training.name)
        fold_rows(manifest, training.rows.model_copy(update={"fold": fold}))
    models = []
    # One Ray for all folds of a network; without, each would start its own.
    with ray_session() if config.strategy in NETWORKS else nullcontext():
        for training, fold in trainings:
            key = f"{_POINTERS}{_identity(store, manifest, training)}.json"
            model = None if new_run else _known(store, key)
            if model is None:
                progress.stage(f"fold {fold.index + 1} of {count}")
                report = run_train(
                    training,
                    progress=progress,
                    draw_curves=draw_curves,
                    new_run=new_run,
                    when_held=WhenHeld.WAIT,
                    fingerprint=manifest.fingerprint,
                )
                model = FoldModel(
                    bundle=report.bundle,
                    fold=fold,
                    top1=report.top1,
                    epochs=report.val_top1_by_epoch,
                    within_error_budget=report.within_error_budget,
                )
                store.put(key, canonical_json(model))
            models.append(model)
    return models


def out_of_fold(
    store: ObjectStore,
    manifest: Manifest,
    models: Sequence[FoldModel],
    config: TrainConfig,
    *,
    plan: CropPlan | None = None,
    progress: Progress,
) -> OutOfFold:
    """Predict each fold by its model over the crops of a plan, every view kept; predictions that exist are read.

    `config` is that of the trainings, without their folds. Raises DataError unless the models' folds hold every
    training row exactly once.
    """
    parts, rejected, runs = [], [], []
    for model in models:
        committee = open_committee(store, model.bundle).with_plan(plan or CropPlan())
        if committee.classes != manifest.classes:
            raise ConfigError(
                "the model of a fold has other classes than the dataset",
                where=model.bundle,
                next_step="train the folds again on this dataset",
            )
        request = PredictionRequest(
            committee=committee,
            dataset=config.dataset,
            splits=(Split.TRAIN,),
            extraction=config.extraction,
            keep=MemberOutputs.VIEWS,
            rows=fold_rows(manifest, config.rows.model_copy(update={"fold": model.fold})),
            local_cache=config.local_cache.options,
        )
        predictions = CommitteeJob(store, manifest, request).ensure(
            progress=progress,
            config={"bundle": model.bundle, "fold": model.fold.model_dump()},
            when_held=WhenHeld.WAIT,
        )
        runs.append(predictions.run_id)
        if predictions.manifest.num_results:
            parts.append(read_member_logits(store, predictions.manifest))
        rejected += read_rejects(store, predictions.manifest)["sample_id"].to_pylist()
    rows = read_split(manifest, Split.TRAIN, config.rows.without_fold)
    logits = join_folds(rows["sample_id"].to_pylist(), parts, rejected)
    return OutOfFold(logits=logits, rejected=tuple(sorted(rejected)), runs=tuple(runs))


def join_folds(
    sample_ids: Sequence[str], parts: Sequence[MemberLogits], rejected: Collection[str]
) -> MemberLogits:
    """The predictions of several folds as one, in the order of the ids.

    Raises DataError unless every id was predicted, or rejected, exactly once, and no other was.
    """
    predicted = [name for part in parts for name in part.sample_ids]
    found, wanted = Counter([*predicted, *rejected]), set(sample_ids)
    missing = [name for name in sample_ids if name not in found]
    odd = [name for name, count in found.items() if count > 1 or name not in wanted]
    if missing or odd:
        raise DataError(
            f"the folds do not hold every training row once: {len(missing)} are in none, {len(odd)} in several"
            f" or no training rows, such as {(missing + odd)[0]}",
            next_step="take the models of all folds of one count and seed",
        )
    if not predicted:
        raise DataError(
            "no row of any fold could be predicted", next_step="see the rejects of the folds' runs"
        )
    places = pc.index_in(
        pa.array(sample_ids, pa.large_string()), value_set=pa.array(predicted, pa.large_string())
    )
    order = places.drop_null().to_numpy()
    return MemberLogits(
        sample_ids=[predicted[place] for place in order],
        labels_N=np.concatenate([part.labels_N for part in parts])[order],
        logits_MVNK=np.concatenate([part.logits_MVNK for part in parts], axis=2)[:, :, order],
    )


def fold_name(name: str, index: int) -> str:
    """The name of the training of a fold, by that of the training of all folds."""
    return f"{name}-fold{index}"


def _of_fold(config: TrainConfig, fold: Fold) -> tuple[TrainConfig, Fold]:
    rows = config.rows.model_copy(update={"fold": fold})
    return config.model_copy(update={"name": fold_name(config.name, fold.index), "rows": rows}), fold


def _identity(store: ObjectStore, manifest: Manifest, training: TrainConfig) -> str:
    """A digest of everything that determines the model of a fold, and its name."""
    first = fetch_backbone(store, first_network(training, manifest))
    identity: dict[str, Any] = {
        "dataset_fingerprint": manifest.fingerprint,
        "weights_digest": first.weights_digest,
        "config": config_identity(training),
    }
    if training.strategy in PROBES and training.recipe.balance is not Balance.NONE:
        # Folds of before were fitted as if it were not there.
        identity["balances_probes"] = True
    return digest(identity)


def _known(store: ObjectStore, key: str) -> FoldModel | None:
    """A fold that was trained already, unless its bundle has gone."""
    model = read_model(FoldModel, store, key)
    if model is None:
        return None
    try:
        peek_bundle(store, resolve_bundle(store, model.bundle))
    except DataError:
        return None
    return model
