"""Candidates for an ensemble, and their kept predictions of the same validation rows in the same crops."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from convoy.core.crop_policies import Averaging, CropPlan, CropPolicy, view_indices
from convoy.core.errors import ConfigError, DataError
from convoy.core.records import Split
from convoy.pipelines.committees import CommitteeMember, committee_of, open_committee
from convoy.pipelines.ensemble_choice import CandidatePredictions
from convoy.storage.commits import read_manifest
from convoy.storage.manifests import Manifest
from convoy.storage.member_predictions import MemberLogits, read_member_logits
from convoy.storage.object_store import ObjectStore
from convoy.storage.runs import RunFolder, RunRecord, require_run


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A bundle that may become a member, the run with its validation predictions, and what a pass of it takes."""

    bundle: str
    predictions_run: str
    seconds_per_pass: float


def read_candidates(
    store: ObjectStore, manifest: Manifest, candidates: Sequence[Candidate], averaging: Averaging
) -> tuple[CandidatePredictions, list[CommitteeMember]]:
    """The predictions of all candidates for the rows that all of them predicted, and the candidates as members.

    All are in memory: 4 bytes a candidate, view, row and class. Raises DataError for predictions of other rows than
    the dataset's validation rows, ConfigError for candidates that cannot vote together.
    """
    if not candidates:
        raise ConfigError("an ensemble needs a candidate", next_step="let a trial finish, or name bundles")
    members, kept, plans = [], [], []
    for candidate in candidates:
        (member,) = open_committee(store, candidate.bundle).members
        folder, record = require_run(store, candidate.predictions_run)
        _require_validation_rows(record, manifest, candidate)
        members.append(member)
        plans.append(CropPlan.model_validate(record.identity["crops"]))
        kept.append(read_predictions(folder))
    committee_of(members, averaging=averaging)
    first, plan = members[0], _common_plan(plans)
    kept = [_in_order(one, member, first) for one, member in zip(kept, members, strict=True)]
    ids, places = paired_rows([one.sample_ids for one in kept])
    if not len(ids):
        raise DataError(
            "no validation row was predicted by all candidates", next_step="look at the rejects of their runs"
        )
    views = [list(view_indices(plan.policy, its_plan) or ()) for its_plan in plans]
    predictions = CandidatePredictions(
        logits_MVNK=np.stack(
            [
                one.logits_MVNK[0][its_views][:, rows]
                for one, its_views, rows in zip(kept, views, places, strict=True)
            ]
        ),
        labels_N=kept[0].labels_N[places[0]],
        plan=plan,
        seconds_per_pass_M=tuple(candidate.seconds_per_pass for candidate in candidates),
        macs_M=tuple(member.classifier.backbone.macs for member in members),
    )
    return predictions, members


def read_predictions(folder: RunFolder) -> MemberLogits:
    """What a finished run kept of its members on labelled rows."""
    manifest = read_manifest(folder)
    if manifest is None:
        raise DataError(
            "the run has no published predictions",
            where=folder.run_id,
            next_step="finish it: the same command again",
        )
    return read_member_logits(folder.store, manifest)


def paired_rows(ids: Sequence[Sequence[str]]) -> tuple[NDArray[Any], list[NDArray[np.int64]]]:
    """The ids that all lists hold, ascending, and where they stand in each."""
    common: NDArray[Any] = reduce(np.intersect1d, [np.asarray(one) for one in ids])
    found = [pc.index_in(pa.array(common), value_set=pa.array(one)) for one in ids]
    return common, [np.asarray(one.to_numpy(zero_copy_only=False), np.int64) for one in found]


def _require_validation_rows(record: RunRecord, manifest: Manifest, candidate: Candidate) -> None:
    where = f"run {candidate.predictions_run} of {candidate.bundle}"
    if record.identity["dataset_fingerprint"] != manifest.fingerprint:
        raise DataError(
            "predictions of another version of the dataset cannot be compared",
            where=where,
            next_step="search again on the dataset as it is now",
        )
    if Split.TEST in record.identity["splits"]:
        raise DataError(
            "these predictions hold test rows, which must choose nothing",
            where=where,
            next_step="predict the validation rows",
        )


def _in_order(logits: MemberLogits, member: CommitteeMember, first: CommitteeMember) -> MemberLogits:
    """Predictions with the classes in the order of the first candidate."""
    classes, wanted = member.classifier.classes, first.classifier.classes
    if classes == wanted:
        return logits
    order = [classes.index(name) for name in wanted]
    place_of = np.array([wanted.index(name) for name in classes], np.int32)
    return replace(logits, logits_MVNK=logits.logits_MVNK[..., order], labels_N=place_of[logits.labels_N])


def _common_plan(plans: Sequence[CropPlan]) -> CropPlan:
    """The largest crops that all candidates kept."""
    if all(plan == plans[0] for plan in plans):
        return plans[0]
    for policy in (CropPolicy.TEN, CropPolicy.FIVE, CropPolicy.FLIP, CropPolicy.CENTER):
        if all(view_indices(policy, plan) is not None for plan in plans):
            return CropPlan(policy=policy)
    raise ConfigError(
        "the candidates kept no crops in common",
        where=", ".join(plan.policy.value for plan in plans),
        next_step="search again with one policy under `crops`",
    )
