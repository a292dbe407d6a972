"""How training images and views 1, 2, … are drawn, as one value, and what of it goes into cache keys. Free of torch.

Each kind has a section with its strength; a section that is null is off. Lengths in pixels count in the crop.
Borders that a kind uncovers show the mean colour of the preset.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Annotated, Any

from pydantic import AfterValidator, Field, model_validator

from convoy.core.config import StrictModel
from convoy.core.errors import ConfigError
from convoy.vision.presets import EvalPreset

EVAL_VIEW = 0
# Raised when the same recipe would give other pixels: of the eval view, of all other views, of those that are warped.
_EVAL_RECIPE_VERSION = 1
_DRAWN_RECIPE_VERSION = 2
_WARPED_RECIPE_VERSION = 3


def _ascending(bounds: tuple[float, float]) -> tuple[float, float]:
    if not 0 < bounds[0] <= bounds[1]:
        raise ValueError("must be an ascending range above 0")
    return bounds


def _within_one(bounds: tuple[float, float]) -> tuple[float, float]:
    if bounds[1] > 1:
        raise ValueError("must be a range inside 0..1")
    return bounds


Probability = Annotated[float, Field(ge=0, le=1)]
Range = Annotated[tuple[float, float], AfterValidator(_ascending)]
Shares = Annotated[Range, AfterValidator(_within_one)]
_Vector = tuple[float, float, float]


class CropKind(StrEnum):
    """Where the crop comes from.

    `random_resized`: a random box of the image, resized to the crop (Szegedy et al. 2015, arXiv:1409.4842).
    `random`: a random place of the image, resized as for evaluation and padded (He et al. 2016, section 4.2).
    `eval`: the crop of the preset, the same every time.
    """

    RANDOM_RESIZED = "random_resized"
    RANDOM = "random"
    EVAL = "eval"


class Padding(StrEnum):
    """What lies around an image that is padded."""

    BLACK = "black"
    REFLECT = "reflect"


class Crop(StrictModel):
    """`area` (share of the image) and `aspect` (width / height) are those of `random_resized`.

    `padding_px` on each side and `padding` are those of `random`.
    """

    kind: CropKind = CropKind.RANDOM_RESIZED
    area: Shares = (0.35, 1.0)
    aspect: Range = (3 / 4, 4 / 3)
    padding_px: int = Field(default=4, ge=0)
    padding: Padding = Padding.BLACK


class Mirror(StrictModel):
    """Left and right change places in this share of the images."""

    probability: Probability = 0.5


class Rotation(StrictModel):
    """A turn about the centre by up to `degrees` either way, uniform."""

    degrees: float = Field(default=15.0, ge=0, le=180)
    probability: Probability = 1.0


class Shear(StrictModel):
    """A slant along x by up to `degrees` either way, uniform."""

    degrees: float = Field(default=10.0, ge=0, le=60)
    probability: Probability = 1.0


class Elastic(StrictModel):
    """Local warping (Simard, Steinkraus and Platt 2003, section 2): smooth random displacements.

    `displacement_px` is the root mean square along each axis; `sigma_px` is the Gaussian that smooths the
    field, about the size of what moves together. The paper's alpha is displacement_px * sigma_px * sqrt(12 pi).
    """

    displacement_px: float = Field(default=2.0, ge=0)
    sigma_px: float = Field(default=8.0, gt=0)
    probability: Probability = 1.0


class Perspective(StrictModel):
    """Each corner moves inwards by up to `distortion` of the half side, as in torchvision's RandomPerspective."""

    distortion: float = Field(default=0.3, ge=0, le=1)
    probability: Probability = 1.0


class ColourShift(StrictModel):
    """Each channel gets its own constant, uniform up to `levels` of 255 either way."""

    levels: float = Field(default=20.0, ge=0, le=255)
    probability: Probability = 1.0


class PcaBasis(StrictModel):
    """Principal components of RGB pixels scaled to 0..1, largest eigenvalue first; eigenvectors are unit rows."""

    eigenvalues: _Vector
    eigenvectors: tuple[_Vector, _Vector, _Vector]


# A basis that changes no pixel.
NO_COLOURS = PcaBasis(eigenvalues=(0, 0, 0), eigenvectors=((1, 0, 0), (0, 1, 0), (0, 0, 1)))


class PcaColour(StrictModel):
    """Krizhevsky, Sutskever and Hinton 2012, section 4.1: to each pixel add sum_i alpha_i lambda_i p_i.

    The alpha_i are normal with standard deviation `strength`, drawn once an image. Jobs fit the `basis` to the
    train split where it is null.
    """

    strength: float = Field(default=0.1, ge=0)
    basis: PcaBasis | None = None
    probability: Probability = 1.0


class ColourJitter(StrictModel):
    """Factors uniform in 1 ± strength, and a turn of the hue up to `hue` (0.5: any) either way; in random order."""

    brightness: float = Field(default=0.2, ge=0)
    contrast: float = Field(default=0.2, ge=0)
    saturation: float = Field(default=0.2, ge=0)
    hue: float = Field(default=0.0, ge=0, le=0.5)
    probability: Probability = 1.0


class Grey(StrictModel):
    """This share of the images loses its colours."""

    probability: Probability = 0.1


class Erasing(StrictModel):
    """A random box takes the mean colour (Zhong et al. 2017, arXiv:1708.04896).

    `area` is its share of the crop, `aspect` its width / height; what would reach beyond the crop is cut off.
    """

    probability: Probability = 0.25
    area: Shares = (0.02, 0.33)
    aspect: Range = (0.3, 3.3)


