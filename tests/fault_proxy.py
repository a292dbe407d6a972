"""An HTTP proxy on loopback before a real S3 server, which spoils what it is told to spoil, and counts it.

The client signs for the proxy's host, and the proxy hands on method, path, headers and body as they came, so that
signatures stay valid. Only conditional writes that the server does not do as wanted are requests of the proxy's own.
"""

from __future__ import annotations

import re
import socket
import struct
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from enum import Enum, auto
from http.client import HTTPConnection, HTTPException
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from random import Random
from typing import Any
from urllib.parse import unquote, urlsplit

import boto3
from botocore.config import Config
from botocore.exceptions import ClientError

from s3_server import HOST, S3Server

# Of each connection, not of the whole path.
_HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "expect", "te", "upgrade"}
_UPSTREAM_TIMEOUT_S = 120.0

# What happens to a request, in place of handing it on.
Action = Callable[["Exchange"], None]


class Conditions(Enum):
    """What the store behind the proxy makes of `If-None-Match: *` and `If-Match` on a PUT."""

    # As the server does it: Swift checks first and writes then, and knows no If-Match.
    AS_SERVED = auto()
    # One PUT of a key at a time, and If-Match works: what AWS promises.
    ATOMIC = auto()
    # As ATOMIC, but If-Match is accepted and ignored.
    IF_MATCH_IGNORED = auto()
    # The headers are accepted and ignored.
    IGNORED = auto()


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole answer, as it is to reach the client."""

    status: int
    headers: tuple[tuple[str, str], ...]
    body: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class FaultRule:
    """Which requests a fault meets. Counted are those of the `method` whose bucket/key has the `key` pattern.

    Of these, from number `start` on (the first is 1), every `every`-th is spoiled, or a `share` of them drawn by
    `seed`; at most `times` of them, `times_a_key` of a key, and none later than `for_s` seconds after the first.
    """

    action: Action
    method: str = ".*"
    key: str = ""
    start: int = 1
    every: int = 1
    share: float = 1.0
    seed: int = 0
    times: int | None = None
    times_a_key: int | None = None
    for_s: float | None = None


class Fault:
    """A rule at work, and how often it fired."""

    def __init__(self, rule: FaultRule) -> None:
        self.rule = rule
        self.fired = 0
        self._num_matching = 0
        self._fired_of_key: Counter[str] = Counter()
        self._random = Random(rule.seed)
        self._first_s: float | None = None

    def meets(self, method: str, key: str) -> bool:
        """Whether this request is one to spoil; counts it. Called by one thread at a time."""
        rule = self.rule
        if not re.fullmatch(rule.method, method) or not re.search(rule.key, key):
            return False
        self._num_matching += 1
        place = self._num_matching - rule.start
        is_drawn = self._random.random() < rule.share
        if place < 0 or place % rule.every or not is_drawn or self._is_over(key):
            return False
        self._first_s = self._first_s or time.monotonic()
        self.fired += 1
        self._fired_of_key[key] += 1
        return True

    def _is_over(self, key: str) -> bool:
        rule = self.rule
        if rule.times is not None and self.fired >= rule.times:
            return True
        if rule.times_a_key is not None and self._fired_of_key[key] >= rule.times_a_key:
            return True
        if rule.for_s is None or self._first_s is None:
            return False
        return time.monotonic() - self._first_s > rule.for_s


class FaultProxy(ThreadingHTTPServer):
    """The proxy. `requests` counts what arrived, by method, since the last `forget`."""

    daemon_threads = True
    request_queue_size = 256

    def __init__(self, server: S3Server) -> None:
        super().__init__((HOST, 0), Exchange)
        self.behind = server
        self.conditions = Conditions.AS_SERVED
        self.requests: Counter[str] = Counter()
        self._faults: tuple[Fault, ...] = ()
        self._lock = threading.Lock()
        self._lock_of_key: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)
        self._client: Any = None

    def as_server(self) -> S3Server:
        """The server as its clients see it through the proxy."""
        return replace(self.behind, endpoint=f"http://{HOST}:{self.server_port}")

    @contextmanager
    def injecting(self, *rules: FaultRule) -> Iterator[list[Fault]]:
        """Spoil requests by these rules; the first that meets a request has it."""
        faults = [Fault(rule) for rule in rules]
        with self._lock:
            self._faults = tuple(faults)
        try:
            yield faults
        finally:
            with self._lock:
                self._faults = ()

    @contextmanager
    def keeping(self, conditions: Conditions) -> Iterator[None]:
        """Treat conditional PUTs in this way."""
        before, self.conditions = self.conditions, conditions
        try:
            yield
        finally:
            self.conditions = before

    def forget(self) -> None:
        """Count requests from here on."""
        with self._lock:
            self.requests.clear()

    def action_for(self, method: str, key: str) -> Action | None:
        """What happens to a request, if anything does; counts it."""
        with self._lock:
            self.requests[method] += 1
            return next((fault.rule.action for fault in self._faults if fault.meets(method, key)), None)

    def lock_of(self, key: str) -> threading.Lock:
        """The lock of a key."""
        with self._lock:
            return self._lock_of_key[key]

    def client(self) -> Any:
        """A client of the proxy's own, straight to the server."""
        with self._lock:
            if self._client is None:
                self._client = boto3.session.Session().client(
                    "s3",
                    endpoint_url=self.behind.endpoint,
                    aws_access_key_id=self.behind.access_key,
                    aws_secret_access_key=self.behind.secret_key,
                    region_name=self.behind.region,
                    config=Config(max_pool_connections=64, request_checksum_calculation="when_required"),
                )
            return self._client

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away, killed or out of patience, is part of the game."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)


