"""The config of `convoy retrain`, and what it reports."""

from __future__ import annotations

from datetime import UTC, date, datetime
from enum import StrEnum
from typing import Any

from pydantic import Field, PositiveFloat, PositiveInt, field_validator

from convoy.cluster.training import WorkerOptions
from convoy.core.config import StrictModel
from convoy.core.drift import EmbeddingShift
from convoy.core.errors import ExitCode
from convoy.core.splits import SplitOptions
from convoy.core.tracking import MirrorConfig
from convoy.pipelines.feature_plan import ExtractionConfig
from convoy.pipelines.retrain_gate import GateConfig, GateEvidence
from convoy.storage.object_store import WriterMode
from convoy.storage.sources.rows import ReadingOptions
from convoy.vision.augmentation_policy import AugmentationPolicy
from convoy.vision.backbone_config import BackboneConfig
from convoy.vision.head_config import HeadConfig
from convoy.vision.training_config import Recipe


class RetrainMode(StrEnum):
    """`promote` moves the champion where the gate says so; `shadow` scores both models and moves none."""

    PROMOTE = "promote"
    SHADOW = "shadow"


class WhenFound(StrEnum):
    """What a finding in the new data does: `hold` trains nothing and asks a person, `note` goes on and says so."""

    HOLD = "hold"
    NOTE = "note"


class DataChecks(StrictModel):
    """What new data may look like. Rates are in 0..1; checks with fewer than `min_rows` new rows are left out.

    `max_reject_rate`: of the new rows, those that could not be used. `max_class_shift`: total variation distance of
    the new rows' classes from the old ones'. `max_embedding_shift`: distance of the new embeddings from the old ones,
    in their spread. `max_label_drop`: how much less often than on the holdout the champion agrees with new labels.
    Rejects and labels are looked at in all new rows together, and in those of each date that was held for them.
    `max_removed_rate`: of the rows that the champion was made from, of the frozen holdout and of each of its classes,
    those that are gone; of the holdout, a larger loss that a champion was promoted after counts no more. Classes that
    are gone are those that the champion knows and the dataset has not.
    """

    min_rows: PositiveInt = 20
    max_reject_rate: float = Field(default=0.2, ge=0, le=1)
    when_rejects: WhenFound = WhenFound.HOLD
    max_class_shift: float = Field(default=0.5, ge=0, le=1)
    when_classes_shift: WhenFound = WhenFound.NOTE
    max_embedding_shift: PositiveFloat = 0.5
    when_embeddings_shift: WhenFound = WhenFound.NOTE
    max_label_drop: float = Field(default=0.3, ge=0, le=1)
    when_labels_disagree: WhenFound = WhenFound.HOLD
    when_new_classes: WhenFound = WhenFound.NOTE
    max_removed_rate: float = Field(default=0.2, ge=0, le=1)
    when_rows_removed: WhenFound = WhenFound.HOLD
    when_classes_gone: WhenFound = WhenFound.HOLD


class FineTuneSettings(StrictModel):
    """How the network of `backbone` is fine-tuned where a new head is not enough; keys as in `convoy train`."""

    epochs: PositiveInt | None = None
    freeze_depth: int | str | None = None
    learning_rate: PositiveFloat | None = None
    recipe: Recipe = Recipe()
    augmentation: AugmentationPolicy = AugmentationPolicy()
    workers: WorkerOptions = WorkerOptions()


class RetrainConfig(StrictModel):
    """A model that is kept up to date with a dataset.

    `source` is frozen anew as `dataset` each time, as by `convoy dataset`, and what `splits` do not tell stays as
    it is; without it the dataset's current version is taken. `backbone`, `tap` and `head` make the first champion;
    later heads are on the champion's network and tap. `fine_tune` allows training `backbone` anew from its own weights,
    where a new head does not pass the gate and `gate.max_cost_ratio` allows that network. `mirror` shows the aliases to
    MLflow.
    """

    workspace: str | None = None
    writers: WriterMode = WriterMode.MANY
    name: str
    dataset: str
    source: str | None = None
    reading: ReadingOptions = ReadingOptions()
    splits: SplitOptions = SplitOptions()
    date: str | None = None
    mode: RetrainMode = RetrainMode.PROMOTE
    backbone: BackboneConfig
    tap: str | int = "pooled"
    head: HeadConfig = HeadConfig()
    fine_tune: FineTuneSettings | None = None
    checks: DataChecks = DataChecks()
    gate: GateConfig = GateConfig()
    extraction: ExtractionConfig = ExtractionConfig()
    mirror: MirrorConfig = MirrorConfig()

    @field_validator("date", mode="before")
    @classmethod
    def _is_a_date(cls, value: Any) -> Any:
        """YAML reads a bare date as one."""
        if value is None:
            return None
        return date.fromisoformat(str(value)).isoformat()

    @property
    def logical_date(self) -> str:
        """The date that is retrained for: the given one, or today in UTC."""
        return self.date or datetime.now(UTC).date().isoformat()


class Decision(StrEnum):
    """How a retraining ended."""

    NOTHING_NEW = "nothing_new"
    PROMOTED = "promoted"
    HELD = "held"
    ROLLED_BACK = "rolled_back"
    SHADOW = "shadow"


class NewData(StrictModel):
    """What is new since the version that the champion was made from, and what the checks found in it.

    `rows` are of all splits. `notes` are findings that do not hold a retraining, `objections` those that do. Null
    where it was not measured.
    """

    rows: int
    removed: int
    usable: int
    by_class: dict[str, int]
    new_classes: list[str]
    class_shift: float
    embedding_shift: EmbeddingShift | None
    champion_top1: float | None
    notes: list[str]
    objections: list[str]


class StepResult(StrictModel):
    """One attempt at a better model: what was done, which bundle came of it, and what the gate said.

    With `is_champion` the bundle is the champion, bit for bit, and the gate was not asked.
    """

    step: str
    candidate: str
    train_rows: int
    evidence: GateEvidence | None
    reason: str
    is_champion: bool = False

    @property
    def passed(self) -> bool:
        """Whether the gate was asked, and has no objection."""
        return self.evidence is not None and self.evidence.passed


class RetrainReport(StrictModel):
    """The decision of a logical date, and what it rests on.

    `recomputed` counts rows whose features had to be computed, restarts included. `champion` is the one after the
    decision; `evidence` is that of the last step.
    """

    decision: Decision
    reason: str
    recomputed: int
    date: str
    model: str
    dataset_fingerprint: str
    candidate: str | None = None
    champion: str | None = None
    previous: str | None = None
    holdout_rows: int = 0
    data: NewData | None = None
    steps: list[StepResult] = Field(default_factory=list)
    notes: list[str] = Field(default_factory=list)
    seconds: float = 0.0

    @property
    def process_exit_code(self) -> ExitCode:
        """What a scheduler is told: a decision that wants a person's eyes is no success."""
        refused = (Decision.HELD, Decision.ROLLED_BACK)
        return ExitCode.REFUSED_BY_GATE if self.decision in refused else ExitCode.OK
