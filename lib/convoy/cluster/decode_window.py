"""Encoded images on their way to decode threads, as far as their bytes allow."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor, wait
from typing import Any, Concatenate, ParamSpec, TypeVar

from convoy.core.records import SampleRejected
from convoy.vision.forward import use_threads

ArgumentsT = ParamSpec("ArgumentsT")
ResultT = TypeVar("ResultT")


def decode_threads(num_threads: int) -> ThreadPoolExecutor:
    """Threads of which each prepares an image alone: torch would split even a copy among all cores."""
    return ThreadPoolExecutor(num_threads, "decode", initializer=use_threads, initargs=(1,))


class OwnThread(Executor):
    """Prepares each image at once, in the thread that hands it over: on a core of its own a second one only waits."""

    def submit(
        self,
        work: Callable[ArgumentsT, ResultT],
        /,
        *arguments: ArgumentsT.args,
        **options: ArgumentsT.kwargs,
    ) -> Future[ResultT]:
        """What `work(*arguments, **options)` has given."""
        done: Future[ResultT] = Future()
        try:
            done.set_result(work(*arguments, **options))
        except Exception as error:
            done.set_exception(error)
        return done


class DecodeWindow:
    """Hands images to decoders, and waits for the oldest ones while more than `max_bytes` would be undecoded.

    A single image may be larger; then it is the only one. For one thread at a time.
    """

    def __init__(self, decoders: Executor, max_bytes: int) -> None:
        self._decoders = decoders
        self._max_bytes = max_bytes
        self._undecoded: deque[tuple[int, Future[Any]]] = deque()
        self._bytes = 0

    def submit(
        self,
        decode: Callable[Concatenate[bytes, ArgumentsT], ResultT],
        data: bytes | SampleRejected,
        *arguments: ArgumentsT.args,
        **options: ArgumentsT.kwargs,
    ) -> Future[ResultT | SampleRejected]:
        """What `decode(data, *arguments, **options)` gives in a decode thread, or why there is no such image."""
        size_bytes = 0 if isinstance(data, SampleRejected) else len(data)
        while self._undecoded:
            oldest_bytes, oldest = self._undecoded[0]
            if not oldest.done():
                if self._bytes + size_bytes <= self._max_bytes:
                    break
                wait([oldest])
            self._undecoded.popleft()
            self._bytes -= oldest_bytes
        future = self._decoders.submit(_outcome, lambda image: decode(image, *arguments, **options), data)
        self._undecoded.append((size_bytes, future))
        self._bytes += size_bytes
        return future


def _outcome(decode: Callable[[bytes], ResultT], data: bytes | SampleRejected) -> ResultT | SampleRejected:
    """What `decode` gives or rejects. An error that is raised holds the frames that it has passed, and they its pixels.

    Through a future that its taker holds too, such an error would keep them until Python looks for cycles.
    """
    if isinstance(data, SampleRejected):
        return data
    try:
        return decode(data)
    except SampleRejected as rejected:
        untraced = SampleRejected(rejected.code, rejected.stage, rejected.reason)
    return untraced
