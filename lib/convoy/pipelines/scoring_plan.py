"""What the workers of a committee's predictions are told, and how the run is computed."""

from __future__ import annotations

import json
from typing import Any

from convoy.cluster.scoring_spec import MemberSpec, ScoreTable, ScoringSpec
from convoy.cluster.slices import WorkerPool
from convoy.core.crop_policies import EvaluationMode
from convoy.pipelines.classifiers import class_indices, keep_head
from convoy.pipelines.committees import CommitteeMember
from convoy.pipelines.feature_plan import compile_decision
from convoy.pipelines.model_choice import REFERENCES
from convoy.pipelines.prediction_request import PredictionRequest
from convoy.storage.manifests import Manifest
from convoy.storage.object_store import ObjectStore
from convoy.storage.predictions import PREDICTIONS_SCHEMA_VERSION
from convoy.storage.runs import RunFolder, RunRecord
from convoy.vision.committee_options import CommitteeOptions, MemberOptions

# In the settings of a run: whether its scores are probabilities. Runs of before do not say it.
GIVES_PROBABILITIES = "gives_probabilities"


def scoring_settings(manifest: Manifest, request: PredictionRequest, batch_size: int) -> dict[str, Any]:
    """What is decided once, so that a resumed run computes the very same numbers."""
    forecast_s = request.forecast_forward_s(request.num_rows(manifest))
    compiled, reason = compile_decision(request.extraction.compile, forecast_s)
    settings = {
        "compiled": compiled,
        "compile_reason": reason,
        "batch_size": batch_size,
        GIVES_PROBABILITIES: request.committee.gives_probabilities,
    }
    if request.scores is not None:
        settings["forecast"] = request.scores.forecast
        settings[REFERENCES] = dict(request.scores.references)
    return settings


def labels_in_committee(manifest: Manifest, request: PredictionRequest) -> tuple[int | None, ...]:
    """For each class of the dataset its index among the committee's.

    An evaluation refuses classes that the committee does not know, by a ConfigError; for scores they are null.
    """
    classes = request.committee.classes
    if request.scores is None:
        return tuple(class_indices(manifest.classes, classes))
    index_of = {name: index for index, name in enumerate(classes)}
    return tuple(index_of.get(name) for name in manifest.classes)


def scoring_spec(
    store: ObjectStore, manifest: Manifest, request: PredictionRequest, record: RunRecord, pool: WorkerPool
) -> ScoringSpec:
    """Everything that a worker of this run needs; heads are put into the run's folder."""
    committee, folder = request.committee, RunFolder(store, record.run_id)
    return ScoringSpec(
        workspace=store.root_uri,
        run_id=record.run_id,
        members=tuple(_member_spec(folder, request, member) for member in committee.members),
        classes=committee.classes,
        class_of_label=labels_in_committee(manifest, request),
        gives_probabilities=committee.gives_probabilities,
        model_digest=committee.digest,
        committee=CommitteeOptions(
            batch_size=record.settings["batch_size"],
            compiled=record.settings["compiled"],
            num_threads=pool.num_threads,
            plan=request.plan,
            averaging=committee.averaging,
            temperature=committee.temperature,
        ),
        gate=request.gate,
        is_dense=request.mode is EvaluationMode.DENSE,
        keep=request.keep,
        table=_score_table(manifest, request),
        decode_rule=committee.members[0].classifier.decode_rule,
        outputs=record.outputs,
        metadata={
            "convoy.schema_version": str(PREDICTIONS_SCHEMA_VERSION),
            "convoy.run_id": record.run_id,
            "convoy.model_digest": committee.digest,
            "convoy.dataset_fingerprint": manifest.fingerprint,
            "convoy.classes": json.dumps(committee.classes),
            "convoy.crops": request.plan.model_dump_json(),
            "convoy.averaging": committee.averaging.value,
        },
        num_decode_threads=pool.num_decode_threads,
        num_fetch_threads=request.extraction.num_fetch_threads,
        stall_s=request.extraction.stall_s,
        # Without GPUs in Ray's books nobody shares one.
        gpu_share=pool.num_gpus or 1.0,
        local_cache=request.local_cache,
    )


def _score_table(manifest: Manifest, request: PredictionRequest) -> ScoreTable | None:
    if request.scores is None:
        return None
    return ScoreTable(
        outputs=request.scores.columns.outputs,
        partition_by=request.scores.partition_by,
        label_names=manifest.classes,
        features_tap=request.features_tap,
        features_dtype=request.extraction.dtype.value,
    )


def _member_spec(folder: RunFolder, request: PredictionRequest, member: CommitteeMember) -> MemberSpec:
    classifier = member.classifier
    return MemberSpec(
        digest=member.digest,
        backbone=classifier.backbone.config,
        num_classes=classifier.backbone.num_classes,
        weights_key=classifier.backbone.weights_key,
        tap=classifier.tap,
        head=None if classifier.head is None else classifier.head.spec,
        head_key=keep_head(folder, classifier),
        output_groups=classifier.output_groups,
        class_order=classifier.order_of(request.committee.classes),
        options=MemberOptions(
            preset=request.preset(member),
            precision=request.precision(member),
            weight=member.weight,
            temperature=member.temperature,
        ),
    )
