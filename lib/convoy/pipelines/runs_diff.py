"""`convoy runs diff`: in what two runs differ, and how many predictions that changed."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.compute as pc

from convoy.core.config import StrictModel
from convoy.core.differences import Difference, differences
from convoy.storage.commits import RunManifest, read_manifest
from convoy.storage.object_store import ObjectStore
from convoy.storage.predictions import PREDICTIONS, paired, read_predicted
from convoy.storage.runs import RunRecord, require_run

_MAX_EXAMPLES = 10


class ChangedPrediction(StrictModel):
    """A sample that two runs predict differently: the names of the predicted classes."""

    sample_id: str
    first: str
    second: str


class PredictionDiff(StrictModel):
    """Predictions of two runs, paired by sample id; `pairs` have one in both runs, and `changed` of them differ."""

    rows_first: int
    rows_second: int
    pairs: int
    changed: int
    examples: list[ChangedPrediction]


class RunDiff(StrictModel):
    """In what two runs differ. `predictions` is null unless both are published and predict classes."""

    first: str
    second: str
    verbs: tuple[str, str]
    identity: list[Difference]
    config: list[Difference]
    settings: list[Difference]
    versions: list[Difference]
    predictions: PredictionDiff | None
    notes: list[str]


def diff_runs(store: ObjectStore, run_a: str, run_b: str) -> RunDiff:
    """Compare two runs by their records, and by their predictions where both have some.

    Holds ids and predicted classes of both in memory: some 100 bytes a row and run. ConfigError for a run that
    does not exist.
    """
    (folder_a, a), (folder_b, b) = require_run(store, run_a), require_run(store, run_b)
    manifests = read_manifest(folder_a), read_manifest(folder_b)
    predictions = None
    if manifests[0] is not None and manifests[1] is not None and _predicts(a) and _predicts(b):
        rows_a, rows_b = (
            read_predicted(store, manifest, "pred_name") for manifest in (manifests[0], manifests[1])
        )
        predictions = _compare(rows_a, rows_b)
    return RunDiff(
        first=run_a,
        second=run_b,
        verbs=(a.verb, b.verb),
        identity=differences(a.identity, b.identity),
        config=differences(a.config, b.config),
        settings=differences(a.settings, b.settings),
        versions=differences(a.versions, b.versions),
        predictions=predictions,
        notes=_notes(a, b, manifests),
    )


def _predicts(record: RunRecord) -> bool:
    return any(output.startswith(PREDICTIONS) for output in record.outputs)


def _compare(a: pa.Table, b: pa.Table) -> PredictionDiff:
    paired_a, paired_b = paired(a, b)
    is_changed = pc.not_equal(paired_a["pred_name"], paired_b["pred_name"])
    changed_a, changed_b = paired_a.filter(is_changed), paired_b.filter(is_changed)
    examples = zip(
        changed_a["sample_id"].slice(0, _MAX_EXAMPLES).to_pylist(),
        changed_a["pred_name"].slice(0, _MAX_EXAMPLES).to_pylist(),
        changed_b["pred_name"].slice(0, _MAX_EXAMPLES).to_pylist(),
        strict=True,
    )
    return PredictionDiff(
        rows_first=a.num_rows,
        rows_second=b.num_rows,
        pairs=paired_a.num_rows,
        changed=changed_a.num_rows,
        examples=[
            ChangedPrediction(sample_id=name, first=one, second=other) for name, one, other in examples
        ],
    )


def _notes(a: RunRecord, b: RunRecord, manifests: tuple[RunManifest | None, RunManifest | None]) -> list[str]:
    notes = [
        f"{record.run_id} is not published yet, so its predictions were not compared"
        for record, manifest in zip((a, b), manifests, strict=True)
        if manifest is None and _predicts(record)
    ]
    versions = [record.identity.get("dataset_fingerprint") for record in (a, b)]
    if versions[0] != versions[1]:
        notes.append("the runs are over different versions of a dataset, or over different datasets")
    return notes
