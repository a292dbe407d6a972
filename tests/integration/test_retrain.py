"""`convoy retrain` over simulated days: what is recomputed, what is promoted, what is held, and what a repeat does."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from convoy.pipelines.committees import committee_of, open_committee, write_ensemble
from convoy.storage.leases import LEASE
from convoy.storage.registry import Alias
from convoy.storage.retrains import RetrainFolder, hold_retrain
from convoy.storage.stores import open_store
from retrain_jobs import NAME, OPEN_GATE, RetrainDays

pytestmark = pytest.mark.integration


def test_days_of_digits_end_as_they_should(
    tmp_path: Path, ray_cluster: Mapping[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    days = RetrainDays(tmp_path, ray_cluster, here=True)
    mlflow_uri = f"file://{tmp_path}/mlflow"
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_uri)
    days.arrive(0, 400)
    first = days.run("2026-01-01")
    assert (first["decision"], first["recomputed"]) == ("promoted", 400)

    days.arrive(400, 300)
    second = days.run("2026-01-02", f"mirror.mlflow_uri={mlflow_uri}")
    assert (second["decision"], second["recomputed"]) == ("promoted", 300)
    assert second["previous"] == first["champion"]
    # The holdout is that of the first day, and no step learnt from it.
    assert second["holdout_rows"] == first["holdout_rows"]
    (step,) = second["steps"]
    assert step["step"] == "refit_head"
    ours, theirs = step["evidence"]["holdout"]["top1"]
    assert ours >= theirs

    nothing = days.run("2026-01-03")
    assert (nothing["decision"], nothing["recomputed"]) == ("nothing_new", 0)

    days.arrive_shuffled(700, 100)
    held = days.run("2026-01-04", exit_code=5)
    assert (held["decision"], held["recomputed"]) == ("held", 100)
    assert held["champion"] == second["champion"]
    assert "labels look wrong" in held["reason"]
    assert days.run("2026-01-04", exit_code=5) == held

    # A few harmless files more do not make it forgotten.
    days.arrive(1400, 5)
    still = days.run("2026-01-05", exit_code=5)
    assert (still["decision"], still["recomputed"], still["data"]["rows"]) == ("held", 5, 105)
    unchanged = days.run("2026-01-06", exit_code=5)
    assert (unchanged["reason"], unchanged["recomputed"]) == (still["reason"], 0)

    # Nor do good ones, however many.
    days.arrive(1450, 200)
    diluted = days.run("2026-01-07", exit_code=5)
    assert (diluted["decision"], diluted["data"]["rows"]) == ("held", 305)
    assert "labels that were held on 2026-01-04" in diluted["reason"]

    # Without that check the candidate learns the wrong labels, and the gate has to notice.
    days.arrive_shuffled(800, 500)
    gated = days.run("2026-01-08", "checks.when_labels_disagree=note", exit_code=5)
    assert gated["decision"] == "held"
    assert gated["steps"][0]["candidate"] != second["champion"]
    assert "top-1 on the holdout" in gated["reason"]

    _check_registry(days, champion=second["champion"], previous=first["champion"])
    _check_mirror(mlflow_uri, champion=second["champion"], previous=first["champion"])
    _check_refusals(days)
    _check_shadow_of_an_ensemble(days)


def _check_registry(days: RetrainDays, *, champion: str, previous: str) -> None:
    """What was promoted and held is in the history, and people can undo it."""
    record = days.aliases()
    assert [entry.action for entry in record.history] == ["promoted", "promoted", *["held"] * 4]
    assert set(record.aliases.values()) <= days.versions()
    shown = days.models("show", f"{NAME}@champion")
    assert (shown["model"], shown["aliases"]) == (champion, ["champion"])
    assert shown["history"][0]["reason"].startswith("refit_head")

    rolled = days.models("rollback", NAME, "--reason", "a complaint")
    assert rolled["aliases"]["champion"] == previous.partition("@")[2]
    digest = champion.partition("@")[2]
    promotion = ("promote", NAME, "--digest", digest, "--reason", "no fault found")
    assert days.models(*promotion)["changed"] is True
    assert days.models(*promotion)["changed"] is False
    assert days.aliases().aliases[Alias.CHAMPION] == digest
    missing = days.models("promote", NAME, "--digest", "0" * 32, "--reason", "x", exit_code=1)
    assert "does not exist" in missing["stderr"]

    diff = days.models("diff", f"{NAME}@champion", f"{NAME}@previous")
    assert not diff["same_predictions"]
    assert diff["config"] == diff["preprocess"] == []
    assert {"top1"} <= {one["key"] for one in diff["metrics"]}


def _check_mirror(mlflow_uri: str, **wanted: str) -> None:
    """A real MLflow has the aliases of the day that named it, with the digests of the workspace's versions."""
    client = MlflowClient(tracking_uri=mlflow_uri, registry_uri=mlflow_uri)
    aliases = client.get_registered_model(NAME).aliases
    tags = {alias: client.get_model_version(NAME, str(number)).tags for alias, number in aliases.items()}
    for alias, version in wanted.items():
        assert version.rpartition("@")[2] in tags[alias].values()


