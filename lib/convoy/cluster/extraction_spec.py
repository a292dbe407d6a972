"""What an operator is told: which sets, which network, at which settings. Free of torch and Ray."""

from __future__ import annotations

from convoy.core.config import StrictModel
from convoy.vision.augmentation_policy import AugmentationPolicy
from convoy.vision.backbone_config import BackboneConfig
from convoy.vision.decode_rule import DecodeRule
from convoy.vision.engine_options import EngineOptions
from convoy.vision.presets import EvalPreset


class FeatureOutput(StrictModel):
    """One set that slices write: a tap of a view as a policy draws it, and the metadata of its files."""

    set_id: str
    prefix: str
    tap: str
    view: int
    augmentation: AugmentationPolicy
    metadata: dict[str, str]


class ExtractionSpec(StrictModel):
    """Everything that a worker needs, as JSON; the rest it reads from the workspace.

    `num_classes` are those of the network by its record, 0 without a classifier.
    """

    workspace: str
    run_id: str
    backbone: BackboneConfig
    num_classes: int
    weights_key: str
    preset: EvalPreset
    decode_rule: DecodeRule
    outputs: tuple[FeatureOutput, ...]
    dtype: str
    engine: EngineOptions
    # Of 0 the operator decodes itself.
    num_decode_threads: int
    num_fetch_threads: int | None
    stall_s: float