class AutomaticKind(StrEnum):
    """Policies that draw operations from a fixed space.

    `rand_augment`: `num_ops` operations of one `magnitude` (Cubuk et al. 2019, arXiv:1909.13719).
    `trivial_augment`: one operation of random magnitude (Müller and Hutter 2021, arXiv:2103.10158, Wide).
    """

    RAND_AUGMENT = "rand_augment"
    TRIVIAL_AUGMENT = "trivial_augment"


class Automatic(StrictModel):
    """`num_ops` and `magnitude` (30 is the strongest) are those of `rand_augment`."""

    kind: AutomaticKind = AutomaticKind.TRIVIAL_AUGMENT
    num_ops: int = Field(default=2, ge=0)
    magnitude: int = Field(default=9, ge=0, le=30)
    probability: Probability = 1.0


# Ready policies, by what they set beside the defaults of `AugmentationPolicy`, which are `light`.
READY_POLICIES: Mapping[str, Mapping[str, Any]] = {
    # The eval view, for measuring what augmentation brings.
    "none": {"crop": {"kind": "eval"}, "mirror": None},
    "light": {},
    # The crop and mirror of CIFAR training (He et al. 2016, section 4.2).
    "cifar": {"crop": {"kind": "random"}},
    # What torchvision's newer weights were trained with, at its smallest crop area for fine-tuning.
    "standard": {"automatic": {"kind": "trivial_augment"}, "erasing": {"probability": 0.1}},
}


class AugmentationPolicy(StrictModel):
    """One declared policy for training and for the views of the feature cache.

    In a config it is written by its sections, by the name of a ready policy (`augmentation: standard`), or by
    both: `augmentation: {base: standard, rotation: {degrees: 5}}`. What is written of a section that the base has
    changes that only, unless it is of another kind. Sections are applied in the order of the fields.
    """

    seed: int = 0
    crop: Crop = Crop()
    mirror: Mirror | None = Mirror()
    rotation: Rotation | None = None
    shear: Shear | None = None
    perspective: Perspective | None = None
    elastic: Elastic | None = None
    automatic: Automatic | None = None
    colour_jitter: ColourJitter | None = None
    colour_shift: ColourShift | None = None
    pca_colour: PcaColour | None = None
    grey: Grey | None = None
    erasing: Erasing | None = None

    @model_validator(mode="before")
    @classmethod
    def _start_from_a_ready_policy(cls, given: Any) -> Any:
        if isinstance(given, str):
            given = {"base": given}
        if not isinstance(given, dict) or "base" not in given:
            return given
        base = given["base"]
        if base not in READY_POLICIES:
            raise ValueError(f"there is no ready policy '{base}', only: {', '.join(READY_POLICIES)}")
        ready = READY_POLICIES[base]
        own = {key: _changed(ready.get(key), section) for key, section in given.items() if key != "base"}
        return {**ready, **own}

    @classmethod
    def ready(cls, name: str) -> AugmentationPolicy:
        """The ready policy of a name: `none`, `light`, `cifar` or `standard`."""
        return cls.model_validate(name)

    @property
    def lacks_basis(self) -> bool:
        """Whether the principal colours of a dataset have to be filled in before the policy can be drawn from."""
        pca = self.pca_colour
        return pca is not None and pca.basis is None and pca.strength > 0 and pca.probability > 0

    def with_basis(self, basis: PcaBasis) -> AugmentationPolicy:
        """The same policy with these principal colours, where it has a `pca_colour`."""
        if self.pca_colour is None:
            return self
        return self.model_copy(update={"pca_colour": self.pca_colour.model_copy(update={"basis": basis})})

    def require_basis(self) -> None:
        """Raise ConfigError if the principal colours are lacking."""
        if self.lacks_basis:
            raise ConfigError(
                "pca_colour needs the principal colours of a dataset, and the policy has none",
                where="augmentation.pca_colour.basis",
                next_step="`convoy cache` and `convoy report augmentation` fit them to the train split; or write"
                " the basis into the config",
            )


def _changed(ready: Any, section: Any) -> Any:
    """A section of a ready policy with what a config says of it."""
    if not (isinstance(ready, dict) and isinstance(section, dict)):
        return section
    is_other_kind = section.get("kind", ready.get("kind")) != ready.get("kind")
    return section if is_other_kind else {**ready, **section}


def view_recipe(preset: EvalPreset, policy: AugmentationPolicy | None, view: int) -> dict[str, Any]:
    """All that determines a view's uint8 pixels beside the image, for cache keys. View 0 knows no policy.

    Raises ConfigError for a drawn view of a policy that lacks its principal colours.
    """
    shape = preset.model_dump(mode="json", include={"resize_px", "crop_px", "interpolation"})
    if view == EVAL_VIEW or policy is None:
        return {"recipe_version": _EVAL_RECIPE_VERSION, "view": view, **shape}
    policy.require_basis()
    return {
        "recipe_version": _DRAWN_RECIPE_VERSION if policy.elastic is None else _WARPED_RECIPE_VERSION,
        "view": view,
        **shape,
        # Borders and erased boxes show it.
        "mean": list(preset.mean),
        # Sections that are off are left out, so that a kind that is new here makes no cached view anew.
        "policy": policy.model_dump(mode="json", exclude_none=True),
    }
