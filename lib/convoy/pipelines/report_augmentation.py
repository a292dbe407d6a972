"""`convoy report augmentation`: images of the user's own dataset, as evaluation and as the policy shows them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import torch
from pydantic import Field

from convoy.core.config import StrictModel, parse_config
from convoy.core.errors import ConfigError, DataError
from convoy.core.progress import Progress
from convoy.core.records import SampleRejected, Split
from convoy.pipelines.backbone_loading import backbone_preset
from convoy.pipelines.cache import CacheConfig
from convoy.pipelines.config_files import read_job_settings
from convoy.pipelines.pixel_statistics import resolve_augmentation
from convoy.pipelines.stratified_sample import labels_of, stratified_rows
from convoy.pipelines.train_config import TrainConfig
from convoy.pipelines.workspace import workspace_store
from convoy.storage.datasets import open_dataset
from convoy.storage.manifests import Manifest
from convoy.storage.samples import SampleReader
from convoy.vision.augmentation_policy import AugmentationPolicy
from convoy.vision.contact_sheet import SheetRow, draw_contact_sheet
from convoy.vision.decode_rule import DecodeRule
from convoy.vision.decoding import decode_image, quiet_decoders
from convoy.vision.presets import EvalPreset
from convoy.vision.views import prepare_view

# Keys that a training has and a cache job has not.
_TRAIN_KEYS = frozenset({"strategy", "name"})


class AugmentedJob(StrictModel):
    """All that a sheet needs of a job's config."""

    workspace: str | None
    dataset: str
    preset: EvalPreset
    policy: AugmentationPolicy
    decode_rule: DecodeRule


class SheetSize(StrictModel):
    """Rows of the sheet, and draws of the policy beside the eval view."""

    num_images: int = Field(default=8, ge=1, le=64)
    num_views: int = Field(default=7, ge=1, le=32)


class SheetImage(StrictModel):
    """One row of the sheet."""

    sample_id: str
    label: str


@dataclass(frozen=True, slots=True, eq=False)
class ShownViews:
    """An image, and its views in the order of the columns. The label is -1 where it has none."""

    sample_id: str
    label: int
    images_BCHW: torch.Tensor


class AugmentationReport(StrictModel):
    """Where the sheet is, the policy that it shows, and its rows; `rejects` are images that could not be shown."""

    output: str
    dataset: str
    policy: dict[str, Any]
    draws: int
    rejects: int
    images: list[SheetImage]


def read_augmented_job(
    path: str | None, overrides: Sequence[str], workspace: str | None = None
) -> AugmentedJob:
    """What a sheet needs of the config of `convoy train` (it has a name or a strategy) or of `convoy cache`.

    Raises ConfigError as the job itself would.
    """
    settings = read_job_settings(path, overrides)
    model: type[TrainConfig | CacheConfig] = TrainConfig if _TRAIN_KEYS & settings.keys() else CacheConfig
    config = parse_config(model, settings, where=path or "--set")
    return AugmentedJob(
        workspace=workspace or config.workspace,
        dataset=config.dataset,
        preset=backbone_preset(config.backbone),
        policy=config.augmentation,
        decode_rule=config.extraction.decode,
    )


def draw_augmentation(
    job: AugmentedJob, output: str, size: SheetSize, *, progress: Progress
) -> AugmentationReport:
    """Draw a sheet of train images, stratified over the classes, and write it as PNG to a local path.

    The first column is the eval view; column k shows view k of the feature cache, which is one draw of the
    policy like those that training makes. Raises DataError where no image of the train split can be shown.
    """
    store = workspace_store(job.workspace)
    manifest = open_dataset(store, job.dataset)
    policy = resolve_augmentation(store, manifest, job.dataset, job.policy, job.decode_rule, progress)
    progress.stage("drawing the sheet")
    shown, num_rejects = draw_views(job.model_copy(update={"policy": policy}), manifest, size)
    names = [*manifest.classes, "(no label)"]
    _write_png(shown, names, size.num_views, output)
    return AugmentationReport(
        output=output,
        dataset=job.dataset,
        policy=policy.model_dump(mode="json", exclude_none=True),
        draws=size.num_views,
        rejects=num_rejects,
        images=[SheetImage(sample_id=image.sample_id, label=names[image.label]) for image in shown],
    )


def draw_views(job: AugmentedJob, manifest: Manifest, size: SheetSize) -> tuple[list[ShownViews], int]:
    """Images of the train split in all views, sorted by class, and how many more could not be shown.

    The policy must have its basis of colours. Raises DataError where no image can be shown.
    """
    # Some of them may not be readable.
    candidates = stratified_rows(manifest, 2 * size.num_images, splits=[Split.TRAIN], purpose="contact sheet")
    shown, num_rejects = _draw_rows(job, candidates, size)
    if not shown:
        raise DataError(
            f"none of {candidates.num_rows} images of the train split can be shown",
            where=manifest.uri,
            next_step="look at why with `convoy cache`",
        )
    return shown, num_rejects


def _draw_rows(job: AugmentedJob, candidates: pa.Table, size: SheetSize) -> tuple[list[ShownViews], int]:
    """The first candidates that can be shown, sorted by class, and how many of them could not."""
    quiet_decoders()
    shown: list[ShownViews] = []
    num_rejects = 0
    samples = candidates.select(["sample_id", "content_id"]).to_pylist()
    labels_N = labels_of(candidates)
    for row, data in SampleReader(max_bytes=job.decode_rule.max_bytes).read(candidates):
        if len(shown) == size.num_images:
            break
        try:
            images_BCHW = _draw_views(job, data, samples[row]["content_id"], size.num_views)
        except SampleRejected:
            num_rejects += 1
            continue
        shown.append(ShownViews(samples[row]["sample_id"], int(labels_N[row]), images_BCHW))
    return sorted(shown, key=lambda image: image.label), num_rejects


def _draw_views(
    job: AugmentedJob, data: bytes | SampleRejected, content_id: bytes, num_views: int
) -> torch.Tensor:
    """The eval view and the draws, uint8 of shape (1 + draws, 3, side, side)."""
    if isinstance(data, SampleRejected):
        raise data
    pixels_CHW = decode_image(data, job.decode_rule).pixels_CHW
    side_px = job.preset.crop_px
    images_BCHW = torch.empty(1 + num_views, 3, side_px, side_px, dtype=torch.uint8)
    for view, image_CHW in enumerate(images_BCHW):
        prepare_view(pixels_CHW, job.preset, image_CHW, view=view, policy=job.policy, content_id=content_id)
    return images_BCHW


def _write_png(shown: Sequence[ShownViews], names: Sequence[str], num_views: int, output: str) -> None:
    rows = [SheetRow(name=names[image.label], images_BCHW=image.images_BCHW) for image in shown]
    sheet = draw_contact_sheet(rows, ["evaluation", *(f"draw {view}" for view in range(1, num_views + 1))])
    try:
        sheet.save(output, "PNG")
    except OSError as error:
        raise ConfigError(
            f"the sheet cannot be written: {error}", where=output, next_step="choose another --output"
        ) from error
