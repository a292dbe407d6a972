"""Encoded images wait for decoders as far as their bytes allow."""

from __future__ import annotations

import gc
import time
import weakref
from concurrent.futures import Executor, ThreadPoolExecutor
from threading import Event

import pytest
import torch

from convoy.cluster.decode_window import DecodeWindow, OwnThread, decode_threads
from convoy.core.records import RejectCode, SampleRejected, Stage
from convoy.vision.forward import use_threads


def test_an_image_waits_until_there_is_room_for_its_bytes() -> None:
    third_is_asked_for = Event()
    happened = []

    def decode(data: bytes, name: str) -> None:
        third_is_asked_for.wait()
        # Time for whoever would not wait.
        time.sleep(0.05)
        happened.append(f"{name} decoded")

    with ThreadPoolExecutor(1) as decoders:
        window = DecodeWindow(decoders, max_bytes=250)
        window.submit(decode, bytes(100), "first")
        window.submit(decode, bytes(100), "second")
        third_is_asked_for.set()
        window.submit(decode, bytes(100), "third")
        happened.append("third handed over")
    assert happened.index("first decoded") < happened.index("third handed over")


def test_an_image_larger_than_the_window_is_decoded_alone() -> None:
    with ThreadPoolExecutor(2) as decoders:
        window = DecodeWindow(decoders, max_bytes=10)
        decoded = [window.submit(len, bytes(size)) for size in (4, 100, 5, 5)]
        assert [future.done() for future in decoded[:2]] == [True, True]
        assert [future.result() for future in decoded] == [4, 100, 5, 5]


def test_a_sample_that_could_not_be_fetched_takes_no_room_and_no_decoder() -> None:
    gone = SampleRejected(RejectCode.GONE, Stage.FETCH, "made")
    with ThreadPoolExecutor(1) as decoders:
        window = DecodeWindow(decoders, max_bytes=1)
        lost, found = window.submit(len, gone), window.submit(len, b"x")
        assert (lost.result(), found.result()) == (gone, 1)


class Pixels:
    """Something that a weak reference may point to."""


@pytest.mark.parametrize("decoders", [OwnThread(), ThreadPoolExecutor(1)], ids=["own_thread", "pool"])
def test_a_rejected_image_leaves_its_pixels_without_a_search_for_cycles(decoders: Executor) -> None:
    made = []

    def decode(data: bytes) -> None:
        pixels = Pixels()
        made.append(weakref.ref(pixels))
        try:
            raise OSError("image file is truncated")
        except OSError as error:
            raise SampleRejected(RejectCode.TRUNCATED, Stage.DECODE, f"{len(data)} bytes") from error

    def settle() -> RejectCode:
        future = DecodeWindow(decoders, max_bytes=1).submit(decode, b"x")
        rejected = future.result()
        assert isinstance(rejected, SampleRejected)
        return rejected.code

    gc.disable()
    try:
        assert settle() is RejectCode.TRUNCATED
        decoders.shutdown()
        assert [pixels() for pixels in made] == [None]
    finally:
        gc.enable()


def test_a_decoder_computes_alone_and_leaves_the_network_its_threads() -> None:
    def compute(_: int) -> int:
        torch.zeros(1 << 20).copy_(torch.ones(1 << 20))
        return torch.get_num_threads()

    with (
        ThreadPoolExecutor(1, initializer=use_threads, initargs=(2,)) as operator,
        decode_threads(2) as decoders,
    ):
        assert set(decoders.map(compute, range(8))) == {1}
        assert operator.submit(compute, 0).result() == 2
        assert set(decoders.map(compute, range(8))) == {1}
