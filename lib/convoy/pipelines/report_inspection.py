"""The pictures of an inspection, as a page shows them: so many bytes at most, each with the data behind it."""

from __future__ import annotations

from typing import Any

from convoy.core.config import StrictModel
from convoy.core.errors import ConvoyError
from convoy.pipelines.inspect_config import Section
from convoy.pipelines.inspect_report import InspectionFigure, InspectionReport
from convoy.storage.documents import read_json
from convoy.storage.object_store import ObjectStore

_MAX_BYTES = 8 << 20
_MAX_DATA_BYTES = 1 << 20
# A sheet of large photos takes megabytes as PNG, and a fifth of that as JPEG; maps and small sheets stay as drawn.
_PHOTOS = {Section.CAMS, Section.NEIGHBOURS, Section.NEAR_DUPLICATES}
_LARGE_BYTES = 256 << 10
_MAX_PNG_BYTES = 64 << 20


class InspectionPicture(StrictModel):
    """A PNG or JPEG with its title and its data, or why it is not shown."""

    kind: str
    name: str
    title: str
    caption: str
    image: bytes = b""
    media_type: str = "image/png"
    data: Any = None
    missing: str = ""


def read_pictures(store: ObjectStore, report: InspectionReport) -> list[InspectionPicture]:
    """The pictures in the order of the report; those beyond 8 MiB in all are named and left out.

    Large sheets of photos become JPEGs; the run keeps its PNG files as they are.
    """
    found: list[InspectionPicture] = []
    left = _MAX_BYTES
    for figure in report.figures:
        words: dict[str, Any] = figure.model_dump(mode="json", exclude={"picture", "data"})
        try:
            picture = _read(store, figure, most_bytes=left)
            if picture is None:
                missing = f"it would make the page too large: see {store.uri(figure.picture)}"
                found.append(InspectionPicture(**words, missing=missing))
                continue
            left -= len(picture["image"])
            found.append(InspectionPicture(**words, **picture, data=_data(store, figure.data)))
        except ConvoyError as error:
            found.append(InspectionPicture(**words, missing=error.what))
        except OSError:
            missing = f"its file is no picture: see {store.uri(figure.picture)}"
            found.append(InspectionPicture(**words, missing=missing))
    return found


def _read(store: ObjectStore, figure: InspectionFigure, *, most_bytes: int) -> dict[str, Any] | None:
    """The image and media type of a figure; None where it has more than `most_bytes`. OSError for a damaged one."""
    size_bytes = store.head(figure.picture).size_bytes
    becomes_jpeg = figure.kind in _PHOTOS and _LARGE_BYTES < size_bytes <= _MAX_PNG_BYTES
    if size_bytes > most_bytes and not becomes_jpeg:
        return None
    png = store.get(figure.picture).data
    if not becomes_jpeg:
        return {"image": png, "media_type": "image/png"}
    # Imports torch, which a page without such sheets need not wait for.
    from convoy.vision.thumbnails import png_as_jpeg  # noqa: PLC0415

    jpeg = png_as_jpeg(png)
    return None if len(jpeg) > most_bytes else {"image": jpeg, "media_type": "image/jpeg"}


def _data(store: ObjectStore, key: str) -> Any:
    """The JSON beside a picture, or where it lies if it is long."""
    if store.head(key).size_bytes > _MAX_DATA_BYTES:
        return {"lies_in": store.uri(key)}
    return read_json(store, key)
