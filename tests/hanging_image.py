"""An image whose read never ends, as on a mounted folder whose server has gone."""

from __future__ import annotations

import os
import re
import threading
from pathlib import Path

from process_table import is_descendant, process_table


class HangingImage:
    """While its block runs, a pipe that nobody writes to lies in place of a file; `ended` are workers that it ended.

    They are processes below this one whose title matches `worker`, which is to match one at a time. Once `num_deaths`
    have ended, or the block has, the file is back, the same as before.
    """

    def __init__(self, path: Path, aside: Path, *, worker: str, num_deaths: float = 1) -> None:
        self.ended: list[int] = []
        self._path, self._aside, self._worker, self._num_deaths = path, aside, worker, num_deaths
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> HangingImage:
        os.rename(self._path, self._aside)
        os.mkfifo(self._path)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        if self._aside.exists():
            os.replace(self._aside, self._path)

    def _watch(self) -> None:
        seen: set[int] = set()
        while len(self.ended) < self._num_deaths and not self._stop.wait(0.05):
            processes = process_table()
            self.ended += seen - set(processes)
            seen &= set(processes)
            seen |= {
                pid
                for pid, process in processes.items()
                if re.search(self._worker, process.title) and is_descendant(pid, processes)
            }
        if len(self.ended) >= self._num_deaths:
            os.replace(self._aside, self._path)
