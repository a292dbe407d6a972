"""A Ray with a dashboard, as `ray start --head` leaves it on a bare shell: own ports, own folder, own token."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

BIN = Path(sys.executable).parent
TOKEN = "a-token-that-nobody-may-see-0123456789abcdef"
_START_TIMEOUT_S = 120


@dataclass(frozen=True, slots=True)
class RayHead:
    """A running head: where its dashboard and its logs are, and what a client's environment needs."""

    address: str
    folder: Path
    environment: Mapping[str, str]


@contextmanager
def running_head(extra: Mapping[str, str]) -> Iterator[RayHead]:
    """Start a head on free ports of loopback, with a token and more variables; then stop it, and only it."""
    ports = _free_ports(7)
    # Short, because Ray makes sockets below it.
    folder = Path(tempfile.mkdtemp(prefix="rh", dir="/tmp"))
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
        "HOME": str(folder / "home"),
        # The `python` of an entrypoint is the first one on the head's path.
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": TOKEN,
        "RAY_USAGE_STATS_ENABLED": "0",
        **extra,
    }
    (folder / "home").mkdir()
    names = ("port", "dashboard-port", "dashboard-agent-listen-port", "dashboard-agent-grpc-port")
    more = ("metrics-export-port", "ray-client-server-port", "runtime-env-agent-port")
    arguments = [f"--{name}={port}" for name, port in zip((*names, *more), ports, strict=True)]
    command = [str(BIN / "ray"), "start", "--head", "--block", "--node-ip-address=127.0.0.1", *arguments]
    command += [
        "--num-cpus=2",
        "--include-dashboard=true",
        f"--temp-dir={folder}",
        "--object-store-memory=200000000",
    ]
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        output = stack.enter_context((folder / "start.log").open("wb"))
        head = subprocess.Popen(
            command, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        stack.callback(_stop, head)
        _wait_for_port(ports[1], head, folder / "start.log")
        yield RayHead(f"http://127.0.0.1:{ports[1]}", folder, environment)


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [int(one.getsockname()[1]) for one in sockets]


def _wait_for_port(port: int, head: subprocess.Popen[bytes], log: Path) -> None:
    deadline_s = time.monotonic() + _START_TIMEOUT_S
    while time.monotonic() < deadline_s:
        assert head.poll() is None, log.read_text()
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.3)
    raise TimeoutError(log.read_text())


def _stop(head: subprocess.Popen[bytes]) -> None:
    """SIGTERM to `ray start --block`; then whatever is left of its process group."""
    head.terminate()
    with suppress(subprocess.TimeoutExpired):
        head.wait(timeout=5)
    with suppress(ProcessLookupError):
        os.killpg(head.pid, signal.SIGKILL)
    head.wait(timeout=10)
