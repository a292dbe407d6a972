"""The pixels of a slice of a manifest, measured: fetch and decode in threads, sums out.

Each image counts with its central square at a side of at most 256 pixels, never enlarged: the images that
Krizhevsky et al. 2012 (section 2) trained on, so that large photographs do not outweigh all others.
"""

from __future__ import annotations

import pyarrow as pa

from convoy.cluster.decode_window import decode_threads
from convoy.cluster.stall_watch import StallWatch
from convoy.core.batching import batched
from convoy.core.records import SampleRejected
from convoy.storage.samples import SampleReader
from convoy.vision.cropping import central_square
from convoy.vision.decode_rule import DecodeRule
from convoy.vision.decoding import decode_image, quiet_decoders
from convoy.vision.pixel_statistics import MeasuredImages, measure_pixels

LARGEST_SIDE_PX = 256
# So many decoded images are in memory at most.
_IMAGES_A_THREAD = 4


class PixelMeter:
    """Readers and decoders of one worker; `measure` turns a slice of a manifest into sums."""

    def __init__(self, decode_rule: DecodeRule, *, num_threads: int) -> None:
        quiet_decoders()
        self._rule = decode_rule
        self._reader = SampleReader(max_bytes=decode_rule.max_bytes)
        self._num_threads = num_threads

    def measure(self, rows: pa.Table) -> MeasuredImages:
        """The moments of the images of some rows of a manifest; rejects are counted and skipped."""
        total, watch = MeasuredImages(), StallWatch()
        with watch.watching(), decode_threads(self._num_threads) as decoders:
            for batch in batched(self._reader.read(rows), _IMAGES_A_THREAD * self._num_threads):
                watch.moved()
                for measured in decoders.map(self._measure_image, [data for _, data in batch]):
                    total = total.plus(measured)
        return total

    def _measure_image(self, data: bytes | SampleRejected) -> MeasuredImages:
        if isinstance(data, SampleRejected):
            return MeasuredImages(rejects={data.code: 1})
        try:
            pixels_CHW = decode_image(data, self._rule).pixels_CHW
        except SampleRejected as rejected:
            return MeasuredImages(rejects={rejected.code: 1})
        square_CHW = central_square(pixels_CHW, LARGEST_SIDE_PX)
        return MeasuredImages(moments=measure_pixels(square_CHW.numpy()), num_images=1)
