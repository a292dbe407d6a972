"""Which Ray a job uses."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.integration

_SCRIPT = """
import ray
from convoy.cluster.session import ray_session
with ray_session():
    print(ray.get_runtime_context().gcs_address)
"""


def test_without_an_address_no_other_cluster_of_the_machine_is_joined() -> None:
    # Short, because Ray makes sockets below it. `ray start` leaves such a file behind, also when it was killed.
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        pointer = Path(folder, "ray", "ray_current_cluster")
        pointer.parent.mkdir()
        pointer.write_text("127.0.0.1:1")
        environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        finished = subprocess.run(
            [sys.executable, "-c", _SCRIPT],
            env={**environment, "RAY_TMPDIR": folder},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.strip() != "127.0.0.1:1"
