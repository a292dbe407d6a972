"""Where a result comes from: predictions, model, training, data, code, each by the digest that proves it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from convoy.core.code_revision import CODE
from convoy.core.config import StrictModel
from convoy.core.errors import ConvoyError
from convoy.pipelines.data_origin import dataset_of_retraining, dataset_of_run, retraining_of
from convoy.pipelines.report_members import PretrainedMember, RunMembers, members_of_run
from convoy.pipelines.report_runs import newest_first
from convoy.storage.bundles import ENSEMBLE_FILE, METRICS_FILE, Bundle, BundleRef, peek_bundle, resolve_bundle
from convoy.storage.documents import read_json
from convoy.storage.object_store import ObjectStore
from convoy.storage.runs import RunFolder, RunRecord

# Newest first; a training behind them is not found.
_MAX_RUNS = 1000
_MAX_MEMBERS = 12


class LineageLink(StrictModel):
    """A link of the chain. `facts` are for people; `gap` says why the link is not known."""

    title: str
    name: str
    facts: dict[str, str]
    gap: str = ""


def lineage_of_run(store: ObjectStore, record: RunRecord) -> list[LineageLink]:
    """From a run's results back to data and code."""
    report = _report(RunFolder(store, record.run_id))
    made = report.get("bundle") or report.get("ensemble")
    facts = {
        "command": f"convoy {record.verb}",
        "begun": record.created_utc,
        **({"made": str(made)} if made else {}),
        **_fingerprint(record),
    }
    links = [LineageLink(title="results", name=f"run {record.run_id}", facts=facts)]
    members = members_of_run(store, record) or RunMembers(bundles=[], told={})
    if members.gap:
        links.append(LineageLink(title="model", name="unknown", facts=members.told, gap=members.gap))
    links += _pretrained_links(members.pretrained[:_MAX_MEMBERS])
    references = members.bundles[:_MAX_MEMBERS]
    bundles = [peek_bundle(store, resolve_bundle(store, reference)) for reference in references]
    trainings = find_trainings(store, bundles)
    for bundle in bundles:
        links += _bundle_links(bundle, trainings.get(str(bundle.ref)))
    return [*links, *_data_and_code(store, record)]


def lineage_of_bundle(store: ObjectStore, ref: BundleRef) -> list[LineageLink]:
    """From a model back to its training, and on to data and code."""
    bundle = peek_bundle(store, ref)
    training = find_trainings(store, [bundle]).get(str(ref))
    origin = _retraining_data(store, bundle) if training is None else _data_and_code(store, training)
    return [*_bundle_links(bundle, training), *origin]


def find_trainings(store: ObjectStore, bundles: Sequence[Bundle]) -> dict[str, RunRecord]:
    """The runs that made bundles, by reference: what says so, or the evaluation that ended a probe's training."""
    wanted = {str(bundle.ref): bundle for bundle in bundles}
    found: dict[str, RunRecord] = {}
    for folder, report in newest_first(store, _report, most=_MAX_RUNS) if wanted else ():
        made = str(report.get("bundle") or report.get("ensemble"))
        record = folder.record() if made in wanted.keys() - found.keys() else None
        if record is not None:
            found[made] = record
        if len(found) == len(wanted):
            break
    for reference in wanted.keys() - found.keys():
        run_id = wanted[reference].read_json(METRICS_FILE).get("run")
        record = RunFolder(store, run_id).record() if isinstance(run_id, str) else None
        # Probes are fitted by the command that then evaluates them: its run has the config of the training.
        if record is not None and "strategy" in record.config:
            found[reference] = record
    return found


def _pretrained_links(members: Sequence[PretrainedMember]) -> Iterator[LineageLink]:
    for member in members:
        facts = {"weights": member.weights, "digest": member.digest}
        yield LineageLink(title="model", name=f"pretrained {member.network}", facts=facts)


