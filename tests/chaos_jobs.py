"""Small jobs on a real S3 server behind the fault proxy, and the audit of what they leave behind."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import threading
import time
import uuid
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from cache_jobs import LENET, write_digits
from command_lines import CONVOY, convoy, convoy_here, settings_arguments
from convoy.pipelines.data_origin import dataset_of_run
from convoy.storage.commits import read_manifest, read_records
from convoy.storage.datasets import open_dataset
from convoy.storage.object_store import ObjectStore
from convoy.storage.runs import RunFolder, require_run, run_ids
from convoy.storage.stores import open_store
from fault_proxy import FaultProxy
from made_bundles import made_classifier, write_classifier
from process_table import is_descendant, process_table

# The name under which a test's report carries its rows of the table.
FAULT = "fault"
SLICE_ROWS = 16
_FP32 = f"extraction={{batch_size: {SLICE_ROWS}, slice_rows: {SLICE_ROWS}, precision: fp32, dtype: float32}}"
SETTINGS = {
    "cache": (f"backbone={LENET}", "taps=[c3, f6]"),
    "evaluate": (
        "splits=[train, val, test]",
        "ensemble={members: [{bundle: one}, {bundle: two, weight: 2}]}",
        "crops=flip",
    ),
    "score": ("bundle=one", "columns={outputs: logits, features: f6}"),
}


@dataclass(frozen=True, slots=True)
class Audit:
    """What a finished run left, counted from its files alone: rows by id in what a reader of its folders sees."""

    inputs: int
    lost: int
    doubled: int
    digest: str


@dataclass(frozen=True, slots=True)
class FaultTable:
    """One row a fault: how often it fired, and what the job that met it left in the end.

    Rows are kept by `record(FAULT, row)`, pytest's `record_property`: they travel with the report of their test.
    """

    record: Callable[[str, object], None]

    def add(self, fault: str, *, fired: int, audit: Audit, clean_digest: str | None) -> None:
        """Keep the row; then it must say that the fault fired and that nothing is lost, doubled or different.

        `clean_digest` is None where the fault leaves other rows than a clean run has, or there was none.
        """
        is_equal = clean_digest in (None, audit.digest)
        compared = "not compared" if clean_digest is None else "yes" if is_equal else "NO"
        self.record(FAULT, (fault, str(fired), str(audit.lost), str(audit.doubled), compared))
        assert fired > 0, "the fault did not fire"
        assert audit.inputs > 0, "nothing was audited"
        assert (audit.lost, audit.doubled) == (0, 0)
        assert is_equal, "the rows differ from those of the clean run"

    def add_training(
        self, fault: str, reports: tuple[Mapping[str, Any], Mapping[str, Any]] | None, *, fired: int = 1
    ) -> None:
        """The same for a training, by its report and that of the clean one; None where it is to leave no model."""
        compared = "no model"
        if reports is not None:
            found, clean = (report["model_digest"] for report in reports)
            compared = "yes" if found == clean else "NO"
        self.record(FAULT, (fault, str(fired), "-", "-", compared))
        assert fired > 0, "the fault did not fire"
        assert compared != "NO", "the model differs from that of the clean run"


def audit_run(workspace: str, run_id: str) -> Audit:
    """Compare the ids of the run's dataset with those of all files of each output and of the rejects."""
    store = open_store(workspace)
    folder, run = require_run(store, run_id)
    manifest = read_manifest(folder)
    assert manifest is not None
    assert folder.is_finished()
    splits = None if run.identity["splits"] == "all" else run.identity["splits"]
    dataset = open_dataset(store, *dataset_of_run(run))
    wanted = Counter(ids_of(dataset.read_table(["sample_id"], splits=splits)))
    rejected = _ids_below(store, folder.key("rejects/"))
    lost = doubled = 0
    for prefix in {_whole_output(folder, prefix) for prefix in run.outputs.values()}:
        found = rejected + _ids_below(store, prefix)
        lost += (wanted - found).total()
        doubled += (found - wanted).total()
    return Audit(wanted.total(), lost, doubled, manifest.rows_digest())


def _whole_output(folder: RunFolder, prefix: str) -> str:
    """Where all Hive partitions lie, of which an output of a run's own folder may be one."""
    return re.sub(r"([^/]+=[^/]+/)+$", "", prefix) if prefix.startswith(folder.prefix) else prefix


def ids_of(table: Any) -> list[str]:
    """The sample ids of a table."""
    ids: list[str] = table["sample_id"].to_pylist()
    return ids


def _ids_below(store: ObjectStore, prefix: str) -> Counter[str]:
    """How often each id occurs in the parquet files below a prefix."""
    keys = [info.key for info in store.list_objects(prefix) if info.key.endswith(".parquet")]
    return Counter(
        name for key in keys for name in ids_of(store.open_parquet(key).read(columns=["sample_id"]))
    )


