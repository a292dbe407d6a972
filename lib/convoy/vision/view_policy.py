"""How views are drawn, as a value, and what of it determines their pixels. Free of torch."""

from __future__ import annotations

from typing import Any

from pydantic import Field, model_validator

from convoy.core.config import StrictModel
from convoy.vision.presets import EvalPreset

EVAL_VIEW = 0
# Raised when the same recipe would give other pixels.
_RECIPE_VERSION = 1


class ViewPolicy(StrictModel):
    """How views 1, 2, … are drawn: share of the image's area, aspect ratio (width / height), mirror, seed."""

    mirror_probability: float = Field(default=0.5, ge=0, le=1)
    crop_area: tuple[float, float] = (0.35, 1.0)
    crop_aspect: tuple[float, float] = (3 / 4, 4 / 3)
    seed: int = 0

    @model_validator(mode="after")
    def _ranges_ascend(self) -> ViewPolicy:
        if not 0 < self.crop_area[0] <= self.crop_area[1] <= 1:
            raise ValueError("crop_area must be an ascending range inside 0..1")
        if not 0 < self.crop_aspect[0] <= self.crop_aspect[1]:
            raise ValueError("crop_aspect must be an ascending range above 0")
        return self


def view_recipe(preset: EvalPreset, policy: ViewPolicy | None, view: int) -> dict[str, Any]:
    """All that determines a view's uint8 pixels beside the image, for cache keys. View 0 knows no policy."""
    recipe = {
        "recipe_version": _RECIPE_VERSION,
        "view": view,
        **preset.model_dump(mode="json", include={"resize_px", "crop_px", "interpolation"}),
    }
    if view != EVAL_VIEW and policy is not None:
        recipe["policy"] = policy.model_dump(mode="json")
    return recipe
