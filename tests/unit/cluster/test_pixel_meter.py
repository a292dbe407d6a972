from __future__ import annotations

from pathlib import Path

from convoy.cluster.pixel_meter import PixelMeter
from convoy.core.records import RejectCode
from convoy.core.splits import SplitOptions
from convoy.storage.datasets import freeze_dataset, open_dataset
from convoy.storage.local_store import LocalStore
from convoy.vision.decode_rule import DecodeRule
from convoy.vision.pixel_statistics import PixelMoments, measure_pixels
from image_files import encode, photo


def test_meter_counts_readable_images_once_and_the_others_by_their_code(tmp_path: Path) -> None:
    folder = tmp_path / "images" / "all"
    folder.mkdir(parents=True)
    expected = PixelMoments()
    for seed in range(21):
        (folder / f"{seed}.png").write_bytes(encode(photo(24, 24, seed), "PNG"))
        expected = expected.plus(measure_pixels(photo(24, 24, seed).transpose(2, 0, 1)))
    (folder / "cut.png").write_bytes(encode(photo(24, 24), "PNG")[:300])
    (folder / "gone.png").write_bytes(encode(photo(24, 24), "PNG"))
    store = LocalStore(str(tmp_path / "workspace"))
    freeze_dataset(store, "all", str(folder.parent), splits=SplitOptions(val_fraction=0, test_fraction=0))
    (folder / "gone.png").unlink()

    rows = open_dataset(store, "all").read_table()
    measured = PixelMeter(DecodeRule(), num_threads=2).measure(rows)
    assert measured.num_images == 21
    assert measured.moments == expected
    assert measured.rejects == {RejectCode.TRUNCATED: 1, RejectCode.GONE: 1}
