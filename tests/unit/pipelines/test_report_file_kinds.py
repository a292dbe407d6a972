"""Kinds of files are those of images, and of the shards that images lie in."""

from __future__ import annotations

import pyarrow as pa
import pytest

from convoy.pipelines.report_file_kinds import file_kinds


@pytest.mark.parametrize(
    ("uri", "sample_id", "kind"),
    [
        ("s3://photos.v2/cats/a.JPG", "cats/a.JPG", ".jpg"),
        ("/data/shard-0.tar", "shard-0.tar#n01440764_10026", ".tar"),
        ("/data/shard-0.tar", "shard-0.tar#v1.5/a", ".tar"),
        ("/data/train.parquet", "train.parquet#000000012", ".parquet"),
        ("/data/no. 1#2.png", "no. 1#2.png", ".png"),
        ("s3://photos/0a1b2c", "cats/a.webp", ".webp"),
        ("s3://photos/0a1b2c", "0a1b2c", "none"),
    ],
)
def test_the_kind_of_file_is_that_of_the_object(uri: str, sample_id: str, kind: str) -> None:
    assert file_kinds(pa.table({"sample_id": [sample_id], "uri": [uri]})) == [kind]
