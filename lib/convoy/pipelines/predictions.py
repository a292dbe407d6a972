"""Predictions of a classifier for every sample of some splits, from cached features, committed like any run."""

from __future__ import annotations

import json
import secrets
import time
from collections import Counter
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from convoy.core.batching import batched
from convoy.core.fingerprints import digest
from convoy.core.records import Reject, RejectCode, Split, Stage
from convoy.pipelines.classifier_tensors import Readout
from convoy.pipelines.classifiers import Classifier, class_indices
from convoy.pipelines.feature_source import gather_features
from convoy.pipelines.training_rows import rows_digest
from convoy.storage.commits import (
    RunManifest,
    SliceRecord,
    choose_attempts,
    part_key,
    publish,
    read_records,
    write_record,
)
from convoy.storage.feature_cache import FeatureCache, KnownContent, PartIndex, content_id_array
from convoy.storage.leases import RunLease, WhenHeld, hold_run, take_up
from convoy.storage.manifests import Manifest
from convoy.storage.object_store import ObjectStore
from convoy.storage.parts import write_rejects
from convoy.storage.predictions import (
    PREDICTIONS,
    PREDICTIONS_SCHEMA_VERSION,
    predictions_table,
    write_predictions,
)
from convoy.storage.run_input import freeze_input, missing_rows, slice_rows_for, write_frozen_record
from convoy.storage.runs import OpenRun, RunFolder, RunRecord, refuse_changed_identity

VERB = "evaluate"
# Slices whose features are gathered at a time: at most 64 x 2048 rows in memory.
_SLICES_A_PASS = 64


