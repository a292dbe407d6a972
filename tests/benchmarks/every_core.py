"""Rates of work that a process for each core does at once: what a machine can do, whatever Python's lock forbids."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from threading import Barrier
from types import TracebackType

import torch

from convoy.vision.forward import best_device, casting_once

_WARM_UP_ROUNDS = 3
_PATIENCE_S = 120.0

# Does some work, and says for how many images.
Round = Callable[[], int]


class EveryCore:
    """A process for each core, started once for all the rates that are asked of them."""

    def __init__(self) -> None:
        self.num_processes = os.cpu_count() or 1
        context = multiprocessing.get_context("spawn")
        self._manager = context.Manager()
        self._start = self._manager.Barrier(self.num_processes, timeout=_PATIENCE_S)
        self._processes = ProcessPoolExecutor(self.num_processes, mp_context=context)

    def __enter__(self) -> EveryCore:
        """Processes start with the first rate."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the processes."""
        self._processes.shutdown()
        self._manager.shutdown()

    def rate(self, make_round: Callable[[int], Round], probe_s: float) -> float:
        """Images per second of all processes; number i repeats what `make_round(i)` gives it, with one thread.

        They begin when all are ready. `make_round` is sent to them, so it is a function of a module, or a partial one.
        """
        rates = [
            self._processes.submit(_rate_at_once, make_round, place, probe_s, self._start)
            for place in range(self.num_processes)
        ]
        return sum(rate.result() for rate in rates)

    def fastest(self, make_round: Callable[[int, int], Round], probe_s: float, *, compiled: bool) -> float:
        """Images per second of this process with all cores or, without a GPU, of a process for each, if that is more.

        `make_round(num_threads, place)` is what it is to `rate`. Compiled networks run in this process only.
        """
        rate = steady_rate_of(make_round(self.num_processes, 0), probe_s)
        if self.num_processes == 1 or compiled or torch.cuda.is_available():
            return rate
        return max(rate, self.rate(partial(make_round, 1), probe_s))


def steady_rate_of(run_round: Round, probe_s: float) -> float:
    """Images per second of whole rounds, for `probe_s` seconds or a little longer, after a few to warm up."""
    with casting_once(best_device()):
        for _ in range(_WARM_UP_ROUNDS):
            run_round()
        num_images, started_s = 0, time.perf_counter()
        while (elapsed_s := time.perf_counter() - started_s) < probe_s:
            num_images += run_round()
        return num_images / elapsed_s


def _rate_at_once(make_round: Callable[[int], Round], place: int, probe_s: float, start: Barrier) -> float:
    torch.set_num_threads(1)
    run_round = make_round(place)
    run_round()
    start.wait()
    return steady_rate_of(run_round, probe_s)
