"""The rows of a list of samples: CSV, JSONL or parquet, checked line by line."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, NamedTuple

from convoy.core.errors import DataError
from convoy.core.splits import parse_split
from convoy.storage.object_store import ObjectStore
from convoy.storage.sources.rows import BadRows

PATH_COLUMNS = ("path", "uri", "file_name")
LIST_SUFFIXES = (".csv", ".jsonl", ".ndjson", ".parquet")
_CHECKSUM_DIGITS = {"md5": 32, "sha256": 64}
_COLUMNS_BESIDE_LABELS = (*PATH_COLUMNS, "split", "id", "weight", *_CHECKSUM_DIGITS)
_PARQUET_ROWS_PER_BATCH = 8192


class ListedSample(NamedTuple):
    """One row of a list. `line` counts from 1 and includes a CSV's header; a parquet's rows count from 1."""

    line: int
    sample_id: str
    path: str
    label: str | None
    split: str | None
    weight: float
    checksum: str | None


def read_listed_samples(
    store: ObjectStore,
    key: str,
    bad_rows: BadRows,
    *,
    label_column: str | None = None,
    with_labels: bool = True,
) -> Iterator[ListedSample]:
    """The usable rows of a list; the others go to `bad_rows`. Raises DataError where the file is no list.

    Columns: one of `path`, `uri`, `file_name`; and where there are any, `label` (or `label_column`), `split`,
    `id`, `weight` and `md5` or `sha256`; others are ignored, and labels too unless `with_labels`. A CSV is
    UTF-8 and has a header; a byte order mark, any line ends, and spaces around cells are fine.
    """
    path_column = ""
    read_label_from = (label_column or "label") if with_labels else None
    seen: set[str] = set()
    for line, record in _read_records(store, key, bad_rows, label_column):
        if not path_column:
            path_column = _find_path_column(record, label_column, store.uri(key))
        problems: list[str] = []
        sample = _check(record, line, path_column, read_label_from, problems)
        if sample.sample_id in seen:
            problems.append(f"the id '{sample.sample_id}' was there before")
        seen.add(sample.sample_id)
        if problems:
            bad_rows.add(line, "; ".join(problems))
        else:
            yield sample


def _read_records(
    store: ObjectStore, key: str, bad_rows: BadRows, label_column: str | None
) -> Iterator[tuple[int, Mapping[str, Any]]]:
    if key.lower().endswith(".parquet"):
        return _read_parquet(store, key, label_column)
    try:
        text = store.get(key).data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"the list is not UTF-8 (byte {error.start})", where=store.uri(key), next_step="save it as UTF-8"
        ) from None
    return _read_csv(text, bad_rows) if key.lower().endswith(".csv") else _read_jsonl(text, bad_rows)


def _read_csv(text: str, bad_rows: BadRows) -> Iterator[tuple[int, dict[str, Any]]]:
    # Not strict, a quote that is not closed takes the rest of the file for its cell.
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    first_line = 1
    try:
        header = [name.strip() for name in next(reader, [])]
        repeated = [name for name, count in Counter(header).items() if name and count > 1]
        if repeated:
            bad_rows.add(first_line, f"more than one column is called {', '.join(repeated)}")
            return
        first_line = reader.line_num + 1
        for cells in reader:
            line, first_line = first_line, reader.line_num + 1
            if not cells:
                continue
            if len(cells) == len(header):
                yield line, dict(zip(header, map(str.strip, cells), strict=True))
            else:
                bad_rows.add(line, f"{len(cells)} cells instead of {len(header)}")
    except csv.Error as error:
        # An open quote, for example, behind which all is one cell.
        bad_rows.add(first_line, f"no CSV from here on: {error}")


def _read_jsonl(text: str, bad_rows: BadRows) -> Iterator[tuple[int, dict[str, Any]]]:
    # Not splitlines(): a JSON string may hold U+2028 and the like.
    for line, content in enumerate(text.split("\n"), start=1):
        if not content.strip():
            continue
        try:
            record = json.loads(content)
        except (ValueError, RecursionError) as error:
            bad_rows.add(line, f"not JSON: {error}")
            continue
        if isinstance(record, dict):
            yield line, record
        else:
            bad_rows.add(line, "not a JSON object")


def _read_parquet(
    store: ObjectStore, key: str, label_column: str | None
) -> Iterator[tuple[int, dict[str, Any]]]:
    file = store.open_parquet(key)
    names = file.schema_arrow.names
    # Told here, where the names of all columns are known.
    _find_path_column(names, label_column, store.uri(key))
    # Only these: what else is in a list may be embeddings, of which each number is an object here.
    columns = [name for name in names if name in {*_COLUMNS_BESIDE_LABELS, label_column or "label"}]
    row = 0
    for batch in file.iter_batches(batch_size=_PARQUET_ROWS_PER_BATCH, columns=columns):
        for record in batch.to_pylist():
            row += 1
            yield row, record


def _find_path_column(columns: Collection[str], label_column: str | None, where: str) -> str:
    if label_column and label_column not in columns:
        raise DataError(f"the list has no column '{label_column}', only {', '.join(columns)}", where=where)
    found = [name for name in PATH_COLUMNS if name in columns]
    if len(found) == 1:
        return found[0]
    problem = f"several: {', '.join(found)}" if found else f"only {', '.join(columns) or 'nothing'}"
    raise DataError(
        f"the list must have one column of {', '.join(PATH_COLUMNS)}, but has {problem}",
        where=where,
        next_step="give the list a header with one path column",
    )


def _check(
    record: Mapping[str, Any], line: int, path_column: str, label_column: str | None, problems: list[str]
) -> ListedSample:
    def parsed(column: str, parse: Callable[[Any], Any]) -> Any:
        try:
            return parse(record.get(column))
        except ValueError as error:
            problems.append(f"{column}: {error}")
            return None

    path = parsed(path_column, _text) or ""
    if not path:
        problems.append(f"no {path_column}")
    return ListedSample(
        line=line,
        sample_id=parsed("id", _text) or path,
        path=path,
        label=parsed(label_column, _text) if label_column else None,
        split=parsed("split", _split) if "split" in record else None,
        weight=parsed("weight", _weight),
        checksum=parsed("sha256", lambda value: _checksum("sha256", value))
        or parsed("md5", lambda value: _checksum("md5", value)),
    )


def _text(value: Any) -> str | None:
    """A label or name as text, None if missing; 3.0 is "3", as some writers make floats of integers."""
    if value is None or value == "" or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, str | int | float):
        return str(value)
    raise ValueError(f"a single text or number is needed, not {type(value).__name__}")


def _split(value: Any) -> str:
    name = _text(value)
    if name is None:
        raise ValueError("no split")
    split = parse_split(name)
    if split is None:
        raise ValueError(f"'{name}' is no split; use train, val or test")
    return split


def _weight(value: Any) -> float:
    number = 1.0 if _text(value) is None else float(value)
    if not (math.isfinite(number) and number >= 0):
        raise ValueError(f"{number} is no weight")
    return number


def _checksum(algorithm: str, value: Any) -> str | None:
    digits = (_text(value) or "").lower()
    if not digits:
        return None
    if not re.fullmatch(rf"[0-9a-f]{{{_CHECKSUM_DIGITS[algorithm]}}}", digits):
        raise ValueError(f"'{digits}' has not {_CHECKSUM_DIGITS[algorithm]} hex digits")
    return f"{algorithm}:{digits}"
