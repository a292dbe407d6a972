from __future__ import annotations

import json
from pathlib import Path

import pytest

from convoy.core.crop_policies import Averaging, CropPlan, CropPolicy
from convoy.core.errors import ConfigError, DataError
from convoy.pipelines.classifier_tensors import classifier_files
from convoy.pipelines.classifiers import Classifier, read_classifier
from convoy.pipelines.committees import (
    CommitteeMember,
    CommitteeRecord,
    EnsembleConfig,
    committee_of,
    configured_committee,
    open_committee,
    single_committee,
    write_ensemble,
)
from convoy.pipelines.model_listing import list_models, show_model
from convoy.storage.bundles import BundleRef, open_bundle, write_bundle
from convoy.storage.local_store import LocalStore
from convoy.vision.committee_options import GateOptions
from convoy.vision.decode_rule import DecodeRule
from convoy.vision.head_config import HeadKind
from made_bundles import DIGITS, FP32, made_classifier, write_classifier

METRICS = {"measured": {"top1": 0.7, "rows": "test"}}


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(str(tmp_path / "workspace"))


def member(classifier: Classifier, name: str, *, weight: float = 1.0, digest: str = "") -> CommitteeMember:
    return CommitteeMember(
        name=name, digest=digest or name, bundle=None, classifier=classifier, weight=weight
    )


def two_bundles(store: LocalStore) -> tuple[BundleRef, BundleRef]:
    """Two models of the same classes in different orders, the second under a head."""
    first = write_classifier(store, "first", made_classifier(store, 0))
    head = made_classifier(store, 1, classes=DIGITS[::-1], head=HeadKind.SOFTMAX)
    return first, write_classifier(store, "second", head)


def written_ensemble(store: LocalStore) -> tuple[BundleRef, CommitteeRecord]:
    first, second = two_bundles(store)
    config = EnsembleConfig.model_validate(
        {
            "members": [
                {"bundle": str(first), "weight": 3, "temperature": 1.5},
                {"bundle": str(second), "weight": 1},
            ],
            "averaging": "logits",
            "temperature": 0.8,
        }
    )
    committee = configured_committee(store, config, FP32).with_plan(CropPlan(policy=CropPolicy.FLIP))
    gate = GateOptions(members=(0,), policy=CropPolicy.CENTER, threshold=0.9)
    committee = committee.with_gate(gate)
    return write_ensemble(store, "both", committee, metrics=METRICS, card="# both\n"), committee


@pytest.mark.parametrize("setting", [{"classes": list(DIGITS)}, {"class_map": {"0": "zero"}}])
def test_a_bundle_as_a_member_has_its_own_classes(setting: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="are for a backbone: a bundle has its own"):
        EnsembleConfig.model_validate({"members": [{"bundle": "first", **setting}]})


def test_weights_count_relative_to_each_other(store: LocalStore) -> None:
    committee = committee_of(
        [
            member(made_classifier(store, 0), "a", weight=3),
            member(made_classifier(store, 1), "b", weight=1),
        ]
    )
    assert [one.weight for one in committee.members] == [0.75, 0.25]


def test_classes_in_another_order_are_the_same_classes(store: LocalStore) -> None:
    up, down = made_classifier(store, 0), made_classifier(store, 1, classes=DIGITS[::-1])
    assert committee_of([member(up, "up"), member(down, "down")]).classes == DIGITS
    assert committee_of([member(down, "down"), member(up, "up")]).classes == DIGITS[::-1]


def test_other_classes_are_refused_with_their_names(store: LocalStore) -> None:
    digits = made_classifier(store, 0)
    other = made_classifier(store, 1, classes=(*DIGITS[:9], "ten"))
    with pytest.raises(ConfigError, match="a alone knows 9; b alone knows ten"):
        committee_of([member(digits, "a"), member(other, "b")])


def test_one_decode_cannot_serve_two_rules(store: LocalStore) -> None:
    rule = DecodeRule(max_pixels=1000)
    other = made_classifier(store, 1, extraction=FP32.model_copy(update={"decode": rule}))
    with pytest.raises(ConfigError, match="b decodes images by another rule than a"):
        committee_of([member(made_classifier(store, 0), "a"), member(other, "b")])


def test_margins_are_averaged_as_they_are_and_never_as_probabilities(store: LocalStore) -> None:
    svm = made_classifier(store, 1, head=HeadKind.LINEAR_SVM)
    members = [member(made_classifier(store, 0), "net"), member(svm, "svm")]
    with pytest.raises(ConfigError, match="scores of svm are margins"):
        committee_of(members)
    with pytest.raises(ConfigError, match="scores of svm are margins"):
        committee_of(members[1:])
    assert not committee_of(members, averaging=Averaging.LOGITS).gives_probabilities
    assert single_committee(svm, name="svm", digest="svm").averaging is Averaging.LOGITS


def test_an_ensemble_comes_back_as_it_was_written(store: LocalStore) -> None:
    ref, committee = written_ensemble(store)
    opened = open_committee(store, "both")
    assert opened.digest == committee.digest
    assert (opened.plan, opened.averaging, opened.temperature) == (
        committee.plan,
        Averaging.LOGITS,
        committee.temperature,
    )
    assert opened.gate == committee.gate
    assert [(one.name, one.weight, one.temperature) for one in opened.members] == [
        (one.name, one.weight, one.temperature) for one in committee.members
    ]
    assert opened.classes == DIGITS
    assert open_bundle(store, str(ref)).read_json("metrics.json") == METRICS


