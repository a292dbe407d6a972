"""Numbers and images of pages as people read them."""

from __future__ import annotations

from datetime import UTC, datetime

from convoy.core.statistics import Interval
from convoy.pipelines.report_images import ShownImage
from convoy.report.blocks import Picture
from convoy.report.html import image_link

# Smaller images are shown pixel by pixel.
_COARSE_PX = 96


def percent(rate: float | None) -> str:
    """A rate with two digits behind the point."""
    return "-" if rate is None else f"{100 * rate:.2f} %"


def points(difference: float) -> str:
    """A difference of two rates in percentage points, signed."""
    return f"{100 * difference:+.2f}"


def number(value: float | None, digits: int = 4) -> str:
    """A number with so many digits behind the point."""
    return "-" if value is None else f"{value:.{digits}f}"


def significant(value: float | None, digits: int = 5) -> str:
    """A number with so many digits that matter."""
    return "-" if value is None else f"{value:.{digits}g}"


def count(value: int) -> str:
    """A count with its thousands apart."""
    return f"{value:,}"


def span(interval: Interval) -> str:
    """The limits of an interval of a rate."""
    return f"{100 * interval.low:.2f} to {100 * interval.high:.2f} %"


def size(num_bytes: float) -> str:
    """Bytes in the largest unit that fits."""
    for unit, factor in (("PB", 1e15), ("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= factor:
            return f"{_three_digits(num_bytes / factor)} {unit}"
    return f"{num_bytes:.0f} bytes"


def duration(seconds: float) -> str:
    """A time in the unit that suits it."""
    for unit, length_s in (("days", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * length_s:
            return f"{_three_digits(seconds / length_s)} {unit}"
    return f"{seconds:.3g} s"


def _three_digits(value: float) -> str:
    # From 999.5 on `g` writes an exponent.
    return f"{value:,.0f}" if value >= 999.5 else f"{value:.3g}"


def moment(iso: str | None) -> str:
    """A point in time, to the minute."""
    if not iso:
        return "at an unknown time"
    try:
        return f"{datetime.fromisoformat(iso).astimezone(UTC):%Y-%m-%d %H:%M} UTC"
    except ValueError:
        return iso


def short_bundle_names(references: list[str]) -> list[str]:
    """Bundles without their digests, where that keeps them apart."""
    short = [name.partition("@")[0] for name in references]
    return short if len(set(short)) == len(short) else list(references)


def picture(image: ShownImage, *lines: str) -> Picture:
    """An image with a few lines below it."""
    return Picture(
        href=image_link(image.jpeg) if image.jpeg else "",
        alt=f"image {image.sample_id}" if image.jpeg else "",
        missing=image.missing,
        is_coarse=max(image.width_px, image.height_px) <= _COARSE_PX,
        lines=lines,
    )
