"""The pictures of an inspection, as a page shows them: so many bytes at most, each with the data behind it."""

from __future__ import annotations

from typing import Any

from convoy.core.config import StrictModel
from convoy.core.errors import ConvoyError
from convoy.pipelines.inspect_report import InspectionReport
from convoy.storage.documents import read_json
from convoy.storage.object_store import ObjectStore

_MAX_BYTES = 8 << 20
_MAX_DATA_BYTES = 1 << 20


class InspectionPicture(StrictModel):
    """A PNG with its title and its data, or why it is not shown."""

    kind: str
    name: str
    title: str
    caption: str
    png: bytes = b""
    data: Any = None
    missing: str = ""


def read_pictures(store: ObjectStore, report: InspectionReport) -> list[InspectionPicture]:
    """The pictures in the order of the report; those beyond 8 MiB in all are named and left out."""
    found: list[InspectionPicture] = []
    left = _MAX_BYTES
    for figure in report.figures:
        words: dict[str, Any] = figure.model_dump(mode="json", exclude={"picture", "data"})
        try:
            size_bytes = store.head(figure.picture).size_bytes
            if size_bytes > left:
                missing = f"it would make the page too large: see {store.uri(figure.picture)}"
                found.append(InspectionPicture(**words, missing=missing))
                continue
            left -= size_bytes
            png = store.get(figure.picture).data
            found.append(InspectionPicture(**words, png=png, data=_data(store, figure.data)))
        except ConvoyError as error:
            found.append(InspectionPicture(**words, missing=error.what))
    return found


def _data(store: ObjectStore, key: str) -> Any:
    """The JSON beside a picture, or where it lies if it is long."""
    if store.head(key).size_bytes > _MAX_DATA_BYTES:
        return {"lies_in": store.uri(key)}
    return read_json(store, key)
