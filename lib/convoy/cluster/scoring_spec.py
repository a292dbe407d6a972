"""What a scoring operator is told: which networks, which crops, which outputs. Free of Ray."""

from __future__ import annotations

from pydantic import Field

from convoy.core.config import StrictModel
from convoy.core.crop_policies import MemberOutputs
from convoy.core.result_columns import ClassOutputs, PartitionBy
from convoy.storage.local_cache import LocalCacheOptions
from convoy.vision.backbone_config import BackboneConfig
from convoy.vision.committee_options import CommitteeOptions, GateOptions, MemberOptions
from convoy.vision.decode_rule import DecodeRule
from convoy.vision.head_config import HeadSpec


class MemberSpec(StrictModel):
    """A network with its readout, and where a worker finds its tensors.

    `num_classes` are those of the network by its record. `head_key` is the file of the run that holds the head;
    `output_groups` adds outputs up to classes. `class_order` gives for each class of the committee its index among the
    member's, null where the order is the same.
    """

    digest: str
    backbone: BackboneConfig
    num_classes: int
    weights_key: str
    tap: str
    head: HeadSpec | None
    head_key: str | None
    output_groups: tuple[tuple[int, ...], ...] | None
    class_order: tuple[int, ...] | None
    options: MemberOptions


class ScoreTable(StrictModel):
    """How the parts of `convoy score` look. `label_names` are the classes of the dataset.

    `features_tap` and `features_dtype` (float16 or float32) are those of the column of features, null for none.
    """

    outputs: ClassOutputs
    partition_by: PartitionBy
    label_names: tuple[str, ...]
    features_tap: str | None
    features_dtype: str


class ScoringSpec(StrictModel):
    """Everything that a worker needs, as JSON; the rest it reads from the workspace.

    `class_of_label` gives for each class of the dataset its index among `classes`, null where it is none of them.
    `outputs` maps the id of each output to the prefix of its parts; `metadata` goes into all of their files. Without
    a `table` the parts are those of evaluations. `gpu_share` is the operator's part of its GPU, where it has one. The
    `local_cache` is where trainings find the images that are predicted here.
    """

    workspace: str
    run_id: str
    members: tuple[MemberSpec, ...]
    classes: tuple[str, ...]
    class_of_label: tuple[int | None, ...]
    gives_probabilities: bool
    model_digest: str
    committee: CommitteeOptions
    gate: GateOptions | None
    is_dense: bool
    keep: MemberOutputs
    table: ScoreTable | None = None
    decode_rule: DecodeRule
    outputs: dict[str, str]
    metadata: dict[str, str]
    # Of 0 the operator decodes itself.
    num_decode_threads: int
    num_fetch_threads: int | None
    stall_s: float
    gpu_share: float = Field(default=1.0, gt=0, le=1)
    local_cache: LocalCacheOptions | None = None
