"""The config of `convoy train`, and what must hold of it before anything is read."""

from __future__ import annotations

from collections.abc import Collection
from enum import StrEnum
from typing import Self

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from convoy.cluster.training import WorkerOptions
from convoy.core.config import StrictModel
from convoy.core.tracking import TrackingConfig
from convoy.pipelines.classifiers import Strategy
from convoy.pipelines.feature_plan import ErrorBudget, ExtractionConfig, PrecisionChoice
from convoy.pipelines.training_rows import RowLimit
from convoy.storage.local_cache import LocalCacheOptions
from convoy.storage.object_store import WriterMode
from convoy.vision.augmentation_policy import AugmentationPolicy
from convoy.vision.backbone_config import BackboneConfig, NewLayers
from convoy.vision.head_config import HeadConfig, HeadKind
from convoy.vision.training_config import AUTO, Distillation, Phase, Recipe, RecipeChanges, TrainingPrecision

PROBES = (Strategy.LINEAR_PROBE, Strategy.EARLY_LAYER_PROBE)
NETWORKS = (Strategy.PARTIAL_REUSE, Strategy.FINE_TUNE, Strategy.FROM_SCRATCH)

# The keys that some strategies use and others do not; all other keys are for every strategy.
_OF_LEARNERS = frozenset({"views", "augmentation", "head", "distill"})
_KEYS_OF = {
    Strategy.AS_IS: frozenset({"classes", "class_map"}),
    **dict.fromkeys(PROBES, _OF_LEARNERS | {"tap", "recipe"}),
    **dict.fromkeys(
        NETWORKS,
        _OF_LEARNERS
        | {"epochs", "freeze_depth", "learning_rate", "phases", "recipe", "head_source", "reuse"}
        | {"checkpoint_steps", "checkpoint_minutes", "workers", "local_cache"},
    ),
}


class HeadSource(StrEnum):
    """How a phase that trains only the head gets its features.

    `cache`: computed once, kept in the feature cache, and fitted from there. `network`: through the frozen
    body, anew in every epoch. `auto`: from the cache where the head is one linear layer and the phase is the one that a
    fine-tuning begins with by itself, since a fit has no rate, epochs or schedule, and where there is one value of C or
    validation rows choose it; else through the body.
    """

    AUTO = "auto"
    CACHE = "cache"
    NETWORK = "network"


class LocalCacheConfig(StrictModel):
    """The bounded cache of image bytes on each node's disk; `max_gb: 0` turns it off.

    It serves datasets in object storage, and parquet files wherever they lie, where an image costs its row group: later
    epochs ask only for what did not fit. A tenth of the disk stays free. Name no `folder` that somebody may write to
    whom you do not trust; without one each user has one in what a node has for temporary files.
    """

    folder: str | None = None
    max_gb: float = Field(default=16.0, ge=0)

    @property
    def options(self) -> LocalCacheOptions | None:
        """What workers are told; None where it is off."""
        return (
            LocalCacheOptions(folder=self.folder, max_bytes=int(self.max_gb * 1e9)) if self.max_gb else None
        )


class DistillConfig(Distillation):
    """Learn from what another model says of the training images, as well as from their labels.

    `teacher` is a bundle, of one model or an ensemble, that knows the dataset's classes.
    """

    teacher: str