class PredictionJob:
    """One classifier on some splits of one dataset, given features that are cached already.

    `rows` are rows of the manifest instead of whole splits.
    """

    def __init__(
        self,
        store: ObjectStore,
        manifest: Manifest,
        classifier: Classifier,
        *,
        model_digest: str,
        set_id: str,
        rows: pa.Table | None = None,
    ) -> None:
        self._store = store
        self._rows = rows
        self._manifest = manifest
        self._classifier = classifier
        self._readout = Readout(classifier)
        self._model_digest = model_digest
        self._set_id = set_id
        self._cache = FeatureCache(store)
        self._class_of_label = class_indices(manifest.classes, classifier.classes)

    def commit(
        self, dataset: str, splits: Collection[Split], config: dict[str, Any], *, new_run: bool
    ) -> tuple[RunFolder, RunManifest, OpenRun]:
        """Predict what is not yet predicted and publish the run; the caller finishes and closes it.

        It is a matter of seconds, so another driver that is at the same is waited for.
        """
        identity: dict[str, Any] = {
            "dataset": dataset,
            "dataset_fingerprint": self._manifest.fingerprint,
            "splits": sorted(splits),
            "model_digest": self._model_digest,
            "features": self._set_id,
        }
        target = [dataset, sorted(splits), self._model_digest]
        if self._rows is not None:
            identity["rows"] = rows_digest(self._rows)
            target.append(identity["rows"])
        open_run = OpenRun(self._store, verb=VERB, target=digest(target))
        folder, record = take_up(open_run, identity, new_run=new_run, when_held=WhenHeld.WAIT)
        folder = folder or open_run.start()
        with hold_run(folder, when_held=WhenHeld.WAIT) as lease:
            record = record or folder.record() or self._freeze(folder, lease, splits, identity, config)
            refuse_changed_identity(record, identity)
            done = choose_attempts(folder, record, read_records(folder))
            todo = [name for name in record.slice_names() if name not in done]
            known = self._cache.rejected_content(self._set_id).to_pylist()
            rejects = {row["content_id"]: row for row in known}
            index = self._cache.part_index(self._set_id) if len(todo) > _SLICES_A_PASS else None
            for names in batched(todo, _SLICES_A_PASS):
                self._predict(folder, record, names, rejects, index)
                lease.check()
            lease.confirm()
            return folder, publish(folder, record, read_records(folder)), open_run

    def _freeze(
        self,
        folder: RunFolder,
        lease: RunLease,
        splits: Collection[Split],
        identity: dict[str, Any],
        config: dict[str, Any],
    ) -> RunRecord:
        nothing = np.empty(0, "S16")
        batches = self._manifest.iter_batches(splits=splits) if self._rows is None else [self._rows]
        rows = missing_rows(batches, {PREDICTIONS: KnownContent(nothing, nothing)})
        num_rows = sum(
            self._manifest.counts[split].num_samples for split in splits if split in self._manifest.counts
        )
        if self._rows is not None:
            num_rows = self._rows.num_rows
        record = RunRecord.new(
            folder.run_id,
            verb=VERB,
            identity=identity,
            config=config,
            outputs={PREDICTIONS: folder.key(f"{PREDICTIONS}/")},
            groups=freeze_input(folder, rows, slice_rows=slice_rows_for(num_rows, 1)),
        )
        return write_frozen_record(folder, record, lease, num_rows=num_rows)

    def _predict(
        self,
        folder: RunFolder,
        record: RunRecord,
        names: Sequence[str],
        rejects: dict[bytes, dict[str, Any]],
        index: PartIndex | None,
    ) -> None:
        """Predict some slices with one look into the cache."""
        slices = [folder.read_slice(name) for name in names]
        content_ids_N = np.concatenate([content_id_array(rows["content_id"]) for rows in slices])
        features_ND, found_N = gather_features(self._cache, self._set_id, content_ids_N, index=index)
        start = 0
        for name, rows in zip(names, slices, strict=True):
            part = slice(start, start + rows.num_rows)
            start += rows.num_rows
            features_BD = torch.from_numpy(features_ND[part][found_N[part]])
            self._write_slice(folder, record, name, rows, found_N[part], features_BD, rejects)

    def _write_slice(
        self,
        folder: RunFolder,
        record: RunRecord,
        name: str,
        rows: pa.Table,
        found_N: np.ndarray,
        features_BD: torch.Tensor,
        rejects: dict[bytes, dict[str, Any]],
    ) -> None:
        started_unix_s = time.time()
        attempt = secrets.token_hex(4)
        samples = rows.filter(pa.array(found_N))
        part = write_predictions(
            self._store,
            part_key(record.outputs[PREDICTIONS], name, attempt),
            self._table(samples, features_BD),
            model_digest=self._model_digest,
            run_id=record.run_id,
            metadata=self._metadata(record),
        )
        rejected = [_reject(row, rejects) for row in rows.filter(pa.array(~found_N)).to_pylist()]
        reject_part = None
        if rejected:
            key = folder.key(f"rejects/{name}-{attempt}.parquet")
            reject_part = write_rejects(self._store, key, rejected, attempt, record.run_id)
        write_record(
            self._store,
            SliceRecord(
                run_id=record.run_id,
                slice=name,
                attempt=attempt,
                parts={PREDICTIONS: part},
                rejects=reject_part,
                num_results=samples.num_rows,
                num_rejects=len(rejected),
                reject_codes=Counter(reject.code.value for reject in rejected),
                flags={},
                seconds={"total": time.time() - started_unix_s},
                started_unix_s=started_unix_s,
                first_row_unix_s=started_unix_s,
                finished_unix_s=time.time(),
                precision_effect={},
            ),
        )

    def _table(self, samples: pa.Table, features_BD: torch.Tensor) -> pa.Table:
        if not samples.num_rows:
            features_BD = torch.zeros((0, len(self._classifier.classes)))
            logits_BK = features_BD
        else:
            logits_BK = self._readout.logits(features_BD)
        scores_BK = torch.softmax(logits_BK, dim=1) if self._classifier.gives_probabilities else logits_BK
        labels = pa.array(self._class_of_label, pa.int32()).take(samples["label"].combine_chunks())
        return predictions_table(
            samples,
            labels=labels,
            logits_BK=logits_BK.numpy(),
            scores_BK=scores_BK.numpy(),
            classes=self._classifier.classes,
        )

    def _metadata(self, record: RunRecord) -> dict[str, str]:
        return {
            "convoy.schema_version": str(PREDICTIONS_SCHEMA_VERSION),
            "convoy.run_id": record.run_id,
            "convoy.model_digest": self._model_digest,
            "convoy.features": self._set_id,
            "convoy.dataset_fingerprint": self._manifest.fingerprint,
            "convoy.classes": json.dumps(self._classifier.classes),
        }


def _reject(row: dict[str, Any], rejects: dict[bytes, dict[str, Any]]) -> Reject:
    """Why a sample has no features, as the cache remembers it."""
    known = rejects.get(row["content_id"])
    return Reject(
        sample_id=row["sample_id"],
        uri=row["uri"],
        etag=row["etag"],
        content_id=row["content_id"],
        stage=Stage(known["stage"]) if known else Stage.FETCH,
        code=RejectCode(known["code"]) if known else RejectCode.UNREADABLE,
        reason=known["reason"] if known else "the feature cache has no row of this sample",
    )
