"""Which backbone: accuracy of a linear probe on the user's images against what each costs on this machine."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from pydantic import Field

from convoy.core.config import StrictModel
from convoy.core.errors import ConfigError, DataError
from convoy.core.progress import Progress
from convoy.pipelines.backbone_costs import BackboneCost, CostsConfig, measure_costs
from convoy.pipelines.backbone_record import BackboneRecord
from convoy.pipelines.cost_front import CostFront, cost_fronts
from convoy.pipelines.device_settings import settle_precision
from convoy.pipelines.feature_plan import ExtractionConfig, FeatureRequest
from convoy.pipelines.features import FeatureJob
from convoy.pipelines.probe_judging import UNKNOWN, ProbeBench, ProbeRows
from convoy.pipelines.training_rows import RowLimit
from convoy.storage.feature_cache import FeatureCache
from convoy.storage.manifests import Manifest
from convoy.storage.object_store import ObjectStore
from convoy.vision.heads import HeadConfig


class ArchitectureConfig(StrictModel):
    """By what backbones are compared: a linear probe on the features of `tap`, and their `costs`."""

    tap: str | int = "pooled"
    rows: RowLimit = RowLimit()
    head: HeadConfig = HeadConfig(C=(1e-4, 1e-3, 1e-2, 1e-1, 1.0), gradient_tolerance=1e-4)
    costs: CostsConfig = CostsConfig()


class ArchitectureChoice(StrictModel):
    """What each backbone costs, and a front of accuracy for each kind of cost.

    All are judged on the same `num_judged_rows` rows of `val`, or of a fifth of `train` where there is no `val`: those
    that every backbone could read.
    """

    dataset: str
    num_judged_rows: int
    costs: list[BackboneCost]
    fronts: list[CostFront] = Field(min_length=1)


def choose_architecture(
    store: ObjectStore,
    manifest: Manifest,
    dataset: str,
    backbones: Sequence[BackboneRecord],
    config: ArchitectureConfig,
    extraction: ExtractionConfig,
    *,
    progress: Progress,
) -> ArchitectureChoice:
    """Probe and measure each backbone; features and costs that are in the workspace are not computed again.

    Raises ConfigError for no backbone or the same one twice, DataError where no judged row could be read by all.
    """
    names = backbone_names(backbones)
    extraction, _ = settle_precision(store, dataset, extraction)
    costs = measure_costs(store, manifest, backbones, config.costs, extraction, progress=progress)
    rows = ProbeRows.of(manifest, config.rows)
    bench = ProbeBench(FeatureCache(store), rows, config.head, num_classes=len(manifest.classes))
    predicted = []
    for name, backbone in zip(names, backbones, strict=True):
        progress.stage(f"probing {name}")
        request = FeatureRequest(dataset=dataset, backbone=backbone.config, taps=(config.tap,))
        job = FeatureJob(store, manifest, backbone, request, extraction, rows=rows.table)
        job.ensure(progress=progress)
        set_id = job.set_id(config.tap)
        predicted.append(bench.predict(bench.fit([set_id], set_id), set_id))
    predicted_MN = np.stack(predicted)
    readable_N = (predicted_MN != UNKNOWN).all(axis=0)
    if not readable_N.any():
        raise DataError(
            "no judged row could be read by every backbone",
            where=manifest.uri,
            next_step="look at the rejects with `convoy cache`",
        )
    correct_MN = (predicted_MN == rows.judged.labels_N)[:, readable_N]
    return ArchitectureChoice(
        dataset=dataset,
        num_judged_rows=int(readable_N.sum()),
        costs=costs,
        fronts=cost_fronts(costs, names, correct_MN),
    )


def backbone_names(backbones: Sequence[BackboneRecord]) -> list[str]:
    """The architecture of each, with what tells those of one architecture apart: their weights, or else input size.

    Raises ConfigError for no backbone, and for one that is there twice.
    """
    if not backbones:
        raise ConfigError("no backbone is named", where="backbones", next_step="name at least one")
    for name_of in (_by_arch, _by_weights, _by_input):
        names = [name_of(backbone) for backbone in backbones]
        if len(set(names)) == len(names):
            return names
    raise ConfigError(
        "a backbone is there twice", where="backbones", next_step="name every network and input size once"
    )


def _by_arch(backbone: BackboneRecord) -> str:
    return backbone.arch


def _by_weights(backbone: BackboneRecord) -> str:
    return f"{backbone.arch} {backbone.weights_digest[:8]}"


def _by_input(backbone: BackboneRecord) -> str:
    return f"{_by_weights(backbone)} at {backbone.preset.crop_px} px"
