"""A real S3 server for tests and for a person: OpenStack Swift with its S3 API, on loopback, in one folder.

`python tests/s3_server.py --dir D` starts it, prints the environment to use it with, and waits for Ctrl-C.

A supervisor process loads Swift once and forks the proxy, account, container and object servers. It ends, and
they with it, as soon as its stdin closes: so nothing stays behind, however the process that started it dies.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import json
import logging
import os
import pwd
import select
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

ACCESS_KEY = "test:tester"
SECRET_KEY = "testing"
REGION = "us-east-1"
HOST = "127.0.0.1"
ROLES = ("object", "container", "account", "proxy")
START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 10.0
PR_SET_PDEATHSIG = 1


class SwiftCannotRunError(Exception):
    """This machine cannot run Swift. A reason to skip a test, unlike any other failure to start."""


@dataclass(frozen=True, slots=True, kw_only=True)
class S3Server:
    """A running server. `pids` are its four processes, by role, for tests that kill or pause one."""

    endpoint: str
    pids: dict[str, int]
    log_path: Path
    access_key: str = ACCESS_KEY
    secret_key: str = SECRET_KEY
    region: str = REGION

    def environment(self) -> dict[str, str]:
        """The variables that point every AWS SDK at this server, and at no credentials but these."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_REGION": self.region,
            "AWS_DEFAULT_REGION": self.region,
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
            "AWS_EC2_METADATA_DISABLED": "true",
            "NO_PROXY": HOST,
        }


# Variables that would win over those of `S3Server.environment`.
OVERRIDING_VARIABLES = ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3")


@contextmanager
def running_server(folder: Path) -> Iterator[S3Server]:
    """A server with its data, config and log below `folder`, stopped at the end.

    Raises SwiftCannotRunError where Swift is not installed or the folder has no extended attributes, and
    RuntimeError with the end of the log if the server does not start.
    """
    _check_machine(folder)
    log_path = folder / "server.log"
    with log_path.open("ab") as log:
        supervisor = subprocess.Popen(
            [sys.executable, __file__, "--supervise", "--dir", folder],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            start_new_session=True,
        )
    try:
        yield S3Server(log_path=log_path, **_wait_until_ready(supervisor, log_path))
    finally:
        _stop(supervisor)


def _check_machine(folder: Path) -> None:
    if importlib.util.find_spec("swift") is None:
        raise SwiftCannotRunError("the package swift is not installed (pip install -e .[dev])")
    if not hasattr(os, "setxattr"):
        raise SwiftCannotRunError(f"Swift needs Linux, this is {sys.platform}")
    with tempfile.NamedTemporaryFile(dir=folder) as probe:
        try:
            os.setxattr(probe.name, "user.swift.probe", b"1")
        except OSError as error:
            raise SwiftCannotRunError(
                f"{folder} has no user extended attributes ({error.strerror})"
            ) from None


def _wait_until_ready(supervisor: subprocess.Popen[bytes], log_path: Path) -> dict:
    ready, _, _ = select.select([supervisor.stdout], [], [], START_TIMEOUT_S)
    line = supervisor.stdout.readline() if ready else b""
    if not line:
        log_end = log_path.read_text(errors="replace")[-4000:]
        raise RuntimeError(f"the S3 server did not start; the end of {log_path}:\n{log_end}")
    return json.loads(line)


def _stop(supervisor: subprocess.Popen[bytes]) -> None:
    supervisor.stdin.close()
    try:
        supervisor.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        supervisor.kill()  # the four servers follow it by their parent-death signal
        supervisor.wait()
    supervisor.stdout.close()


# ---- the supervisor's side


def supervise(folder: Path) -> None:
    """Start the four servers, report them on stdout as one line of JSON, and end them when stdin closes."""
    reservations = {role: _reserve_port() for role in ROLES}
    ports = {role: reservation.getsockname()[1] for role, reservation in reservations.items()}
    _write_configs(folder, ports)
    mains = _load_swift(folder, ports)
    pids = {role: _fork_server(mains[role], folder / f"{role}.conf") for role in ROLES}
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    try:
        for role in ROLES:
            _wait_for_port(ports[role], pids[role])
        print(json.dumps({"endpoint": f"http://{HOST}:{ports['proxy']}", "pids": pids}), flush=True)
        sys.stdin.buffer.read()
    finally:
        for pid in pids.values():
            os.kill(pid, signal.SIGKILL)  # not yet reaped, so the id is still theirs


def _reserve_port() -> socket.socket:
    """A free port, kept from other processes by being bound; Swift can share it, as both set SO_REUSEADDR."""
    reservation = socket.socket()
    reservation.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    reservation.bind((HOST, 0))
    return reservation


