"""What a scoring operator is told: which networks, which crops, which outputs. Free of Ray."""

from __future__ import annotations

from convoy.core.config import StrictModel
from convoy.core.crop_policies import MemberOutputs
from convoy.vision.backbone_config import BackboneConfig
from convoy.vision.committee_options import CommitteeOptions, GateOptions, MemberOptions
from convoy.vision.decode_rule import DecodeRule
from convoy.vision.heads import HeadSpec


class MemberSpec(StrictModel):
    """A network with its readout, and where a worker finds its tensors.

    `head_key` is a bundle's file that holds the head; `output_groups` adds outputs up to classes. `class_order`
    gives for each class of the committee its index among the member's, null where the order is the same.
    """

    digest: str
    backbone: BackboneConfig
    weights_key: str
    tap: str
    head: HeadSpec | None
    head_key: str | None
    output_groups: tuple[tuple[int, ...], ...] | None
    class_order: tuple[int, ...] | None
    options: MemberOptions


class ScoringSpec(StrictModel):
    """Everything that a worker needs, as JSON; the rest it reads from the workspace.

    `class_of_label` gives for each class of the dataset its index among `classes`. `outputs` maps the id of each
    output to the prefix of its parts; `metadata` goes into all of their files.
    """

    workspace: str
    run_id: str
    members: tuple[MemberSpec, ...]
    classes: tuple[str, ...]
    class_of_label: tuple[int, ...]
    gives_probabilities: bool
    model_digest: str
    committee: CommitteeOptions
    gate: GateOptions | None
    is_dense: bool
    keep: MemberOutputs
    decode_rule: DecodeRule
    outputs: dict[str, str]
    metadata: dict[str, str]
    num_decode_threads: int
    num_fetch_threads: int
