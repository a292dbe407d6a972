"""The augmentation sheet of a page: a few images of the dataset, as evaluation and as the run's policy shows them."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from convoy.core.config import StrictModel
from convoy.core.errors import ConfigError
from convoy.pipelines.cache import CacheConfig
from convoy.pipelines.report_images import ShownImage, read_rule
from convoy.pipelines.train_config import TrainConfig
from convoy.storage.datasets import open_dataset
from convoy.storage.object_store import ObjectStore
from convoy.storage.runs import RunRecord
from convoy.vision.augmentation_policy import AugmentationPolicy

_NUM_IMAGES, _NUM_DRAWS = 6, 6
_SIDE_PX = 96


class SheetLine(StrictModel):
    """An image of a class: the eval view, then the draws."""

    label: str
    images: list[ShownImage]


class AugmentationSheet(StrictModel):
    """What a policy does to images of the train split; the first column is the eval view."""

    policy: dict[str, Any]
    columns: list[str]
    lines: list[SheetLine]


def read_sheet(store: ObjectStore, record: RunRecord, fingerprint: str) -> AugmentationSheet | None:
    """The sheet of a training, or of a cache job of several views; None for other runs.

    Raises ConfigError where the colours of the train split, which the policy needs, were never measured or are
    gone, and what `draw_views` raises.
    """
    config = _augmented(record)
    if config is None:
        return None
    # Imports torch, which a run without augmentation need not wait for.
    from convoy.pipelines.backbone_loading import backbone_preset  # noqa: PLC0415
    from convoy.pipelines.pixel_statistics import known_augmentation  # noqa: PLC0415
    from convoy.pipelines.report_augmentation import AugmentedJob, SheetSize, draw_views  # noqa: PLC0415
    from convoy.vision.thumbnails import encode_jpeg  # noqa: PLC0415

    rule = read_rule(record.config)
    manifest = open_dataset(store, config.dataset, fingerprint)
    policy = known_augmentation(store, manifest, config.dataset, config.augmentation, rule)
    if policy is None:
        raise ConfigError("the colours that its policy shifts along were not measured in this workspace")
    job = AugmentedJob(
        workspace=store.root_uri,
        dataset=config.dataset,
        preset=backbone_preset(config.backbone),
        policy=policy,
        decode_rule=rule,
    )
    shown, _ = draw_views(job, manifest, SheetSize(num_images=_NUM_IMAGES, num_views=_NUM_DRAWS))
    names = [*manifest.classes, "(no label)"]
    side_px = job.preset.crop_px
    return AugmentationSheet(
        policy=policy.model_dump(mode="json", exclude_none=True),
        columns=["evaluation", *(f"draw {draw}" for draw in range(1, _NUM_DRAWS + 1))],
        lines=[
            SheetLine(
                label=names[one.label],
                images=[
                    ShownImage(
                        sample_id=one.sample_id,
                        jpeg=encode_jpeg(image_CHW, side_px=_SIDE_PX),
                        width_px=side_px,
                        height_px=side_px,
                    )
                    for image_CHW in one.images_BCHW
                ],
            )
            for one in shown
        ],
    )


def _augmented(record: RunRecord) -> TrainConfig | CacheConfig | None:
    """The config of a run that shows images augmented."""
    try:
        if record.verb == "train":
            config = TrainConfig.model_validate(record.config)
            return config if config.augmentation != AugmentationPolicy.ready("none") else None
        if record.verb == "cache" and record.config.get("request", {}).get("views", 1) > 1:
            return CacheConfig.model_validate(
                {**record.config["request"], "extraction": record.config["extraction"]}
            )
    except ValidationError as error:
        raise ConfigError(
            f"the run's config is of another version of Convoy: {error.error_count()} keys do not fit"
        ) from None
    return None
