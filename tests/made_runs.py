"""Small made manifests and runs for the tests of storage: real stores and files, made contents."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from convoy.core.fingerprints import digest_bytes
from convoy.core.records import FETCH_CODES, Reject, RejectCode, Stage
from convoy.storage.commits import PartFile, SliceRecord, feature_prefix, part_key, write_record
from convoy.storage.feature_cache import KnownContent
from convoy.storage.manifests import MANIFEST_SCHEMA
from convoy.storage.object_store import ObjectStore
from convoy.storage.parts import FeatureRows, write_features, write_rejects
from convoy.storage.run_input import freeze_input, missing_rows
from convoy.storage.runs import RunFolder, RunRecord

SET_ID = "f" * 32
NOTHING = KnownContent(np.empty(0, "S16"), np.empty(0, "S16"))


def content_id(name: str) -> bytes:
    return digest_bytes(f"content of {name}".encode())


def made_manifest(names: Sequence[str]) -> pa.Table:
    rows = [
        {
            "sample_id": name,
            "uri": f"/data/{name}",
            "etag": "1-1",
            "size_bytes": 10,
            "content_id": content_id(name),
            "label": index % 3,
            "split": "train",
            "weight": 1.0,
        }
        for index, name in enumerate(names)
    ]
    return pa.Table.from_pylist(rows, MANIFEST_SCHEMA)


def feature_of(name: str) -> np.ndarray:
    return np.frombuffer(content_id(name)[:4], np.uint8).astype(np.float32)


def new_run(
    store: ObjectStore,
    names: Sequence[str],
    *,
    slice_rows: int = 4,
    run_id: str = "r1",
    open_key: str = "",
    identity: dict[str, Any] | None = None,
    prefix: str | None = None,
    verb: str = "cache",
) -> RunRecord:
    """A run over made samples, frozen and recorded, with no slice done; a cache's, unless `prefix` is elsewhere."""
    folder = RunFolder(store, run_id, open_key=open_key)
    groups = freeze_input(
        folder, missing_rows([made_manifest(names)], {SET_ID: NOTHING}), slice_rows=slice_rows
    )
    record = RunRecord.new(
        run_id,
        verb=verb,
        identity=identity or {"names": list(names), "splits": "all"},
        config={},
        outputs={SET_ID: prefix or feature_prefix(SET_ID, run_id)},
        groups=groups,
    )
    folder.write_record(record)
    return record


def slice_record(
    name: str,
    parts: dict[str, PartFile],
    *,
    num_results: int,
    run_id: str = "r1",
    attempt: str = "a0",
    rejects: PartFile | None = None,
    reject_codes: dict[str, int] | None = None,
) -> SliceRecord:
    """What a worker leaves of a slice that it was two seconds at."""
    return SliceRecord(
        run_id=run_id,
        slice=name,
        attempt=attempt,
        parts=parts,
        rejects=rejects,
        num_results=num_results,
        num_rejects=sum((reject_codes or {}).values()),
        reject_codes=reject_codes or {},
        flags={},
        seconds={},
        started_unix_s=1.0,
        first_row_unix_s=2.0,
        finished_unix_s=3.0,
        precision_effect={},
    )


def finish_slice(
    store: ObjectStore,
    run: RunRecord,
    name: str,
    *,
    attempt: str = "a0",
    rejected: Sequence[str] = (),
    code: RejectCode = RejectCode.CORRUPT,
) -> SliceRecord:
    """Do what a worker does for one slice: part, rejects, record."""
    rows = RunFolder(store, run.run_id).read_slice(name)
    wanted = [sample for sample in rows["sample_id"].to_pylist() if sample not in rejected]
    features = FeatureRows(
        sample_ids=wanted,
        content_ids=[content_id(sample) for sample in wanted],
        content_digests=[content_id(sample) for sample in wanted],
        view=0,
        features_BD=np.stack([feature_of(sample) for sample in wanted])
        if wanted
        else np.empty((0, 4), np.float32),
    )
    part = write_features(store, part_key(run.outputs[SET_ID], name, attempt), features, {})
    lost = [sample for sample in rows["sample_id"].to_pylist() if sample in rejected]
    reject_part = _write_rejects(store, run, name, attempt, lost, code) if lost else None
    record = slice_record(
        name,
        {SET_ID: part},
        num_results=len(wanted),
        run_id=run.run_id,
        attempt=attempt,
        rejects=reject_part,
        reject_codes={code: len(lost)} if lost else {},
    )
    write_record(store, record)
    return record


def _write_rejects(
    store: ObjectStore, run: RunRecord, name: str, attempt: str, lost: Sequence[str], code: RejectCode
) -> PartFile:
    rejects = [
        Reject(
            sample_id=sample,
            uri=f"/data/{sample}",
            etag="1-1",
            content_id=content_id(sample),
            stage=Stage.FETCH if code in FETCH_CODES else Stage.DECODE,
            code=code,
            reason="made",
        )
        for sample in lost
    ]
    return write_rejects(
        store, f"runs/{run.run_id}/rejects/{name}-{attempt}.parquet", rejects, attempt, run.run_id
    )
