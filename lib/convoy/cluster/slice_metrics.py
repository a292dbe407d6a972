"""The counters of a run on slices, in Ray's own metrics: what a Prometheus beside the cluster reads.

They are fed where records come back, in the driver: one series a run however many workers there are, and what a
worker did that died before its record counts for nothing here either.
"""

from __future__ import annotations

from convoy.storage.commits import SliceRecord

_TAGS = ("verb", "run")
_BOUNDARIES_S = [0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0]


class SliceMetrics:
    """Metrics of one run in a Ray session.

    Counters: `convoy_images_total` (results and rejects), `convoy_rejects_total` by `code`,
    `convoy_bytes_read_total` of images, usable or not, `convoy_bytes_written_total` of parts and rejects,
    `convoy_retries_total` of requests to object stores. Histogram:
    `convoy_slice_seconds`. Gauge: `convoy_slices_left`. Prometheus sees them with `ray_` in front.
    """

    def __init__(self, verb: str, run_id: str, *, num_slices: int) -> None:
        # A job that finds nothing to do must not wait for Ray.
        from ray.util.metrics import Counter, Gauge, Histogram  # noqa: PLC0415

        self._tags, self._left = {"verb": verb, "run": run_id}, num_slices
        self._images = Counter("convoy_images_total", "Images that ended in results or rejects", _TAGS)
        self._rejects = Counter("convoy_rejects_total", "Images that were rejected", (*_TAGS, "code"))
        self._read = Counter("convoy_bytes_read_total", "Bytes of images", _TAGS)
        self._written = Counter("convoy_bytes_written_total", "Bytes of parts and rejects", _TAGS)
        self._retries = Counter(
            "convoy_retries_total", "Requests to object stores that had to be repeated", _TAGS
        )
        self._seconds = Histogram("convoy_slice_seconds", "Seconds a slice", _BOUNDARIES_S, _TAGS)
        self._slices_left = Gauge("convoy_slices_left", "Slices of this call without a record", _TAGS)
        # A run that waits for its first slice must be seen to wait.
        self._slices_left.set(self._left, self._tags)

    def add(self, record: SliceRecord) -> None:
        """Count a slice that was done."""
        self._left -= 1
        self._slices_left.set(self._left, self._tags)
        self._seconds.observe(max(record.finished_unix_s - record.started_unix_s, 0.0), self._tags)
        amounts = (
            (self._images, record.num_results + record.num_rejects),
            (self._read, record.bytes_read),
            (self._retries, record.num_retries),
            (self._written, sum(file.size_bytes for file in record.files)),
        )
        for counter, amount in amounts:
            # Ray refuses to add nothing.
            if amount:
                counter.inc(amount, self._tags)
        for code, number in record.reject_codes.items():
            self._rejects.inc(number, {**self._tags, "code": code})
