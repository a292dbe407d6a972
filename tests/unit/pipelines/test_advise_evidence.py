"""The untrained network that a backbone is compared with is the same network but for its weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from convoy.core.config import load_config
from convoy.core.progress import Silent
from convoy.core.records import Split
from convoy.pipelines.advise_config import AdviseConfig, CandidateBackbone
from convoy.pipelines.advise_evidence import Gatherer
from convoy.pipelines.advise_probes import Look, Prober
from convoy.pipelines.feature_summary import FeatureSummary
from convoy.pipelines.features import FeatureJob
from convoy.pipelines.models import fetch_backbone
from convoy.storage.local_store import LocalStore
from made_advice import made_probes
from made_advice_rows import frozen_rows

LENET = "arch: lenet5, weights: random, seed: 3, num_classes: 7, preset: {resize_px: null, crop_px: 32}"
NEW_LAYERS = "new_layers: {after: c1, convs: [{width: 8}], hidden_widths: [16]}"


@pytest.mark.parametrize(
    ("settings", "taps"),
    [(LENET, ("c1", "pooled")), (f"{LENET}, {NEW_LAYERS}", ("body.c1", "convs.0"))],
    ids=["classes", "new layers"],
)
def test_the_untrained_network_has_the_layers_and_the_classes_of_the_candidate(
    tmp_path: Path, settings: str, taps: tuple[str, ...]
) -> None:
    config = load_config(AdviseConfig, None, [f"candidates=[{{backbone: {{{settings}}}}}]", "dataset=parts"])
    manifest = frozen_rows(tmp_path, {Split.TRAIN: (60, 60)}, ("good", "defect"))
    store, (candidate,) = LocalStore(str(tmp_path)), config.candidates
    record = fetch_backbone(store, candidate.backbone)
    probe = made_probes("lenet5", 0.0).top
    probed = [probe.model_copy(update={"tap": record.resolve_tap(tap)}) for tap in taps]
    probes = made_probes("lenet5", 0.0).model_copy(update={"taps": probed})
    best = Look(record, FeatureSummary.model_construct(), probes, np.ones(0, np.bool_), None)
    trained = candidate.backbone.model_copy(update={"weights": "some.pth", "weights_digest": "a" * 32})
    gatherer = Gatherer(store, manifest, config, Prober(store, manifest, config, Silent()))
    untrained, its_record = gatherer._untrained(CandidateBackbone(backbone=trained), best)
    assert [its_record.resolve_tap(tap) for tap in untrained.taps or ()] == [one.tap for one in probed]
    assert its_record.num_classes == 7
    assert its_record.axis == record.axis


@pytest.mark.parametrize(("weights", "dtype"), [("random", "float32"), ("DEFAULT", "float16")])
def test_activations_of_random_weights_are_kept_where_float16_would_make_them_zero(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weights: str, dtype: str
) -> None:
    """EfficientNet-B0 has some of 1e-13."""
    config = load_config(AdviseConfig, None, [f"candidates=[{{backbone: {{{LENET}}}}}]", "dataset=parts"])
    manifest = frozen_rows(tmp_path, {Split.TRAIN: (60, 60)}, ("good", "defect"))
    store, (candidate,) = LocalStore(str(tmp_path)), config.candidates
    record = fetch_backbone(store, candidate.backbone)
    record = record.model_copy(update={"config": candidate.backbone.model_copy(update={"weights": weights})})
    stored = []

    def ensure(job: FeatureJob, **_: object) -> None:
        stored.extend(spec.dtype for spec in job.sets)
        raise LookupError

    monkeypatch.setattr(FeatureJob, "ensure", ensure)
    with pytest.raises(LookupError):
        Prober(store, manifest, config, Silent()).look(candidate, record)
    assert set(stored) == {dtype}