def _bundle_links(bundle: Bundle, training: RunRecord | None) -> list[LineageLink]:
    model = LineageLink(title="model", name=str(bundle.ref), facts=_bundle_facts(bundle))
    if training is None:
        return [model, _retraining_link(retraining_of(bundle))]
    code = training.versions.get(CODE) or f"Convoy {training.versions.get('convoy-vision', '')}"
    facts = {
        "command": f"convoy {training.verb}",
        "begun": training.created_utc,
        **_fingerprint(training),
        "code": code,
    }
    if "weights_digest" in training.identity:
        facts["initial weights"] = str(training.identity["weights_digest"])
    return [model, LineageLink(title="training", name=f"run {training.run_id}", facts=facts)]


def _retraining_link(lineage: Mapping[str, str]) -> LineageLink:
    if not lineage:
        gap = "no run of the workspace says that it made this model: it was removed, or the model came from elsewhere"
        return LineageLink(title="training", name="unknown", facts={}, gap=gap)
    facts = {
        "command": "convoy retrain",
        "dataset version": lineage.get("dataset fingerprint"),
        "champion before": lineage.get("champion before"),
        "code": f"Convoy {lineage.get('convoy', '')}",
    }
    return LineageLink(
        title="training",
        name=f"retraining {lineage['retraining']}",
        facts={name: value for name, value in facts.items() if value},
    )


def _retraining_data(store: ObjectStore, bundle: Bundle) -> Iterator[LineageLink]:
    """The dataset of a retraining, which its plan names."""
    lineage = retraining_of(bundle)
    if not lineage:
        return
    fingerprint = lineage["dataset fingerprint"]
    name = dataset_of_retraining(store, lineage)
    if name is None:
        gap = "the plan of the retraining, which names the dataset, is no longer in the workspace"
        yield LineageLink(title="data", name="unknown", facts={"version": fingerprint}, gap=gap)
    else:
        yield _data(store, name, fingerprint)


def _report(folder: RunFolder) -> dict[str, Any]:
    return read_json(folder.store, folder.key("report.json")) or {}


def _bundle_facts(bundle: Bundle) -> dict[str, str]:
    if ENSEMBLE_FILE in bundle.files:
        members = bundle.read_json(ENSEMBLE_FILE)["members"]
        return {"members": ", ".join(member["bundle"] for member in members)}
    config = bundle.read_json("config.json")
    backbone = config["backbone"]
    facts = {"strategy": config.get("strategy"), "network": backbone.get("arch")}
    facts["weights"] = backbone.get("weights_digest")
    return {name: str(value) for name, value in facts.items() if value}


def _fingerprint(record: RunRecord) -> dict[str, str]:
    found = record.identity.get("dataset_fingerprint")
    return {"dataset version": str(found)} if found else {}


def _data_and_code(store: ObjectStore, record: RunRecord) -> Iterator[LineageLink]:
    name, fingerprint = dataset_of_run(record)
    if name and fingerprint:
        yield _data(store, name, fingerprint)
    facts = dict(record.versions)
    revision = facts.pop(CODE, "")
    yield LineageLink(
        title="code",
        name=f"Convoy {record.versions.get('convoy-vision', '')}",
        facts={**({"digest of the package": revision} if revision else {}), **facts},
        gap="" if revision else "the run is older than the records of the code's digest",
    )


def _data(store: ObjectStore, name: str, fingerprint: str) -> LineageLink:
    """A version of a dataset, as its summary has it."""
    try:
        summary: Mapping[str, Any] = (
            read_json(store, f"datasets/{name}/versions/{fingerprint}/summary.json") or {}
        )
    except ConvoyError:
        summary = {}
    header = summary.get("header", {})
    facts = {"version": fingerprint, "source": header.get("source"), "samples": header.get("num_samples")}
    return LineageLink(
        title="data",
        name=f"dataset {name}",
        facts={key: str(value) for key, value in facts.items() if value},
        gap="" if summary else "this version of the dataset is no longer in the workspace",
    )
