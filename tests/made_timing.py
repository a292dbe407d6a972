"""What nobody has measured of a backbone, for tests of what is made of it."""

from __future__ import annotations

from convoy.cluster.timing_spec import BackboneTiming
from convoy.core.machine import machine_facts

TIMING = BackboneTiming(
    images_per_s=100,
    slow_images_per_s=90,
    fast_images_per_s=110,
    latency_p50_ms=10,
    latency_p95_ms=12,
    job_images_per_s=80,
    peak_memory_bytes=2**20,
    num_threads=2,
    num_workers=1,
    gpu_share=0,
    machine=machine_facts(None),
    measured_unix_s=1.0,
)