def _load_swift(folder: Path, ports: dict[str, int]) -> dict[str, Callable[[], None]]:
    """Import Swift, which reads the path of swift.conf as it loads, build the rings, and return the mains."""
    from swift.common import utils  # noqa: PLC0415

    utils.SWIFT_CONF_FILE = str(folder / "swift.conf")
    from swift.account import server as account  # noqa: PLC0415
    from swift.common.ring import RingBuilder  # noqa: PLC0415
    from swift.container import server as container  # noqa: PLC0415
    from swift.obj import server as object_  # noqa: PLC0415
    from swift.proxy import server as proxy  # noqa: PLC0415

    for role in ("object", "container", "account"):
        builder = RingBuilder(part_power=4, replicas=1, min_part_hours=1)
        disk = {"id": 0, "region": 1, "zone": 1, "weight": 1.0, "device": "disk"}
        builder.add_dev({**disk, "ip": HOST, "port": ports[role]})
        builder.rebalance()
        builder.get_ring().save(str(folder / f"{role}.ring.gz"))
    return {
        "object": object_.main,
        "container": container.main,
        "account": account.main,
        "proxy": proxy.main,
    }


def _fork_server(main: Callable[[], None], conf_path: Path) -> int:
    supervisor_pid = os.getpid()
    pid = os.fork()
    if pid:
        return pid
    # A SIGKILL of the supervisor must end the servers too.
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != supervisor_pid:
        os._exit(1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # stdout is for the report
    sys.argv = [conf_path.stem, str(conf_path)]
    main()
    raise SystemExit(1)


def _wait_for_port(port: int, pid: int) -> None:
    deadline_s = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline_s:
        with socket.socket() as connection:
            if connection.connect_ex((HOST, port)) == 0:
                return
        if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            raise RuntimeError(f"the server on port {port} ended at its start")
        time.sleep(0.02)
    raise RuntimeError(f"nothing listens on port {port} after {START_TIMEOUT_S:.0f} s")


def log_to_file(conf: dict[str, str], name: str, *args: object) -> None:
    """Swift's hook for a log handler; without it Swift knows only syslog."""
    logger = args[3]
    handler = logging.FileHandler(Path(conf["swift_dir"]) / "server.log")
    handler.setFormatter(logging.Formatter(f"%(asctime)s {name}: %(message)s"))
    logger.addHandler(handler)


def _write_configs(folder: Path, ports: dict[str, int]) -> None:
    (folder / "data" / "disk").mkdir(parents=True, exist_ok=True)
    (folder / "swift.conf").write_text(SWIFT_CONF)
    for role in ROLES:
        common = COMMON_CONF.format(folder=folder, port=ports[role], user=pwd.getpwuid(os.getuid()).pw_name)
        server = PROXY_CONF if role == "proxy" else STORAGE_CONF.format(role=role)
        (folder / f"{role}.conf").write_text(common + server)


SWIFT_CONF = """
[swift-hash]
swift_hash_path_suffix = convoy
[storage-policy:0]
name = only
default = yes
"""

# Long timeouts, because there is no updater that would list an object later if its container was busy.
COMMON_CONF = f"""
[DEFAULT]
bind_ip = {HOST}
bind_port = {{port}}
swift_dir = {{folder}}
devices = {{folder}}/data
user = {{user}}
workers = 0
mount_check = false
disable_fallocate = true
fallocate_reserve = 0
conn_timeout = 10
node_timeout = 60
container_update_timeout = 60
log_level = ERROR
log_custom_handlers = s3_server.log_to_file
"""

STORAGE_CONF = """
[pipeline:main]
pipeline = {role}-server
[app:{role}-server]
use = egg:swift#{role}
"""

PROXY_CONF = f"""
[pipeline:main]
pipeline = catch_errors gatekeeper proxy-logging s3api tempauth slo proxy-logging proxy-server
[app:proxy-server]
use = egg:swift#proxy
account_autocreate = true
conn_timeout = 10
node_timeout = 60
recoverable_node_timeout = 60
error_suppression_limit = 1000000
[filter:s3api]
use = egg:swift#s3api
s3_acl = false
location = {REGION}
[filter:tempauth]
use = egg:swift#tempauth
user_{ACCESS_KEY.replace(":", "_")} = {SECRET_KEY} .admin
[filter:slo]
use = egg:swift#slo
[filter:catch_errors]
use = egg:swift#catch_errors
[filter:gatekeeper]
use = egg:swift#gatekeeper
[filter:proxy-logging]
use = egg:swift#proxy_logging
access_log_level = DEBUG
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dir", type=Path, required=True, help="folder for data, config and log")
    parser.add_argument("--supervise", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    folder = arguments.dir.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    if arguments.supervise:
        supervise(folder)
        return
    with running_server(folder) as server:
        for name, value in server.environment().items():
            print(f"export {name}={shlex.quote(value)}")
        print(f"unset {' '.join(OVERRIDING_VARIABLES)}", flush=True)
        with suppress(KeyboardInterrupt):
            signal.pause()


if __name__ == "__main__":
    main()