class TrainConfig(StrictModel):
    """A way to use a network on a dataset. `name` is that of the bundle.

    Which keys matter depends on `strategy`; a note names those that are set and do not. `as_is`: `classes` names the
    outputs in order where the weights do not, `class_map` gives dataset classes for outputs; no other strategy takes
    them. Probes: `tap`, `views`, `head`, and of `recipe` the `balance`: all its kinds weigh the rows of the fit by
    class. Networks: `epochs`, `freeze_depth` and `learning_rate`, or else `phases`;
    `recipe` (what is set there replaces the default's), `head` for a head that is fitted from the cache; `reuse` is
    for `partial_reuse` only. `distill` names a teacher for networks and softmax heads. Their checkpoints are
    `checkpoint_steps` apart, or `checkpoint_minutes` where that is sooner.
    """

    workspace: str | None = None
    writers: WriterMode = WriterMode.MANY
    name: str
    dataset: str
    strategy: Strategy = Strategy.LINEAR_PROBE
    backbone: BackboneConfig
    rows: RowLimit = RowLimit()
    classes: tuple[str, ...] | None = None
    class_map: dict[str, str] | None = None
    tap: str | int | None = None
    views: int = Field(default=1, ge=1)
    augmentation: AugmentationPolicy = AugmentationPolicy()
    head: HeadConfig = HeadConfig()
    reuse: NewLayers | None = None
    distill: DistillConfig | None = None
    epochs: PositiveInt | None = None
    freeze_depth: int | str | None = None
    learning_rate: PositiveFloat | None = None
    phases: tuple[Phase, ...] | None = Field(default=None, min_length=1)
    recipe: RecipeChanges = Recipe()
    head_source: HeadSource = HeadSource.AUTO
    checkpoint_steps: PositiveInt = 200
    checkpoint_minutes: PositiveFloat = 10.0
    workers: WorkerOptions = WorkerOptions()
    local_cache: LocalCacheConfig = LocalCacheConfig()
    tracking: TrackingConfig = TrackingConfig()
    extraction: ExtractionConfig = ExtractionConfig()
    error_budget: ErrorBudget = ErrorBudget()

    @model_validator(mode="after")
    def _keys_fit_the_strategy(self) -> Self:
        if self.strategy is not Strategy.AS_IS and (self.classes, self.class_map) != (None, None):
            raise ValueError(
                f"classes and class_map are for as_is: under {self.strategy.value} the classes are the dataset's"
            )
        if self.strategy is Strategy.EARLY_LAYER_PROBE and self.tap is None:
            raise ValueError("early_layer_probe needs a tap: the name or number of a stage, such as layer2")
        if (self.reuse is not None) != (self.strategy is Strategy.PARTIAL_REUSE):
            raise ValueError("partial_reuse needs `reuse: {after: STAGE}`, and no other strategy takes it")
        if self.phases is not None and {self.epochs, self.freeze_depth, self.learning_rate} != {None}:
            raise ValueError("give either phases, or epochs, freeze_depth and learning_rate")
        names = [phase.name for phase in self.phases or ()]
        if len(set(names)) < len(names):
            raise ValueError("every phase needs a name of its own")
        if self.distill is not None and not self._can_be_taught:
            raise ValueError("distill teaches networks and softmax heads: change strategy or head.kind")
        if self.strategy is Strategy.FINE_TUNE and self.head.kind is not HeadKind.SOFTMAX:
            raise ValueError("fine_tune begins with a softmax head: leave head.kind out")
        return self

    @property
    def may_fit_head(self) -> bool:
        """Whether a first phase of the head alone may be a fit on cached features: unasked, that of a fine-tuning."""
        if self.head_source is HeadSource.AUTO:
            return self.strategy is Strategy.FINE_TUNE and self.phases is None
        return self.head_source is HeadSource.CACHE

    @property
    def unused_keys_notes(self) -> tuple[str, ...]:
        """What is set, and changes nothing of such a training. No error, as the trials of a search may share it."""
        of_others = frozenset[str]().union(*_KEYS_OF.values()) - _KEYS_OF[self.strategy]
        notes = []
        unused = _set_among(self, of_others)
        if self.strategy in PROBES:
            of_networks = Recipe.model_fields.keys() - {"balance"}
            unused += [f"recipe.{key}" for key in _set_among(self.recipe, of_networks)]
        if unused:
            default = (
                "" if "strategy" in self.model_fields_set else ", the default where no strategy is named"
            )
            notes.append(f"without effect under {self.strategy.value}{default}: {', '.join(unused)}")
        if self.strategy is Strategy.AS_IS and self.rows.max_per_class and self.rows.fold is None:
            notes.append(
                "without effect where no row is learnt from, nor a fold measured: rows.max_per_class"
            )
        if self.strategy in PROBES and self.views == 1 and _set_among(self, {"augmentation"}):
            notes.append("without effect where views is 1, as view 0 is never augmented: augmentation")
        fits_no_head = self.strategy in NETWORKS and not self.may_fit_head
        if fits_no_head and (unused := _set_among(self, {"head", "views"})):
            notes.append(
                f"without effect unless a head is fitted from the cache (head_source): {', '.join(unused)}"
            )
        return tuple(notes)

    @property
    def _can_be_taught(self) -> bool:
        return self.strategy in NETWORKS or (self.strategy in PROBES and self.head.kind is HeadKind.SOFTMAX)

    @property
    def wanted_tap(self) -> str | int:
        """The tap whose features a probe learns from."""
        return "pooled" if self.tap is None else self.tap

    @property
    def network_extraction(self) -> ExtractionConfig:
        """How a network that was trained is measured and served: a precision of `auto` is that of the recipe.

        It stays `auto` where the recipe's is, or is fp16, in which no features are computed.
        """
        told = self.recipe.precision
        if self.extraction.precision is not PrecisionChoice.AUTO or told is TrainingPrecision.FP16:
            return self.extraction
        return self.extraction.model_copy(update={"precision": PrecisionChoice(told.value)})

    @property
    def wanted_freeze_depth(self) -> int | str:
        """The freeze depth of the config, or the strategy's own: nothing new has to be spared from scratch."""
        if self.freeze_depth is not None:
            return self.freeze_depth
        return 0 if self.strategy is Strategy.FROM_SCRATCH else AUTO


def _set_among(model: StrictModel, keys: Collection[str]) -> list[str]:
    """Which of the keys have another value than their default, sorted."""
    fields = type(model).model_fields
    return [
        key
        for key in sorted(keys)
        if getattr(model, key) != fields[key].get_default(call_default_factory=True)
    ]
