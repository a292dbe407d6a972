"""Which version of which dataset runs and models come from."""

from __future__ import annotations

from collections.abc import Mapping

from convoy.storage.bundles import METRICS_FILE, Bundle
from convoy.storage.object_store import ObjectStore
from convoy.storage.retrains import RetrainFolder
from convoy.storage.runs import RunFolder, RunRecord


def dataset_of_run(record: RunRecord) -> tuple[str, str]:
    """The name and the fingerprint of a run's dataset; empty where it says none."""
    identity = record.identity
    inner = identity.get("config") or {}
    name = identity.get("dataset") or inner.get("dataset") or record.config.get("dataset") or ""
    return str(name), str(identity.get("dataset_fingerprint") or "")


def dataset_of_model(store: ObjectStore, bundle: Bundle) -> tuple[str, str]:
    """The name and the fingerprint of the dataset that a model was trained on; empty where nothing says so."""
    if lineage := retraining_of(bundle):
        return dataset_of_retraining(store, lineage) or "", lineage["dataset fingerprint"]
    # The evaluation that ended the training has its config.
    run_id = bundle.read_json(METRICS_FILE).get("run")
    record = RunFolder(store, run_id).record() if isinstance(run_id, str) else None
    return ("", "") if record is None or "strategy" not in record.config else dataset_of_run(record)


def retraining_of(bundle: Bundle) -> dict[str, str]:
    """What a model that `convoy retrain` made on cached features, without a run, says of that; empty for others."""
    metrics = bundle.read_json(METRICS_FILE)
    found = metrics.get("lineage") or (metrics.get("measured") or {}).get("lineage") or {}
    return found if "retraining" in found else {}


def dataset_of_retraining(store: ObjectStore, lineage: Mapping[str, str]) -> str | None:
    """The dataset of a retraining by the lineage of what it made; None where its plan has left the workspace."""
    name, _, date = lineage["retraining"].partition("/")
    plan = RetrainFolder(store, name).plan(date)
    return None if plan is None else str(plan.config["dataset"])
