"""From a result back to models, trainings and data; a model of a retraining says itself which one made it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from convoy.pipelines.classifier_tensors import classifier_files
from convoy.pipelines.evaluate import EvaluateConfig
from convoy.pipelines.model_choice import chosen_committee
from convoy.pipelines.report_lineage import LineageLink, lineage_of_bundle, lineage_of_run
from convoy.pipelines.report_members import members_of_run
from convoy.storage.bundles import BundleRef, write_bundle
from convoy.storage.local_store import LocalStore
from convoy.storage.retrains import RetrainFolder, RetrainPlan
from convoy.storage.runs import RunRecord
from convoy.vision.head_config import HeadKind
from made_bundles import DIGITS, made_classifier, write_classifier

DATE = "2026-11-27"


def made_version(store: LocalStore, metrics: dict[str, Any]) -> BundleRef:
    files = classifier_files(store, made_classifier(store, 0, head=HeadKind.SOFTMAX))
    described = {"metrics.json": json.dumps(metrics).encode(), "README.md": b"# made\n"}
    return write_bundle(store, "photos", {**files, **described})


def lineage(store: LocalStore, metrics: dict[str, Any]) -> dict[str, LineageLink]:
    return {link.title: link for link in lineage_of_bundle(store, made_version(store, metrics))}


def retrained(fingerprint: str) -> dict[str, str]:
    """As a candidate has it beside its metrics."""
    return {
        "retraining": f"photos/{DATE}",
        "dataset fingerprint": fingerprint,
        "convoy": "1.0",
        "champion before": "photos@" + "c" * 32,
    }


def keep_plan(store: LocalStore, fingerprint: str) -> None:
    plan = RetrainPlan(
        date=DATE,
        fingerprint=fingerprint,
        previous_fingerprint=None,
        champion="c" * 32,
        config={"dataset": "parts"},
    )
    RetrainFolder(store, "photos").write_plan(plan)


@pytest.mark.parametrize("place", ["beside the metrics", "measured"])
def test_a_retrained_model_leads_to_its_retraining_and_on_to_the_data(tmp_path: Path, place: str) -> None:
    store = LocalStore(str(tmp_path))
    fingerprint = "a" * 32
    keep_plan(store, fingerprint)
    header = {"source": "s3://photos", "num_samples": 40}
    store.put(f"datasets/parts/versions/{fingerprint}/summary.json", json.dumps({"header": header}).encode())
    told = {"lineage": retrained(fingerprint)}
    links = lineage(store, {"measured": told} if place == "measured" else told)
    assert list(links) == ["model", "training", "data"]
    assert links["training"].name == f"retraining photos/{DATE}"
    assert links["training"].facts == {
        "command": "convoy retrain",
        "dataset version": fingerprint,
        "champion before": "photos@" + "c" * 32,
        "code": "Convoy 1.0",
    }
    assert links["data"].name == "dataset parts"
    assert links["data"].facts == {"version": fingerprint, "source": "s3://photos", "samples": "40"}
    assert not any(link.gap for link in links.values())


def test_data_of_a_retraining_that_is_gone_is_said_to_be_gone(tmp_path: Path) -> None:
    store = LocalStore(str(tmp_path))
    told = {"lineage": retrained("a" * 32)}
    assert "the plan of the retraining" in lineage(store, told)["data"].gap
    keep_plan(store, "a" * 32)
    found = lineage(store, told)["data"]
    assert (found.name, found.facts) == ("dataset parts", {"version": "a" * 32})
    assert "no longer in the workspace" in found.gap


def test_a_model_that_nothing_says_anything_of_has_a_gap(tmp_path: Path) -> None:
    links = lineage(LocalStore(str(tmp_path)), {"top1": 0.5})
    assert list(links) == ["model", "training"]
    assert "no run of the workspace" in links["training"].gap


@pytest.mark.parametrize(
    ("told", "found"),
    [
        ({"bundle": "zebras"}, "zebras"),
        ({"bundle": "zebras@champion"}, "zebras"),
        ({"bundle": "{uri}"}, "zebras"),
        ({"name": "zebras"}, "zebras"),
        ({"bundle": "renamed"}, "horses"),
    ],
)
def test_of_equal_models_a_run_leads_to_the_one_that_it_was_told_of(
    tmp_path: Path, told: dict[str, str], found: str
) -> None:
    store = LocalStore(str(tmp_path))
    refs = {name: write_classifier(store, name, made_classifier(store, 0)) for name in ("horses", "zebras")}
    digest = refs["zebras"].digest
    assert refs["horses"].digest == digest
    record = RunRecord.new(
        "r1",
        verb="evaluate",
        identity={"model_digest": digest},
        config={key: value.format(uri=refs["zebras"].uri) for key, value in told.items()},
        outputs={},
        groups=(),
        settings={},
    )
    members = members_of_run(store, record)
    assert members is not None
    assert members.bundles == [str(refs[found])]


def record_of_pretrained(digest: str, config: dict[str, Any]) -> RunRecord:
    return RunRecord.new(
        "r1",
        verb="evaluate",
        identity={"model_digest": digest},
        config=config,
        outputs={},
        groups=(),
        settings={},
    )


def test_a_pretrained_network_is_known_by_its_weights_and_digest(tmp_path: Path) -> None:
    model = {
        "backbone": {"arch": "cifar_resnet20", "weights": "s3://nets/resnet20.th"},
        "classes": ["a", "b"],
    }
    record = record_of_pretrained("d" * 32, {"model": model, "bundle": None})
    links = [link for link in lineage_of_run(LocalStore(str(tmp_path)), record) if link.title == "model"]
    assert [(link.name, link.facts, link.gap) for link in links] == [
        ("pretrained cifar_resnet20", {"weights": "s3://nets/resnet20.th", "digest": "d" * 32}, "")
    ]


def test_a_pretrained_network_of_another_version_of_the_config_is_told_as_it_was(tmp_path: Path) -> None:
    record = record_of_pretrained("d" * 32, {"model": {"net": "größer"}})
    members = members_of_run(LocalStore(str(tmp_path)), record)
    assert members is not None
    assert (members.pretrained, members.told) == ((), {"model": '{"net": "größer"}'})
    assert "another version" in members.gap


def test_an_ensemble_leads_to_its_bundles_and_to_its_pretrained_networks(tmp_path: Path) -> None:
    store = LocalStore(str(tmp_path))
    ref = write_classifier(store, "first", made_classifier(store, 0))
    pretrained = {"backbone": {"arch": "lenet5", "weights": "random", "num_classes": 10}, "classes": DIGITS}
    config = EvaluateConfig.model_validate(
        {
            "workspace": str(tmp_path),
            "dataset": "digits",
            "splits": ["test"],
            "ensemble": {"members": [{"bundle": str(ref)}, pretrained]},
        }
    )
    committee = chosen_committee(store, config, config, config.extraction)
    record = RunRecord.new(
        "r1",
        verb="evaluate",
        identity={"committee": committee.digest},
        config=config.model_dump(mode="json"),
        outputs={},
        groups=(),
        settings={},
    )
    members = members_of_run(store, record)
    assert members is not None
    assert (members.bundles, members.gap) == ([str(ref)], "")
    (network,) = members.pretrained
    assert (network.network, network.weights) == ("lenet5", "random")
    assert network.digest == committee.members[1].digest
