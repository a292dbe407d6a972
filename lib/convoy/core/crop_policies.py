"""Crop policies: which crops of an image a network sees, as values. Free of torch.

A policy gives the same views, in the same order, for every image: what differs is where the crops lie, which
`core.crops` computes. A *slot* is a cut that is copied out of the resized image, a *view* shows a slot, plain or
mirrored.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Literal

from pydantic import Field

from convoy.core.config import StrictModel


class CropPolicy(StrEnum):
    """Which crops of an image are averaged.

    CENTER: the preset's own crop. FLIP: that, and the central crop of the mirrored image. FIVE: the corners and
    the centre. TEN: the five of the image and the five of its mirror image, in torchvision's order (Krizhevsky et
    al. 2012, section 4.1). MULTISCALE: crops of squares at several scales (Szegedy et al. 2015, section 7).
    """

    CENTER = "center"
    FLIP = "flip"
    FIVE = "five"
    TEN = "ten"
    MULTISCALE = "multiscale"


class Averaging(StrEnum):
    """What is averaged over views and members. The mean of logits is the normalised geometric mean of softmaxes."""

    PROBABILITIES = "probabilities"
    LOGITS = "logits"


class MemberOutputs(StrEnum):
    """Which outputs are kept beside the joint ones: NONE, one a MEMBER, or one a member and VIEW."""

    NONE = "none"
    MEMBERS = "members"
    VIEWS = "views"


class EvaluationMode(StrEnum):
    """How a committee looks at an image.

    EXACT: every member at every view; the truth that the others are measured against. GATED: a cheap first look,
    and the whole committee only where that is not sure. DENSE: the largest central square of the
    resized image and its mirror image in place of crops, for networks that take any size (Sermanet et al. 2014,
    section 3.3, show what is beside the square, too).
    """

    EXACT = "exact"
    GATED = "gated"
    DENSE = "dense"


class SquareCrops(StrEnum):
    """What is taken of a square. SIX: its corners, its centre, and the whole square, shrunk to the crop."""

    CENTER = "center"
    SIX = "six"


class MultiscaleCrops(StrictModel):
    """Crops at several scales; by default the 144 of GoogLeNet (Szegedy et al. 2015, section 7).

    The image is resized so that its short side is `short_sides` times the crop: 256, 288, 320 and 352 pixels at a
    crop of 224. Of each size `squares` are taken along the long side: the centre, or both ends and the centre.
    """

    short_sides: tuple[Annotated[float, Field(ge=1, le=8)], ...] = Field(
        default=(8 / 7, 9 / 7, 10 / 7, 11 / 7), min_length=1
    )
    squares: Literal[1, 3] = 3
    crops: SquareCrops = SquareCrops.SIX
    mirror: bool = True


class CropPlan(StrictModel):
    """A crop policy; `multiscale` counts for the policy of that name only."""

    policy: CropPolicy = CropPolicy.CENTER
    multiscale: MultiscaleCrops = MultiscaleCrops()


@dataclass(frozen=True, slots=True)
class CropView:
    """What the network sees in one pass: a slot, as it is or mirrored."""

    slot: int
    mirrored: bool


# The mirror image of the upper left crop is the upper right crop of the mirror image. The last slot is the central
# crop of the mirror image, which lies one pixel beside the central crop where the difference in width is odd.
_TEN_MIRRORED_SLOTS = (1, 0, 3, 2, 5)
_TEN_POSITIONS = {
    CropPolicy.CENTER: (4,),
    CropPolicy.FLIP: (4, 9),
    CropPolicy.FIVE: (0, 1, 2, 3, 4),
}


def crop_views(plan: CropPlan) -> tuple[CropView, ...]:
    """The views of every image, in the order in which they are stored: the plain ones, then the mirrored ones."""
    match plan.policy:
        case CropPolicy.CENTER:
            return (CropView(0, mirrored=False),)
        case CropPolicy.FLIP:
            return (CropView(0, mirrored=False), CropView(1, mirrored=True))
        case CropPolicy.FIVE:
            return _plain(5)
        case CropPolicy.TEN:
            return (*_plain(5), *(CropView(slot, mirrored=True) for slot in _TEN_MIRRORED_SLOTS))
        case CropPolicy.MULTISCALE:
            plain = _plain(num_slots(plan))
            mirrored = (CropView(view.slot, mirrored=True) for view in plain)
            return (*plain, *mirrored) if plan.multiscale.mirror else plain


def num_slots(plan: CropPlan) -> int:
    """How many crops are copied out of an image."""
    if plan.policy is CropPolicy.MULTISCALE:
        num_crops = 6 if plan.multiscale.crops is SquareCrops.SIX else 1
        return len(plan.multiscale.short_sides) * plan.multiscale.squares * num_crops
    return 1 + max(view.slot for view in crop_views(plan))


def view_indices(policy: CropPolicy, within: CropPlan) -> tuple[int, ...] | None:
    """Where the views of a policy stand among those of a plan that holds all of them; None where it does not."""
    if policy is within.policy:
        return tuple(range(len(crop_views(within))))
    if within.policy is CropPolicy.TEN:
        return _TEN_POSITIONS.get(policy)
    if policy is CropPolicy.CENTER:
        return {CropPolicy.FLIP: (0,), CropPolicy.FIVE: (4,)}.get(within.policy)
    return None


def _plain(num_views: int) -> tuple[CropView, ...]:
    return tuple(CropView(slot, mirrored=False) for slot in range(num_views))