@contextmanager
def running_proxy(server: S3Server) -> Iterator[FaultProxy]:
    """A proxy before a server, without faults so far, ended at the end."""
    with FaultProxy(server) as proxy:
        thread = threading.Thread(target=proxy.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield proxy
        finally:
            proxy.shutdown()
            thread.join()


class Exchange(BaseHTTPRequestHandler):
    """A connection of a client, the connection of the proxy's for it, and the request that is being answered."""

    server: FaultProxy
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def setup(self) -> None:
        super().setup()
        behind = urlsplit(self.server.behind.endpoint)
        self._upstream = HTTPConnection(behind.hostname or HOST, behind.port, timeout=_UPSTREAM_TIMEOUT_S)

    def finish(self) -> None:
        self._upstream.close()
        super().finish()

    def log_message(self, *_: Any) -> None:
        pass

    def handle_any(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.key = unquote(urlsplit(self.path).path).removeprefix("/")
        action = self.server.action_for(self.command, self.key)
        if action is None:
            self.send(self.forward())
        else:
            action(self)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = handle_any

    def forward(self) -> Answer:
        """What the store answers to the request."""
        if self.command != "PUT" or self.server.conditions is Conditions.AS_SERVED:
            return self._hand_on()
        wanted_etag = self.headers.get("If-Match")
        if self.server.conditions is Conditions.IGNORED:
            is_conditional = wanted_etag or self.headers.get("If-None-Match")
            return self._put() if is_conditional else self._hand_on()
        with self.server.lock_of(self.key):
            if wanted_etag is None:
                return self._hand_on()
            is_ignored = self.server.conditions is Conditions.IF_MATCH_IGNORED
            return self._put() if is_ignored else self._replace(wanted_etag)

    def send(self, answer: Answer, num_bytes: int | None = None) -> None:
        """Send an answer; with `num_bytes` only so many bytes of the body that is announced."""
        self.send_response_only(answer.status)
        for name, value in answer.headers:
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(answer.body[:num_bytes])

    def refuse(self, status: int, code: str, message: str) -> None:
        """Answer with an error as S3 words it, without asking the server."""
        self.send(self._refusal(status, code, message))

    def reset(self) -> None:
        """End the connection with a reset."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True

    def wait(self, seconds: float) -> None:
        """Say nothing more, for so long or until the client goes away."""
        self.connection.settimeout(seconds)
        with suppress(OSError):
            self.connection.recv(1)
        self.close_connection = True

    def _hand_on(self) -> Answer:
        headers = {name: value for name, value in self.headers.items() if name.lower() not in _HOP_BY_HOP}
        with suppress(HTTPException, ConnectionError):
            return self._ask(headers)
        # The server had closed the connection because it was idle.
        self._upstream.close()
        return self._ask(headers)

    def _ask(self, headers: dict[str, str]) -> Answer:
        self._upstream.request(self.command, self.path, body=self.body or None, headers=headers)
        response = self._upstream.getresponse()
        body = response.read()
        kept = {name: value for name, value in response.getheaders() if name.lower() not in _HOP_BY_HOP}
        if self.command != "HEAD":
            kept["Content-Length"] = str(len(body))
        return Answer(response.status, tuple(kept.items()), body)

    def _put(self) -> Answer:
        """Write the object whatever is there."""
        client, (bucket, _, key) = self.server.client(), self.key.partition("/")
        written = client.put_object(
            Bucket=bucket, Key=key, Body=self.body, ContentMD5=self.headers["Content-MD5"]
        )
        return Answer(200, (("ETag", written["ETag"]), ("Content-Length", "0")), b"")

    def _replace(self, wanted_etag: str) -> Answer:
        """Write the object if it is of the wanted version; the caller holds the lock of its key."""
        client, (bucket, _, key) = self.server.client(), self.key.partition("/")
        try:
            found_etag = client.head_object(Bucket=bucket, Key=key)["ETag"]
        except ClientError:
            return self._refusal(404, "NoSuchKey", "there is no version of it")
        if found_etag != wanted_etag:
            return self._refusal(412, "PreconditionFailed", "it is of another version")
        return self._put()

    def _refusal(self, status: int, code: str, message: str) -> Answer:
        words = f"<?xml version='1.0' encoding='UTF-8'?><Error><Code>{code}</Code><Message>{message}</Message></Error>"
        body = b"" if self.command == "HEAD" else words.encode()
        headers = (("Content-Type", "application/xml"), ("Content-Length", str(len(body))))
        return Answer(status, headers, body)


@dataclass(frozen=True, slots=True)
class Refuse:
    """The server says no, or that it is in trouble, and does nothing."""

    status: int
    code: str

    def __call__(self, exchange: Exchange) -> None:
        exchange.refuse(self.status, self.code, "made up by the fault proxy")


@dataclass(frozen=True, slots=True)
class Delay:
    """The request is held for some seconds, and then served."""

    seconds: float

    def __call__(self, exchange: Exchange) -> None:
        time.sleep(self.seconds)
        exchange.send(exchange.forward())


@dataclass(frozen=True, slots=True)
class Hang:
    """No answer comes, though the connection stays."""

    seconds: float

    def __call__(self, exchange: Exchange) -> None:
        exchange.wait(self.seconds)


@dataclass(frozen=True, slots=True)
class Stall:
    """The first half of the body comes, and then nothing, though the connection stays."""

    seconds: float

    def __call__(self, exchange: Exchange) -> None:
        answer = exchange.forward()
        exchange.send(answer, len(answer.body) // 2)
        exchange.wait(self.seconds)


class Throttle:
    """The server serves at most so many requests a second, after as many at once, and refuses the others as S3 does."""

    def __init__(self, per_s: float) -> None:
        self.num_refused = 0
        self._per_s = self._tokens = per_s
        self._filled_s = time.monotonic()
        self._lock = threading.Lock()

    def __call__(self, exchange: Exchange) -> None:
        if self._takes_token():
            exchange.send(exchange.forward())
        else:
            SLOW_DOWN(exchange)

    def _takes_token(self) -> bool:
        with self._lock:
            now_s = time.monotonic()
            self._tokens = min(self._tokens + (now_s - self._filled_s) * self._per_s, self._per_s)
            self._filled_s = now_s
            if self._tokens < 1:
                self.num_refused += 1
                return False
            self._tokens -= 1
            return True


def reset(exchange: Exchange) -> None:
    """The connection is reset before the server has seen the request."""
    exchange.reset()


def lose_answer(exchange: Exchange) -> None:
    """The server does what it is asked, and nobody hears of it."""
    exchange.forward()
    exchange.reset()


def cut_body(exchange: Exchange) -> None:
    """The connection ends in the middle of the body."""
    answer = exchange.forward()
    exchange.send(answer, len(answer.body) // 2)
    exchange.close_connection = True


def corrupt_body(exchange: Exchange) -> None:
    """A byte of the body arrives as another one; the length is right."""
    answer = exchange.forward()
    exchange.send(replace(answer, body=_damaged(answer.body)))


def corrupt_upload(exchange: Exchange) -> None:
    """A byte of what is sent reaches the server as another one."""
    exchange.body = _damaged(exchange.body)
    exchange.send(exchange.forward())


def _damaged(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes(byte ^ 0xFF for byte in data[middle : middle + 1]) + data[middle + 1 :]


SLOW_DOWN = Refuse(503, "SlowDown")
INTERNAL_ERROR = Refuse(500, "InternalError")
CONFLICT = Refuse(409, "ConditionalRequestConflict")
PRECONDITION_FAILED = Refuse(412, "PreconditionFailed")
EXPIRED_TOKEN = Refuse(400, "ExpiredToken")
ACCESS_DENIED = Refuse(403, "AccessDenied")
NO_ROOM = Refuse(507, "XMinioStorageFull")
