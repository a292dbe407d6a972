"""What an inspecting operator is told: which network, and which pictures to make of it. Free of torch and Ray."""

from __future__ import annotations

from enum import StrEnum

from convoy.core.config import StrictModel
from convoy.vision.backbone_config import BackboneConfig
from convoy.vision.decode_rule import DecodeRule
from convoy.vision.head_config import HeadSpec
from convoy.vision.inspection_options import MaximisationOptions, Unit
from convoy.vision.presets import EvalPreset

# In the data of a picture that shows nothing: why.
MISSING = "missing"


class PieceKind(StrEnum):
    """What a piece shows."""

    FILTERS = "filters"  # of the first layer
    CLASSES = "classes"  # images that maximise classes
    CHANNELS = "channels"  # images that maximise channels of a stage
    CAMS = "cams"  # Grad-CAM of images, stage by stage
    FEATURE_MAPS = "feature_maps"  # of one image, stage by stage
    NEIGHBOURS = "neighbours"  # images, each with the nearest of the sample
    NEAR_DUPLICATES = "near_duplicates"  # images that show one picture, a group a row


class CamLook(StrictModel):
    """Grad-CAM of the image in a row of the piece for one of the model's classes; `name` stands before its line."""

    row: int
    class_index: int
    name: str


class SheetLine(StrictModel):
    """The next `sample_ids` of a piece's rows as a line of a sheet; `notes` say a word of each, for the data."""

    name: str
    sample_ids: tuple[str, ...]
    notes: tuple[str, ...]


class Piece(StrictModel):
    """One piece of work: one task, one or more pictures. `units` are named by `unit_names`.

    Pieces that show images have them as the rows of their slice, in the order of `looks` or `lines`.
    """

    name: str
    kind: PieceKind
    title: str
    caption: str
    stages: tuple[str, ...] = ()
    units: tuple[Unit, ...] = ()
    unit_names: tuple[str, ...] = ()
    looks: tuple[CamLook, ...] = ()
    lines: tuple[SheetLine, ...] = ()
    columns: tuple[str, ...] = ()
    num_channels: int = 0


class PictureData(StrictModel):
    """The JSON beside a picture: what it is (a `PieceKind`, or `embedding`), and the figures behind it."""

    kind: str
    title: str
    caption: str
    data: dict[str, object]


class NetworkSpec(StrictModel):
    """A network with its readout, and where a worker finds its tensors; the fields are those of a committee's member.

    `stages` are the names of all stages that pieces look at.
    """

    backbone: BackboneConfig
    weights_key: str
    preset: EvalPreset
    tap: str
    head: HeadSpec | None
    head_key: str | None
    output_groups: tuple[tuple[int, ...], ...] | None
    stages: tuple[str, ...]


class InspectionSpec(StrictModel):
    """Everything that a worker needs, as JSON; `pieces` by the names of their slices."""

    workspace: str
    run_id: str
    prefix: str
    network: NetworkSpec
    maximisation: MaximisationOptions
    decode_rule: DecodeRule
    pieces: dict[str, Piece]
    num_threads: int
    num_fetch_threads: int | None
    stall_s: float
