"""`convoy advise`: source → dataset → one cached pass a backbone → probes → rule → strategies with configs → report."""

from __future__ import annotations

from typing import Any

from convoy.core.errors import ConfigError, DataError
from convoy.core.fingerprints import canonical_json, digest
from convoy.core.progress import Progress
from convoy.pipelines.advise_config import AdviseConfig, plain_name
from convoy.pipelines.advise_report import AdviceReport
from convoy.pipelines.advise_taps import refuse_unknown_stages
from convoy.pipelines.advise_work import AdviceWork
from convoy.pipelines.backbone_record import BackboneRecord
from convoy.pipelines.models import fetch_backbone
from convoy.pipelines.network_training import WHERE_AND_HOW_FAST, CurveDrawer
from convoy.pipelines.workspace import open_workspace
from convoy.storage.commits import finish
from convoy.storage.datasets import open_dataset
from convoy.storage.leases import WhenHeld, hold_run, take_up
from convoy.storage.manifests import Manifest
from convoy.storage.object_store import ObjectStore
from convoy.storage.runs import OpenRun, RunFolder, RunRecord, finished_run, refuse_changed_identity
from convoy.vision.factories import with_pinned_code

_VERB = "advise"
_FORMAT_VERSION = 6
_POINTERS = "advice/"
# What may change between a kill and the next call: where, how fast and at which price, not what is measured.
_NOT_IDENTITY: dict[str, Any] = {
    **dict.fromkeys(
        (
            "workspace",
            "writers",
            "source",
            "reading",
            "split_options",
            "error_budget",
            "price_per_hour",
            "verify",
        ),
        True,
    ),
    "extraction": WHERE_AND_HOW_FAST,
}


def run_advise(
    config: AdviseConfig, *, progress: Progress, draw_curves: CurveDrawer, new_run: bool = False
) -> AdviceReport:
    """Look at a dataset through a few backbones, and say which way to use which of them, with the evidence.

    The same advice again is read from its run, and only verified where `verify` is new; a killed one goes on, with the
    features that it has cached.
    `draw_curves` makes the pictures of the trainings of `verify`. DataError for a dataset without two classes.
    """
    store = open_workspace(config.workspace, config.writers)
    open_run = OpenRun(store, verb=_VERB, target=config.dataset_name)
    manifest, notes = config.open_for(store, open_run, progress=progress, new_run=new_run)
    if len(manifest.classes) < 2:
        raise DataError(
            "advice needs two classes or more",
            where=manifest.uri,
            next_step="label the dataset: class folders, or a list with labels",
        )
    reference = None if config.reference is None else open_dataset(store, config.reference)
    config = _with_pinned_code(config)
    records = [fetch_backbone(store, candidate.backbone) for candidate in config.candidates]
    _refuse_equal_networks(config, records)
    refuse_unknown_stages(config, records)
    identity = _identity(manifest, config, records, reference)
    pointer, unverified = _pointer(identity, config), _pointer(identity, _without_verification(config))
    given = None
    if not open_run.begins_anew(new_run):
        if (known := _known(store, pointer, config)) is not None:
            progress.stage("the advice was given already")
            return known.model_copy(update={"notes": [*notes, *known.notes]})
        given = _known(store, unverified, config)
    folder, record = take_up(open_run, identity, new_run=new_run)
    folder = folder or open_run.start()
    with hold_run(folder, when_held=WhenHeld.REFUSE) as lease:
        record = record or folder.record() or _record(folder, identity, config)
        refuse_changed_identity(record, identity)
        work = AdviceWork(
            store=store,
            manifest=manifest,
            config=config,
            folder=folder,
            progress=progress,
            draw_curves=draw_curves,
            check=lease.check,
            new_run=new_run,
            reference=reference,
        )
        report = work.advise(records) if given is None else work.verify(given)
        for key in {pointer, unverified}:
            store.put(key, canonical_json({"run_id": folder.run_id}))
        finish(folder, report.model_dump(mode="json"))
        open_run.close(folder)
    return report.model_copy(update={"notes": [*notes, *report.notes]})


def _refuse_equal_networks(config: AdviseConfig, records: list[BackboneRecord]) -> None:
    """ConfigError where files of one name hold the same weights: nothing tells these candidates apart."""
    named = zip(config.candidates, records, strict=True)
    names = [plain_name(config.name_of(candidate, record.weights_digest)) for candidate, record in named]
    if len(set(names)) < len(names):
        raise ConfigError(
            "two candidates of one architecture have equal weights",
            where="candidates",
            next_step="name every network once",
        )


def _with_pinned_code(config: AdviseConfig) -> AdviseConfig:
    """The config with the code of each factory named by digest, so that advice on other code is other advice."""
    candidates = [
        candidate.model_copy(update={"backbone": with_pinned_code(candidate.backbone)})
        for candidate in config.candidates
    ]
    return config.model_copy(update={"candidates": tuple(candidates)})


def _identity(
    manifest: Manifest, config: AdviseConfig, records: list[BackboneRecord], reference: Manifest | None
) -> dict[str, Any]:
    return {
        "format_version": _FORMAT_VERSION,
        "dataset": config.dataset_name,
        "dataset_fingerprint": manifest.fingerprint,
        "weights_digests": [record.weights_digest for record in records],
        **({} if reference is None else {"reference_fingerprint": reference.fingerprint}),
        "config": config.model_dump(mode="json", exclude=_NOT_IDENTITY),
    }


def _pointer(identity: dict[str, Any], config: AdviseConfig) -> str:
    """The key that leads to the run of finished advice, at this price and with this verification."""
    asked = config.model_dump(mode="json", include={"price_per_hour", "verify"})
    return f"{_POINTERS}{digest(identity | asked)}.json"


def _without_verification(config: AdviseConfig) -> AdviseConfig:
    return config.model_copy(update={"verify": None})


def _known(store: ObjectStore, pointer: str, config: AdviseConfig) -> AdviceReport | None:
    """The advice that was given already, by the error budget of now."""
    folder = finished_run(store, pointer)
    if folder is None:
        return None
    report = AdviceReport.model_validate(folder.report())
    allowed = config.error_budget.allows(report.size.rejects, report.size.looked_at)
    return report.model_copy(update={"within_error_budget": allowed})


def _record(folder: RunFolder, identity: dict[str, Any], config: AdviseConfig) -> RunRecord:
    record = RunRecord.new(
        folder.run_id,
        verb=_VERB,
        identity=identity,
        config=config.model_dump(mode="json"),
        outputs={},
        groups=(),
    )
    return folder.write_record(record)
