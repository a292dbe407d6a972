"""What a workspace knows of a network: enough to plan with, without loading a tensor."""

from __future__ import annotations

from convoy.core.config import StrictModel
from convoy.vision.backbone_config import BackboneConfig
from convoy.vision.presets import EvalPreset
from convoy.vision.stages import DepthAxis, resolve_tap

BACKBONES = "models/backbones/"


class BackboneRecord(StrictModel):
    """A network in the workspace: what it is, where its weights lie, its depth axis, and what it expects.

    `macs` are multiply-adds for one image at the preset's size, `tap_macs` those from the input to the tap of each
    stage, which records of earlier versions lack. `num_classes` is 0 without a classifier; `classes` are known for
    some weights only.
    """

    config: BackboneConfig
    arch: str
    weights_digest: str
    weights_key: str
    preset: EvalPreset
    num_classes: int
    classes: tuple[str, ...] | None
    num_parameters: int
    macs: int
    tap_macs: tuple[int, ...] = ()
    axis: DepthAxis

    @property
    def weights_bytes(self) -> int:
        """What the parameters take in float32."""
        return 4 * self.num_parameters

    def macs_to(self, tap: str | int) -> int:
        """Multiply-adds of one image at the preset's size to a tap, where a pass for its features ends."""
        return self.tap_macs[resolve_tap(self.axis, tap).index] if self.tap_macs else self.macs

    def resolve_tap(self, tap: str | int) -> str:
        """The full name of a stage given by name, alias, prefix or number."""
        return resolve_tap(self.axis, tap).name
