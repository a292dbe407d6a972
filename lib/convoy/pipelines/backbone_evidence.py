"""What advice knows of a backbone before it makes strategies of it."""

from __future__ import annotations

from typing import Any

from convoy.core.config import StrictModel
from convoy.pipelines.advise_probes import BackboneProbes
from convoy.pipelines.advise_rule import Evidence, JudgedProbe
from convoy.vision.backbone_config import BackboneConfig


class SvmProbe(StrictModel):
    """A linear SVM on a tap below the top, the C that was chosen, and the seconds of its fit.

    `missing_images` are the training images whose features at that tap the cache lacks.
    """

    judged: JudgedProbe
    C: float
    fit_seconds: float
    missing_images: int


class BackboneEvidence(StrictModel):
    """A backbone with what the rule knows of it, and how it is built and named in configs.

    `as_is` is the network without training, with the `own_classes` of its config, None where its classes are others.
    `svm` is the probe of `early_layer_probe`, None where no tap lies below the top; `reused` the probe at the stage
    that `partial_reuse` keeps. `untrained_rate` are images/s of the untrained network, None where that of another
    architecture stands for it. `missing_images` are the training images whose features at the top tap the cache lacks.
    Without `has_val` configs of heads name the C that was chosen here, as a training has no rows, or too few, to choose
    by. Without `has_held_out`, labels in test or val, configs leave a fold out to be measured on: `learnt_share` is
    what a training learns from of its images.
    """

    probes: BackboneProbes
    evidence: Evidence
    config: BackboneConfig
    as_is: JudgedProbe | None
    own_classes: dict[str, Any]
    svm: SvmProbe | None
    reused: JudgedProbe | None
    untrained_rate: float | None
    train_images: int
    looked_images: int
    missing_images: int
    has_val: bool
    has_held_out: bool
    learnt_share: float
    is_unbalanced: bool
