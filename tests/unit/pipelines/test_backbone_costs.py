"""How the cost of a backbone is asked for."""

from __future__ import annotations

from pathlib import Path

import pytest

from convoy.pipelines.backbone_costs import CostsConfig, _spec
from convoy.pipelines.feature_plan import ExtractionConfig
from convoy.pipelines.models import fetch_backbone
from convoy.storage.local_store import LocalStore
from convoy.vision.backbone_config import BackboneConfig
from made_bundles import FP32
from made_devices import made_device


@pytest.mark.parametrize(
    ("told", "extraction", "expected"),
    [(8, ExtractionConfig(batch_size=64), 8), (None, ExtractionConfig(batch_size=64), 64), (None, FP32, 256)],
)
def test_batches_are_those_of_jobs_unless_they_are_told(
    tmp_path: Path, told: int | None, extraction: ExtractionConfig, expected: int
) -> None:
    config = BackboneConfig(arch="lenet5", weights="random")
    backbone = fetch_backbone(LocalStore(str(tmp_path)), config)
    settled = extraction.model_copy(update={"precision": FP32.precision})
    assert _spec(backbone, CostsConfig(batch_size=told), settled, "none", made_device).batch_size == expected
