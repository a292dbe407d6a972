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
from convoy.core.large_arrays import large_array
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
    """A bundle that may become a member, the run with its validation predictions, and what a pass of it takes.

    `seconds_once` is what an image takes beside all passes, which members share.
    `other_folds` are bundles and runs of the other models of a k-fold training: each predicted the rows that it did not
    see. They become members together, with equal shares of one weight, and a pass is one of each.
    """

    bundle: str
    predictions_run: str
    seconds_per_pass: float
    seconds_once: float
    other_folds: tuple[tuple[str, str], ...] = ()

    @property
    def parts(self) -> tuple[tuple[str, str], ...]:
        """Its bundles, each with its run."""
        return ((self.bundle, self.predictions_run), *self.other_folds)


# The networks of a candidate, which vote together.
Networks = tuple[CommitteeMember, ...]


def read_candidates(
    store: ObjectStore, manifest: Manifest, candidates: Sequence[Candidate], averaging: Averaging
) -> tuple[CandidatePredictions, list[Networks]]:
    """The predictions of all candidates for the rows that all of them predicted, and the networks of each.

    They take 4 bytes a candidate, view, row and class, on disk where memory is short (`core.large_arrays`); candidates
    are read one after the other. Raises DataError for predictions of other rows than the dataset's validation rows,
    ConfigError for candidates that cannot vote together, StorageFull where there is no room for them.
    """
    if not candidates:
        raise ConfigError("an ensemble needs a candidate", next_step="let a trial finish, or name bundles")
    opened = [[_open_part(store, manifest, *part) for part in candidate.parts] for candidate in candidates]
    networks = [tuple(part.member for part in parts) for parts in opened]
    committee_of([member for members in networks for member in members], averaging=averaging)
    plans = [_common_plan([part.plan for part in parts]) for parts in opened]
    plan = _common_plan(plans)
    views = [view_indices(plan.policy, its_plan) or () for its_plan in plans]
    logits_MVNK, labels_N = _stacked(opened, views)
    predictions = CandidatePredictions(
        logits_MVNK=logits_MVNK,
        labels_N=labels_N,
        plan=plan,
        seconds_per_pass_M=tuple(candidate.seconds_per_pass for candidate in candidates),
        seconds_once_M=tuple(candidate.seconds_once for candidate in candidates),
        macs_M=tuple(sum(member.classifier.macs for member in members) for members in networks),
        num_networks_M=tuple(len(members) for members in networks),
    )
    return predictions, networks


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
    first, *others = ids
    common: NDArray[Any] = reduce(np.intersect1d, others, np.unique(first))
    found = [pc.index_in(pa.array(common), value_set=pa.array(one)) for one in ids]
    return common, [np.asarray(one.to_numpy(zero_copy_only=False), np.int64) for one in found]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    """A network, and the run with what it says of some rows in the crops of `plan`."""

    member: CommitteeMember
    plan: CropPlan
    folder: RunFolder


def _open_part(store: ObjectStore, manifest: Manifest, bundle: str, run: str) -> _Part:
    (member,) = open_committee(store, bundle).members
    folder, record = require_run(store, run)
    _require_validation_rows(record, manifest, where=f"run {run} of {bundle}")
    return _Part(member=member, plan=CropPlan.model_validate(record.identity["crops"]), folder=folder)


def _stacked(
    candidates: Sequence[Sequence[_Part]], views: Sequence[Sequence[int]]
) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
    """The logits_MVNK of some views of each candidate, and labels, for the rows of all by ascending id."""
    first = _read(candidates[0], candidates[0])
    ids, (order_N,) = paired_rows([first.sample_ids])
    labels_N, is_common_N = first.labels_N[order_N], np.ones(len(ids), np.bool_)
    num_classes = first.logits_MVNK.shape[3]
    logits_MVNK = large_array((len(candidates), len(views[0]), len(ids), num_classes), np.float32)
    for member, (parts, its_views) in enumerate(zip(candidates, views, strict=True)):
        one = first if member == 0 else _read(parts, candidates[0])
        common, (places, rows) = paired_rows([ids.tolist(), one.sample_ids])
        is_common_N &= np.isin(ids, common, assume_unique=True)
        for view, its_view in enumerate(its_views):
            logits_MVNK[member, view, places] = one.logits_MVNK[0, its_view, rows]
    num_common = int(is_common_N.sum())
    if not num_common:
        raise DataError(
            "no validation row was predicted by all candidates", next_step="look at the rejects of their runs"
        )
    if num_common < len(ids):
        # Rows move up in place: there may be no room for a copy.
        for logits_VNK in logits_MVNK:
            for logits_NK in logits_VNK:
                logits_NK[:num_common] = logits_NK[is_common_N]
    return logits_MVNK[:, :, :num_common], labels_N[is_common_N]


def _read(parts: Sequence[_Part], first: Sequence[_Part]) -> MemberLogits:
    """A candidate's predictions, with the classes in the order of the first candidate."""
    return _joined([_in_order(read_predictions(part.folder), part.member, first[0].member) for part in parts])


def _joined(parts: Sequence[MemberLogits]) -> MemberLogits:
    """The rows of all folds, each predicted by one model."""
    if len(parts) == 1:
        return parts[0]
    return MemberLogits(
        sample_ids=[name for part in parts for name in part.sample_ids],
        labels_N=np.concatenate([part.labels_N for part in parts]),
        logits_MVNK=np.concatenate([part.logits_MVNK for part in parts], axis=2),
    )


def _require_validation_rows(record: RunRecord, manifest: Manifest, *, where: str) -> None:
    if record.identity["dataset_fingerprint"] != manifest.fingerprint:
        raise DataError(
            "predictions of another version of the dataset cannot be compared",
            where=where,
            next_step="search again on the dataset as it is now",
        )
    splits = record.identity["splits"]
    if Split.TEST in (manifest.counts if splits == "all" else splits):
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
