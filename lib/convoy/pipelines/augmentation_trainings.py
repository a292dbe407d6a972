"""Augmentation on networks: one short fine-tuning for each policy, and one without any."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from pydantic import PositiveFloat, PositiveInt

from convoy.cluster.session import ray_session
from convoy.core.config import StrictModel
from convoy.core.fingerprints import canonical_json, digest
from convoy.core.progress import Progress
from convoy.core.records import Split
from convoy.pipelines.augmentation_outcomes import NamedPolicy, PolicyOutcome
from convoy.pipelines.backbone_record import BackboneRecord
from convoy.pipelines.classifiers import Strategy
from convoy.pipelines.comparison import labelled_parts
from convoy.pipelines.feature_plan import ExtractionConfig
from convoy.pipelines.network_training import CurveDrawer, config_identity
from convoy.pipelines.probe_judging import UNKNOWN
from convoy.pipelines.train import run_train
from convoy.pipelines.train_config import TrainConfig
from convoy.pipelines.training_rows import RowLimit, validation_rows
from convoy.storage.commits import read_manifest
from convoy.storage.documents import read_json
from convoy.storage.leases import WhenHeld
from convoy.storage.manifests import Manifest
from convoy.storage.object_store import ObjectStore, WriterMode
from convoy.storage.runs import RunFolder
from convoy.vision.augmentation_policy import AugmentationPolicy
from convoy.vision.training_config import AUTO, Recipe, WeightAveraging

_FOLDER = "models/augmentation_effects/"


class ShortFineTuning(StrictModel):
    """The trainings of the budget `fine_tune`. The last epoch's weights count, so no row that judges has chosen."""

    epochs: PositiveInt = 5
    freeze_depth: int | str = AUTO
    learning_rate: PositiveFloat | None = None
    recipe: Recipe = Recipe(batch_size=32, averaging=WeightAveraging.LAST)


class FineTunings:
    """Fine-tunings of one backbone on some training rows of a dataset, judged on validation rows."""

    def __init__(
        self,
        store: ObjectStore,
        manifest: Manifest,
        dataset: str,
        limit: RowLimit,
        settings: ShortFineTuning,
        extraction: ExtractionConfig,
        draw_curves: CurveDrawer,
    ) -> None:
        self._store, self._manifest, self._dataset = store, manifest, dataset
        self._limit, self._settings, self._extraction = limit, settings, extraction
        self._draw_curves = draw_curves

    def outcomes(
        self, backbone: BackboneRecord, policies: Sequence[NamedPolicy], *, progress: Progress
    ) -> list[PolicyOutcome]:
        """What each policy does, in their order; a training that was done already is not done again."""
        none = NamedPolicy(name="none", strength=None, policy=AugmentationPolicy.ready("none"))
        rows = validation_rows(self._manifest, self._limit)
        judged = self._manifest.read_table().slice(0, 0) if rows is None else rows
        place_of = {name: place for place, name in enumerate(judged["sample_id"].to_pylist())}
        predicted = []
        with ray_session():
            for number, policy in enumerate([none, *policies], start=1):
                progress.stage(f"fine-tuning with {policy}, {number} of {len(policies) + 1}")
                predicted.append(self._predicted(self._train(backbone, policy, progress), place_of))
        return [
            PolicyOutcome(
                policy=policy,
                labels_N=judged["label"].to_numpy().astype(np.int64),
                without_N=predicted[0],
                with_N=with_N,
            )
            for policy, with_N in zip(policies, predicted[1:], strict=True)
        ]

    def _train(self, backbone: BackboneRecord, policy: NamedPolicy, progress: Progress) -> str:
        """The run that predicted the judged rows by a network that was trained with a policy."""
        config = self._config(backbone, policy)
        trained = config_identity(config)
        # The name comes from the identity.
        del trained["name"]
        identity = digest(
            {
                "dataset_fingerprint": self._manifest.fingerprint,
                "weights_digest": backbone.weights_digest,
                "config": trained,
            }
        )
        key = f"{_FOLDER}{identity}.json"
        known = read_json(self._store, key)
        if known is not None and read_manifest(RunFolder(self._store, known["run"])) is not None:
            return str(known["run"])
        config = config.model_copy(update={"name": f"{config.name}-{identity[:8]}"})
        report = run_train(
            config,
            progress=progress,
            draw_curves=self._draw_curves,
            when_held=WhenHeld.WAIT,
            evaluated=None if self._limit.fold else Split.VAL,
            fingerprint=self._manifest.fingerprint,
        )
        self._store.put(key, canonical_json({"run": report.run, "bundle": report.bundle}))
        return report.run

    def _predicted(self, run_id: str, place_of: Mapping[str, int]) -> NDArray[np.int64]:
        """The predicted class of each judged row; UNKNOWN for those that could not be read."""
        predicted_N = np.full(len(place_of), UNKNOWN, np.int64)
        for table in labelled_parts(self._store, run_id, ["sample_id", "label", "pred"]):
            places = [place_of[name] for name in table["sample_id"].to_pylist()]
            predicted_N[places] = table["pred"].to_numpy()
        return predicted_N

    def _config(self, backbone: BackboneRecord, policy: NamedPolicy) -> TrainConfig:
        words = (policy.name, policy.strength or "as-given")
        return TrainConfig(
            workspace=self._store.root_uri,
            # Who called us was let into the workspace by the rule of its own config.
            writers=WriterMode.SINGLE,
            name=f"augmentation-effect-{'-'.join(words).replace('_', '-')}",
            dataset=self._dataset,
            strategy=Strategy.FINE_TUNE,
            backbone=backbone.config,
            rows=self._limit,
            augmentation=policy.policy,
            epochs=self._settings.epochs,
            freeze_depth=self._settings.freeze_depth,
            learning_rate=self._settings.learning_rate,
            recipe=self._settings.recipe,
            extraction=self._extraction,
        )
