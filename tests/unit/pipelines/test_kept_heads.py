"""Heads on their way from a bundle to the workers of a run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from convoy.cluster.kept_weights import open_readout
from convoy.core.errors import ChecksumMismatch
from convoy.pipelines.classifier_tensors import Readout
from convoy.pipelines.classifiers import keep_head, read_classifier
from convoy.storage.bundles import open_bundle
from convoy.storage.local_store import LocalStore
from convoy.storage.runs import RunFolder
from convoy.vision.head_config import HeadKind
from made_bundles import LENET_FEATURES, made_classifier, write_classifier

FEATURES_BD = torch.randn(4, LENET_FEATURES, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(str(tmp_path))


def test_workers_have_the_very_head_of_the_training(store: LocalStore) -> None:
    trained = made_classifier(store, 0, head=HeadKind.SOFTMAX)
    expected_BK = Readout(trained).logits(FEATURES_BD)
    read = read_classifier(store, open_bundle(store, str(write_classifier(store, "digits", trained))))
    assert torch.equal(Readout(read).logits(FEATURES_BD), expected_BK)
    assert read.head is not None
    key = keep_head(RunFolder(store, "r1"), read)
    # A run that is resumed keeps it again.
    assert keep_head(RunFolder(store, "r1"), read) == key
    readout = open_readout(store, read.head.spec, key, None)
    assert readout is not None
    with torch.inference_mode():
        assert torch.equal(readout(FEATURES_BD), expected_BK)


def test_a_head_that_was_changed_behind_the_drivers_back_is_not_used(store: LocalStore) -> None:
    one, other = (made_classifier(store, seed, head=HeadKind.SOFTMAX).head for seed in (0, 1))
    key = keep_head(RunFolder(store, "r1"), made_classifier(store, 0, head=HeadKind.SOFTMAX))
    assert one is not None
    assert other is not None
    assert key is not None
    store.put(key, other.tensors)
    with pytest.raises(ChecksumMismatch, match="the weights have the digest"):
        open_readout(store, one.spec, key, None)


def test_a_network_as_it_is_keeps_none(store: LocalStore) -> None:
    assert keep_head(RunFolder(store, "r1"), made_classifier(store, 0)) is None
    assert open_readout(store, None, None, None) is None
    assert list(store.list_objects("runs/")) == []
