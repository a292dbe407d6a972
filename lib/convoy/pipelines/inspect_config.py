"""What `convoy inspect` is told: which model, on which images, and which pictures."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Self

from pydantic import Field, PositiveInt, model_validator

from convoy.core.config import StrictModel
from convoy.core.embedding import NEAR_DUPLICATE_THRESHOLD
from convoy.core.records import Split
from convoy.core.splits import ChosenSplits
from convoy.pipelines.embedding_maps import MapMethod
from convoy.pipelines.feature_plan import ErrorBudget, ExtractionConfig
from convoy.pipelines.model_choice import PretrainedModel
from convoy.storage.object_store import WriterMode
from convoy.vision.inspection_options import MaximisationOptions


class Section(StrEnum):
    """What an inspection shows."""

    FILTERS = "filters"
    CLASSES = "classes"
    CHANNELS = "channels"
    CAMS = "cams"
    FEATURE_MAPS = "feature_maps"
    NEIGHBOURS = "neighbours"
    EMBEDDING = "embedding"
    NEAR_DUPLICATES = "near_duplicates"


class SampleConfig(StrictModel):
    """The images that are looked at: at most `num_images`, stratified over the classes by a hash with the `seed`.

    Of these `num_shown` are shown, half of them the most confident errors; `sample_ids` are shown instead, of whatever
    split, where they are named. Feature maps are drawn for the first `num_maps` of them.
    """

    num_images: Annotated[int, Field(ge=3, le=100_000)] = 1000
    num_shown: Annotated[int, Field(ge=1, le=64)] = 12
    num_maps: Annotated[int, Field(ge=1, le=16)] = 4
    sample_ids: tuple[str, ...] = Field(default=(), max_length=64)
    seed: int = 0


class EmbeddingConfig(StrictModel):
    """The map of the sample. `tap` of null is where the head reads: a probe's tap, else the last before the logits."""

    tap: str | int | None = None
    methods: tuple[MapMethod, ...] = (MapMethod.PCA,)
    num_neighbours: Annotated[int, Field(ge=1, le=10)] = 6
    seed: int = 0


class DuplicateScope(StrEnum):
    """Among which images near duplicates are looked for."""

    SAMPLE = "sample"
    DATASET = "dataset"  # all splits: finds leaks; features of all images are computed where they are missing


class NearDuplicatesConfig(StrictModel):
    """How near duplicates are found; see `convoy.core.embedding.find_near_duplicates`.

    `taps` of null are the last stages of the three smallest sizes of maps. With the scope `dataset` at most `max_rows`
    images are compared, stratified over the classes: time grows with their square.
    """

    threshold: Annotated[float, Field(gt=0, le=2)] = NEAR_DUPLICATE_THRESHOLD
    scope: DuplicateScope = DuplicateScope.SAMPLE
    taps: tuple[str | int, ...] | None = Field(default=None, min_length=1)
    max_rows: Annotated[int, Field(ge=3)] = 100_000


class InspectConfig(StrictModel):
    """A `bundle` of the workspace or a pretrained `model`, and images of the `splits` of a dataset.

    `stages` (names, numbers or aliases of the depth axis) are looked at for channels, Grad-CAM and feature maps; null
    are the last stage of each size of maps, the four deepest. `channels` are numbers of channels of each of them, null
    the first `num_channels`. At most `num_classes` classes are maximised, the first unless `classes` names some.
    """

    workspace: str | None = None
    writers: WriterMode = WriterMode.MANY
    bundle: str | None = None
    model: PretrainedModel | None = None
    dataset: str
    splits: ChosenSplits = Field(default=(Split.TEST,), min_length=1)
    sections: tuple[Section, ...] = Field(default=tuple(Section), min_length=1)
    sample: SampleConfig = SampleConfig()
    stages: tuple[str | int, ...] | None = Field(default=None, min_length=1, max_length=16)
    classes: tuple[str, ...] | None = Field(default=None, min_length=1, max_length=200)
    num_classes: PositiveInt = 20
    channels: tuple[int, ...] | None = Field(default=None, min_length=1, max_length=200)
    num_channels: Annotated[int, Field(ge=1, le=64)] = 8
    maximisation: MaximisationOptions = MaximisationOptions()
    embedding: EmbeddingConfig = EmbeddingConfig()
    near_duplicates: NearDuplicatesConfig = NearDuplicatesConfig()
    extraction: ExtractionConfig = ExtractionConfig()
    error_budget: ErrorBudget = ErrorBudget()

    @model_validator(mode="after")
    def _one_model(self) -> Self:
        if (self.bundle is None) == (self.model is None):
            raise ValueError("give either bundle or model")
        return self