def test_weights_that_do_not_sum_to_one_to_the_last_bit_come_back_as_they_were_written(
    store: LocalStore,
) -> None:
    """Another digest would be another committee, whose test rows would be predicted again."""
    names = [str(write_classifier(store, f"m{seed}", made_classifier(store, seed))) for seed in range(3)]
    config = EnsembleConfig.model_validate(
        {"members": [{"bundle": name, "weight": count} for name, count in zip(names, (1, 4, 1), strict=True)]}
    )
    committee = configured_committee(store, config, FP32)
    assert sum(one.weight for one in committee.members) != 1.0
    write_ensemble(store, "three", committee, metrics=METRICS, card="# three\n")
    assert open_committee(store, "three").digest == committee.digest


def test_other_crops_leave_the_gate_behind(store: LocalStore) -> None:
    _, committee = written_ensemble(store)
    assert committee.with_plan(CropPlan(policy=CropPolicy.FLIP)).gate is not None
    other = committee.with_plan(CropPlan(policy=CropPolicy.TEN))
    assert other.gate is None
    assert other.digest != committee.digest


def test_a_single_bundle_is_a_committee_of_one(store: LocalStore) -> None:
    first, _ = two_bundles(store)
    committee = open_committee(store, "first")
    (only,) = committee.members
    assert (only.name, only.digest, only.weight) == (str(first), first.digest, 1.0)
    assert committee.plan == CropPlan()


def test_an_ensemble_whose_member_is_gone_names_it(store: LocalStore) -> None:
    written_ensemble(store)
    gone = open_bundle(store, "second").ref
    store.delete([info.key for info in store.list_objects(gone.folder)])
    with pytest.raises(DataError, match="a member of the ensemble cannot be opened") as caught:
        open_committee(store, "both")
    assert str(gone) in caught.value.next_step


def test_an_ensemble_is_made_of_bundles_and_of_no_ensembles(store: LocalStore) -> None:
    written_ensemble(store)
    with pytest.raises(ConfigError, match="cannot be a member of another one"):
        configured_committee(store, EnsembleConfig.model_validate({"members": [{"bundle": "both"}]}), FP32)
    loose = single_committee(made_classifier(store, 0), name="loose", digest="0")
    with pytest.raises(ConfigError, match="loose is no bundle"):
        write_ensemble(store, "both", loose, metrics={}, card="")


def test_a_verb_for_single_models_refuses_an_ensemble(store: LocalStore) -> None:
    written_ensemble(store)
    with pytest.raises(ConfigError, match="this is an ensemble") as caught:
        read_classifier(store, open_bundle(store, "both"))
    assert "convoy models show both" in caught.value.next_step


def test_models_are_listed_by_name_and_newest_marked(store: LocalStore) -> None:
    written_ensemble(store)
    older = open_bundle(store, "first").ref
    write_classifier(store, "first", made_classifier(store, 5))
    models = list_models(store.root_uri).models
    assert [(one.model.split("@")[0], one.strategy) for one in models] == [
        ("both", "ensemble"),
        ("first", "as_is"),
        ("first", "as_is"),
        ("second", "linear_probe"),
    ]
    assert [one.is_latest for one in models if one.model.startswith("first")].count(True) == 1
    assert not next(one for one in models if one.model == str(older)).is_latest
    assert (models[0].networks, models[0].top1, models[0].rows) == (["lenet5", "lenet5"], 0.7, "test")
    assert (models[1].num_classes, models[1].top1, models[1].rows) == (10, 0.5, "test")


def test_a_bundle_with_a_damaged_or_lost_file_hides_no_other(store: LocalStore) -> None:
    refs = [write_classifier(store, name, made_classifier(store, 0)) for name in ("edited", "good", "lost")]
    store.put(f"{refs[0].folder}README.md", b"edited by hand")
    store.delete([f"{refs[2].folder}classes.json"])
    store.put("models/good/aliases.json", b"{")
    found = list_models(store.root_uri)
    assert [one.model for one in found.models] == [str(refs[1])]
    assert [(one.model, one.what) for one in found.unreadable][::2] == [
        (str(refs[0]), "README.md does not hold the bytes that were recorded"),
        (str(refs[2]), "the bundle has lost classes.json"),
    ]
    assert found.unreadable[0].where == f"{refs[0].uri}/README.md"
    assert found.unreadable[1].model == "good"


def test_a_model_is_listed_with_the_fold_that_it_was_measured_on(store: LocalStore) -> None:
    metrics = {"top1": 0.9, "splits": ["train"], "rows": "train (fold 1 of 5)"}
    described = {"metrics.json": json.dumps(metrics).encode(), "README.md": b"# made"}
    write_bundle(store, "probe", {**classifier_files(store, made_classifier(store, 0)), **described})
    assert list_models(store.root_uri).models[0].rows == "train (fold 1 of 5)"


def test_a_shown_ensemble_says_who_its_members_are_and_who_has_left(store: LocalStore) -> None:
    _, committee = written_ensemble(store)
    gone = open_bundle(store, "second").ref
    store.delete([info.key for info in store.list_objects(gone.folder)])
    shown = show_model(store.root_uri, "both")
    assert [one.bundle for one in shown.members] == [one.name for one in committee.members]
    assert [one.network for one in shown.members] == ["lenet5", None]
    assert (shown.crops, shown.averaging, shown.gate) == (committee.plan, Averaging.LOGITS, committee.gate)
    single = show_model(store.root_uri, "first")
    assert (single.classes, single.members, single.crops) == (list(DIGITS), [], None)
