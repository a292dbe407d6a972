"""Candidates, the cheapest first: a new head on cached features, new weights of an ensemble, the network trained on."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from convoy.core.errors import DataError, RunMismatch, TrainingError
from convoy.core.progress import Progress
from convoy.core.records import Split
from convoy.core.statistics import wilson_interval
from convoy.core.version import VERSION
from convoy.pipelines.backbone_record import BackboneRecord
from convoy.pipelines.classifier_tensors import classifier_files, stored_head
from convoy.pipelines.classifiers import Classifier, Strategy
from convoy.pipelines.committees import CommitteeRecord, committee_of, single_committee, write_ensemble
from convoy.pipelines.device_settings import settle_precision
from convoy.pipelines.feature_plan import ExtractionConfig, holding_features
from convoy.pipelines.feature_source import LabelledRows, open_features
from convoy.pipelines.models import fetch_backbone
from convoy.pipelines.network_plan import trained_backbone_config
from convoy.pipelines.network_training import CurveDrawer
from convoy.pipelines.retrain_config import RetrainConfig
from convoy.pipelines.retrain_gate import cost_check
from convoy.pipelines.retrain_rows import RetrainRows
from convoy.pipelines.retrain_scoring import CachedScorer, NamedRows
from convoy.pipelines.train import TrainReport, run_train
from convoy.pipelines.train_config import TrainConfig
from convoy.pipelines.trial_trainings import give_up_trainings
from convoy.storage.bundles import BundleRef, ModelCard, model_card, resolve_bundle, write_bundle
from convoy.storage.leases import WhenHeld
from convoy.storage.retrains import RetrainFolder, RetrainPlan
from convoy.vision.backbones import build_network
from convoy.vision.depth_axis import count_macs
from convoy.vision.ensembling import least_nll_weights
from convoy.vision.head_config import HeadKind
from convoy.vision.head_fitting import fit_head


@dataclass(frozen=True, slots=True, kw_only=True)
class MadeModel:
    """A bundle that a step wrote, and how many rows it learnt from."""

    ref: BundleRef
    train_rows: int


# None where no model that may be had can pass the gate.
Step = Callable[[], MadeModel | None]


class CandidateMaker:
    """Makes candidates for one version of a dataset; equal inputs on one machine give bundles of equal digest.

    `notes` tell what a person should know of the steps that were taken.
    """

    def __init__(
        self,
        folder: RetrainFolder,
        config: RetrainConfig,
        rows: RetrainRows,
        scorer: CachedScorer,
        *,
        plan: RetrainPlan,
        progress: Progress,
        draw_curves: CurveDrawer,
    ) -> None:
        self._folder = folder
        self._store = folder.store
        self._date = plan.date
        self._manifest = rows.manifest
        self._config = config
        self._rows = rows
        self._scorer = scorer
        self._progress = progress
        self._draw_curves = draw_curves
        self.notes: list[str] = []
        lineage = {
            "retraining": f"{config.name}/{plan.date}",
            "dataset fingerprint": plan.fingerprint,
            "convoy": VERSION,
        }
        if plan.champion is not None:
            lineage["champion before"] = f"{config.name}@{plan.champion}"
        self._lineage = lineage

    def objections(self, champion: CommitteeRecord | None) -> list[str]:
        """Why no step can be taken from this champion."""
        if champion is None or champion.gate is None:
            return []
        # A gate is calibrated for its members' weights, on outputs of every view, which nothing here keeps.
        return [
            "the champion has a gate that new weights would not fit: build it anew with convoy tune, and promote it"
        ]

    def steps(self, champion: CommitteeRecord | None) -> dict[str, Step]:
        """What could help, in order of cost."""
        if champion is None:
            return {"first_model": self._first_model}
        steps: dict[str, Step] = {}
        if len(champion.members) > 1:
            steps["refit_weights"] = lambda: self._refit_weights(champion)
        else:
            steps["refit_head"] = lambda: self._refit_head(champion.members[0].classifier)
        if self._config.fine_tune is not None and len(champion.members) == 1:
            steps["fine_tune"] = lambda: self._fine_tune(champion.members[0].classifier)
        return steps

    def _first_model(self) -> MadeModel:
        backbone = fetch_backbone(self._store, self._config.backbone)
        # So that another machine computes the same features.
        extraction, _ = settle_precision(
            self._store, self._config.dataset, holding_features(self._config.extraction, backbone)
        )
        return self._fit(backbone, backbone.resolve_tap(self._config.tap), extraction)

    def _refit_head(self, champion: Classifier) -> MadeModel:
        """A head on the champion's own features; a network without one gets it on the tap of the config."""
        champion = champion.settled(self._store, self._config.dataset)
        extraction = champion.extraction_like(self._config.extraction)
        has_head = champion.head is not None
        tap = champion.tap if has_head else champion.backbone.resolve_tap(self._config.tap)
        return self._fit(champion.backbone, tap, extraction)

    def _fit(self, backbone: BackboneRecord, tap: str, extraction: ExtractionConfig) -> MadeModel:
        set_id = self._scorer.ensure_set(backbone, tap, extraction)
        self._progress.stage("fitting the head")
        train_rows, val_rows = self._rows.training(Split.TRAIN), self._rows.training(Split.VAL)
        train = open_features(self._scorer.cache, [set_id], LabelledRows.of(train_rows))
        val = None
        if val_rows.num_rows:
            val = open_features(self._scorer.cache, [set_id], LabelledRows.of(val_rows))
        fitted = fit_head(self._config.head, train, val, num_classes=len(self._manifest.classes))
        classifier = Classifier(
            strategy=Strategy.LINEAR_PROBE,
            backbone=backbone,
            tap=tap,
            head=stored_head(fitted.head),
            classes=self._manifest.classes,
            decode_rule=extraction.decode,
            precision=extraction.precision,
            dtype=extraction.dtype,
        )
        return self._write(classifier, fitted.num_train_rows)

    def _write(self, classifier: Classifier, num_train_rows: int) -> MadeModel:
        files = classifier_files(self._store, classifier)
        committee = single_committee(classifier, name=self._config.name, digest="")
        metrics, card = self._describe(committee, "a head on cached features", num_train_rows)
        described = {"metrics.json": json.dumps(metrics).encode(), "README.md": card.encode()}
        ref = write_bundle(self._store, self._config.name, {**files, **described})
        return MadeModel(ref=ref, train_rows=num_train_rows)

    def _refit_weights(self, champion: CommitteeRecord) -> MadeModel:
        """The same members, weighed by what they say of the validation rows of today."""
        table = self._rows.training(Split.VAL)
        known = set(champion.classes)
        is_known = np.array([name in known for name in table["class"].to_pylist()], np.bool_)
        table = table.filter(is_known)
        if not table.num_rows:
            raise DataError(
                "an ensemble is weighed by validation rows, and there is none",
                where=self._manifest.uri,
                next_step="give the dataset a val split",
            )
        rows = NamedRows.of(table["content_id"], table["class"].to_pylist())
        values_MNK, found_N = self._scorer.member_values(champion, rows)
        labels_N = np.array([champion.classes.index(name) for name in rows.names_N])
        weights_M = least_nll_weights(values_MNK[:, found_N], labels_N[found_N], champion.averaging)
        members = [
            replace(member, weight=float(weight))
            for member, weight in zip(champion.members, weights_M, strict=True)
            if weight > 0
        ]
        weighed = committee_of(
            members, plan=champion.plan, averaging=champion.averaging, temperature=champion.temperature
        )
        num_rows = int(found_N.sum())
        metrics, card = self._describe(weighed, "an ensemble whose weights were fitted anew", num_rows)
        ref = write_ensemble(
            self._store, self._config.name, weighed, metrics={"measured": metrics}, card=card
        )
        return MadeModel(ref=ref, train_rows=num_rows)

    def _fine_tune(self, champion: Classifier) -> MadeModel | None:
        """The network of the config, trained once a date, by the settings of its plan, on all training rows then."""
        arch = self._config.backbone.arch
        if arch != champion.backbone.arch:
            self.notes.append(
                f"fine_tune is for {arch}, the config's backbone, and the champion is {champion.backbone.arch}"
            )
        kept = self._folder.fine_tuned(self._date)
        if kept is None:
            if self._rows.num_leaks:
                self.notes.append(
                    f"fine_tune is left out, as a network would learn {self._rows.num_leaks} images of the holdout:"
                    " take them out of the train split"
                )
                return None
            cost = cost_check(self._macs_when_trained(), champion.macs, self._config.gate)
            if not cost.passed:
                self.notes.append(f"fine_tune is left out, as the gate would refuse {arch}: {cost.text}")
                return None
            try:
                report = self._train_network()
            except TrainingError as error:
                # By the same settings it would end so for ever.
                give_up_trainings(self._store, [self._training_target])
                self.notes.append(
                    f"fine_tune is left out, as its training failed: {error.what}; change its settings"
                )
                return None
            self._folder.keep_fine_tuned(self._date, report.model_dump(mode="json"))
        else:
            report = TrainReport.model_validate(kept)
        return MadeModel(ref=resolve_bundle(self._store, report.bundle), train_rows=report.num_train_rows)

    def _macs_when_trained(self) -> int:
        config = self._training_config()
        network = build_network(trained_backbone_config(config, len(self._manifest.classes)))
        return count_macs(network, input_px=fetch_backbone(self._store, config.backbone).preset.crop_px)

    @property
    def _training_target(self) -> str:
        # No bundle is named so: what a person trains under the model's name is left alone.
        return f"{self._config.name}/retrain"

    def _train_network(self) -> TrainReport:
        train = partial(
            run_train,
            self._training_config(),
            progress=self._progress,
            draw_curves=self._draw_curves,
            when_held=WhenHeld.WAIT,
            fingerprint=self._manifest.fingerprint,
            target=self._training_target,
        )
        try:
            return train()
        except RunMismatch:
            # Left behind by an earlier date; this one has other rows.
            give_up_trainings(self._store, [self._training_target])
            return train()

    def _training_config(self) -> TrainConfig:
        config, settings = self._config, self._config.fine_tune
        assert settings is not None
        given: dict[str, Any] = {name: getattr(settings, name) for name in settings.model_fields_set}
        if config.head.kind is HeadKind.SOFTMAX:
            given["head"] = config.head
        return TrainConfig(
            workspace=config.workspace,
            writers=config.writers,
            name=config.name,
            dataset=config.dataset,
            strategy=Strategy.FINE_TUNE,
            backbone=config.backbone,
            extraction=config.extraction,
            **given,
        )

    def _describe(
        self, committee: CommitteeRecord, summary: str, num_train_rows: int
    ) -> tuple[Mapping[str, Any], str]:
        """The metrics and the card of a candidate, measured on the holdout."""
        scores = self._scorer.scores(committee, self._rows.holdout, self._rows.shared_classes)
        num_rows = int(scores.found_N.sum())
        top1 = wilson_interval(int(scores.correct_N[scores.found_N].sum()), num_rows)
        card = ModelCard(
            name=self._config.name,
            summary=f"{summary[0].upper()}{summary[1:]}, made by `convoy retrain`.",
            strategy=summary,
            dataset=self._config.dataset,
            dataset_fingerprint=self._manifest.fingerprint,
            split_rows={"train": num_train_rows, "holdout": num_rows},
            classes=committee.classes,
            split="holdout",
            metrics={"top1": top1},
            intended_use="Images like those of the dataset.",
            limits=["Whether it may be used is said by the aliases of the model, not by this card."],
            lineage=self._lineage,
        )
        metrics = {
            "top1": top1.estimate,
            "ece": scores.ece,
            "splits": ["holdout"],
            "rows": "holdout",
            "labelled": num_rows,
            "dataset_fingerprint": self._manifest.fingerprint,
            "lineage": self._lineage,
        }
        return metrics, model_card(card)