@dataclass(frozen=True, slots=True)
class ChaosJob:
    """A command on a workspace of its own, in which it has the only run."""

    verb: str
    workspace: str
    settings: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)

    def changed(self, *settings: str) -> ChaosJob:
        """The same job with other settings."""
        return replace(self, settings=(*self.settings, *settings))

    def arguments(self) -> list[str]:
        """The command line behind `convoy`."""
        return [self.verb, "--workspace", self.workspace, *settings_arguments(*self.settings), "--json"]

    def command(self) -> list[str]:
        """The whole command line."""
        return [str(CONVOY), *self.arguments()]

    def start(self) -> subprocess.CompletedProcess[str]:
        """Run the command in a process of its own, whatever its end."""
        return convoy(*self.arguments(), environment=self.environment)

    def start_here(self) -> subprocess.CompletedProcess[str]:
        """Run the command in this process, on the Ray that is open in it, whatever its end."""
        return convoy_here(*self.arguments())

    def run_here(self) -> None:
        """Run the command in this process; it must succeed."""
        finished = self.start_here()
        assert finished.returncode == 0, finished.stderr

    @property
    def store(self) -> ObjectStore:
        """The store of the workspace."""
        return open_store(self.workspace)

    @property
    def run_id(self) -> str:
        """The id of the job's only run."""
        (run_id,) = run_ids(self.store)
        return run_id

    def attempts(self) -> dict[str, set[str]]:
        """The finished attempts of each slice, by its name; empty before there is a run."""
        found: dict[str, set[str]] = defaultdict(set)
        for run_id in run_ids(self.store):
            for record in read_records(require_run(self.store, run_id)[0]):
                found[record.slice].add(record.attempt)
        return dict(found)

    def num_records(self) -> int:
        """How many attempts have finished so far."""
        return sum("/records/" in info.key for info in self.store.list_objects("runs/"))

    def audit(self) -> Audit:
        """The audit of the job's only run."""
        return audit_run(self.workspace, self.run_id)


class ChaosBucket:
    """A bucket with images, and a workspace in it that has them as a dataset, and two bundles: how all jobs begin."""

    def __init__(self, proxy: FaultProxy, folder: Path, *, num_images: int) -> None:
        self.name = f"convoy-{uuid.uuid4().hex}"
        self.num_images = num_images
        client = proxy.client()
        client.create_bucket(Bucket=self.name)
        write_digits(folder, num_images - 1)
        (folder / "0" / "damaged.jpg").write_bytes(b"\xff\xd8\xff\xe0 not much of an image")
        for path in sorted(folder.rglob("*.jpg")):
            key = f"images/{path.relative_to(folder)}"
            client.put_object(Bucket=self.name, Key=key, Body=path.read_bytes())
        self._base = open_store(f"s3://{self.name}/base")
        frozen = convoy_here(
            "dataset", f"s3://{self.name}/images", "--name", "digits", "--workspace", self._base.root_uri
        )
        assert frozen.returncode == 0, frozen.stderr
        for seed, name in enumerate(("one", "two")):
            write_classifier(self._base, name, made_classifier(self._base, seed))

    def new_job(self, verb: str, environment: Mapping[str, str] | None = None) -> ChaosJob:
        """A job in a workspace of its own that has the dataset and the bundles, and no run."""
        workspace = copied_workspace(self._base, f"s3://{self.name}/{uuid.uuid4().hex}")
        # The server has no atomic create, and these jobs are alone.
        settings = ("dataset=digits", "writers=single", _FP32, *SETTINGS[verb])
        return ChaosJob(verb, workspace, settings, environment or {})


def copied_workspace(base: ObjectStore, uri: str) -> str:
    """The URI, where now all that the base has lies too."""
    store = open_store(uri)
    for info in base.list_objects():
        store.put(info.key, base.get(info.key).data)
    return uri


class WorkerKiller:
    """A thread that SIGKILLs slice workers below this process in the middle of a slice, while its block runs.

    `may_kill(kills so far)` says whether the next one is due. Nothing but descendants of this process is touched.
    """

    def __init__(self, may_kill: Callable[[int], bool]) -> None:
        self.kills = 0
        self._may_kill = may_kill
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._hunt)

    def __enter__(self) -> WorkerKiller:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _hunt(self) -> None:
        dead: set[int] = set()
        while not self._stop.wait(0.02):
            busy = [pid for pid in busy_workers() if pid not in dead]
            if busy and self._may_kill(self.kills):
                os.kill(busy[0], signal.SIGKILL)
                dead.add(busy[0])
                self.kills += 1


def busy_workers(*, ancestor: int | None = None) -> list[int]:
    """The descendants of a process, by default this one, that are at work on a slice, as Ray titles its workers."""
    processes = process_table()
    return [
        pid
        for pid, process in processes.items()
        if re.search(r"MapWorker.*\.submit", process.title)
        and is_descendant(pid, processes, ancestor=ancestor)
    ]


def wait_for(is_so: Callable[[], bool], process: subprocess.Popen[str], *, timeout_s: float = 120) -> None:
    """Return as soon as it is so, while the process runs."""
    deadline_s = time.monotonic() + timeout_s
    while not is_so():
        assert process.poll() is None, "the job ended before the fault"
        assert time.monotonic() < deadline_s
        time.sleep(0.02)
