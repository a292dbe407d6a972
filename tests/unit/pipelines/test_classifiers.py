"""The classes of a network are told apart by name, and each is the output that it names."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from convoy.core.errors import ConfigError
from convoy.pipelines.classifiers import as_is, class_indices
from convoy.pipelines.feature_plan import FeatureDtype, FeatureRequest, plan_sets
from convoy.storage.local_store import LocalStore
from made_bundles import DIGITS, FP32, made_classifier

REPEATED = (*DIGITS[:9], "0")


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(str(tmp_path / "workspace"))


def test_two_outputs_of_the_same_name_are_refused(store: LocalStore) -> None:
    backbone = made_classifier(store, 0).backbone
    with pytest.raises(ConfigError, match="have the same class name: 0"):
        as_is(backbone, REPEATED, FP32)


def test_a_map_may_join_outputs_of_the_same_name(store: LocalStore) -> None:
    backbone = made_classifier(store, 0).backbone
    joined = as_is(backbone, REPEATED, FP32, class_map={"0": "round", "1": "straight"})
    assert joined.classes == ("round", "straight")
    assert joined.output_groups == ((0, 9), (1,))


def test_logits_of_a_network_as_it_is_are_not_rounded(store: LocalStore) -> None:
    """In float16 near ties become ties, and confidences are off."""
    classifier = made_classifier(store, 0)
    request = FeatureRequest(dataset="digits", backbone=classifier.backbone.config, taps=(classifier.tap,))
    for job in (FP32, FP32.model_copy(update={"dtype": FeatureDtype.FLOAT16})):
        (spec,) = plan_sets(classifier.backbone, request, classifier.extraction_like(job))
        assert spec.dtype == "float32"


def test_an_order_is_asked_for_only_where_the_classes_come_in_another_one(store: LocalStore) -> None:
    classifier = made_classifier(store, 0)
    assert classifier.order_of(DIGITS) is None
    assert classifier.order_of(DIGITS[::-1]) == tuple(range(9, -1, -1))
    # As bundles may have it that were made when names could repeat.
    assert replace(classifier, classes=REPEATED).order_of(REPEATED) is None


def test_an_error_names_the_first_classes_that_a_model_does_not_know_and_counts_the_others() -> None:
    assert class_indices(("cat", "dog"), ("dog", "owl", "cat")) == [2, 0]
    with pytest.raises(
        ConfigError, match=r"does not know 10 classes of the dataset: 0, 1, 2, 3, 4 and 5 more\n"
    ):
        class_indices(DIGITS, ("cat", "dog"))
    with pytest.raises(
        ConfigError, match=r"one does not know 5 classes of the dataset: 5, 6, 7, 8, 9\n  next: do"
    ):
        class_indices(DIGITS, DIGITS[:5], model="one", next_step="do this")