def _check_refusals(days: RetrainDays) -> None:
    earlier = days.start("2025-12-31")
    assert earlier.returncode == 2
    assert "2026-01-08 was decided already" in earlier.stderr

    folder = RetrainFolder(open_store(days.workspace), NAME)
    with hold_retrain(folder):
        holder = json.loads(folder.store.get(folder.key(LEASE)).data)["holder"]
        refused = days.start("2026-01-09")
    assert refused.returncode == 1
    assert f"process {holder['pid']} on {holder['host']}" in refused.stderr


def _check_shadow_of_an_ensemble(days: RetrainDays) -> None:
    """An ensemble gets new weights, and a shadow moves no champion."""
    store = open_store(days.workspace)
    members = [open_committee(store, f"{NAME}@{alias}").members[0] for alias in ("champion", "previous")]
    made = write_ensemble(store, NAME, committee_of(members), metrics={}, card="# two heads\n")
    days.models("promote", NAME, "--digest", made.digest, "--reason", "two are better")
    days.arrive(1300, 50)
    # What was held before is still new, and asked about.
    shadow = days.run("2026-01-10", "mode=shadow", "checks.when_labels_disagree=note")
    assert shadow["decision"] == "shadow"
    assert shadow["data"]["rows"] == 855
    assert [step["step"] for step in shadow["steps"]] == ["refit_weights"]
    assert shadow["champion"] == str(made)
    assert shadow["candidate"] != str(made)
    weights = [one["weight"] for one in days.models("show", f"{NAME}@candidate")["members"]]
    assert sum(weights) == pytest.approx(1.0)


def test_a_champion_that_was_a_mistake_is_rolled_back_by_the_newest_rows(
    tmp_path: Path, ray_cluster: Mapping[str, str]
) -> None:
    days = RetrainDays(tmp_path, ray_cluster, here=True)
    days.arrive(0, 300)
    good = days.run("2026-01-01")["champion"]
    days.arrive_shuffled(300, 600)
    bad = days.run("2026-01-02", "checks.when_labels_disagree=note", exit_code=5)["candidate"]
    days.models("promote", NAME, "--reason", "the gate must be wrong")
    assert days.aliases().aliases[Alias.CHAMPION] == bad.partition("@")[2]

    # A shadow scores both, and moves no champion, though this one should go.
    out_of_reach = "gate={min_gain: 0.9, margin: 1, max_class_drop: 1}"
    days.arrive(900, 200)
    shadow = days.run("2026-01-03", out_of_reach, "mode=shadow")
    assert (shadow["decision"], shadow["champion"], shadow["previous"]) == ("shadow", bad, good)
    assert shadow["steps"][0]["evidence"]["holdout"]["rows"] == shadow["holdout_rows"]
    assert days.aliases().aliases[Alias.CANDIDATE] == shadow["candidate"].partition("@")[2]

    days.arrive(1100, 300)
    rolled = days.run("2026-01-04", out_of_reach, exit_code=5)
    assert (rolled["decision"], rolled["champion"], rolled["previous"]) == ("rolled_back", good, bad)
    assert "the champion is worse than the one before it on the" in rolled["reason"]
    assert "top-1 on the holdout changes by" in rolled["reason"]
    assert days.run("2026-01-04", out_of_reach, exit_code=5) == rolled
    last = days.aliases().history[-1]
    assert (last.action, last.reason) == ("rolled_back", rolled["reason"])
    assert last.run == f"retrains/{NAME}/2026-01-04"
    assert last.evidence["failed"] == ["gain"]

    # The next night has nothing to undo, and a person may.
    assert days.run("2026-01-05", out_of_reach)["decision"] == "nothing_new"
    assert days.models("rollback", NAME)["aliases"]["champion"] == bad.partition("@")[2]


@pytest.mark.slow
def test_a_network_is_trained_on_only_where_a_new_head_is_not_enough(
    tmp_path: Path, ray_cluster: Mapping[str, str]
) -> None:
    days = RetrainDays(tmp_path, ray_cluster)
    days.arrive(0, 300)
    days.run("2026-01-01")
    days.arrive(300, 100)
    tuning = "fine_tune={epochs: 1, freeze_depth: 0}"
    held = days.run("2026-01-02", tuning, "gate={min_gain: 0.9}", exit_code=5)
    assert [step["step"] for step in held["steps"]] == ["refit_head", "fine_tune"]
    assert all(not step["evidence"]["checks"][0]["passed"] for step in held["steps"])
    days.arrive(400, 300)
    enough = days.run("2026-01-03", tuning, OPEN_GATE)
    assert enough["decision"] == "promoted"
    assert [step["step"] for step in enough["steps"]] == ["refit_head"]
