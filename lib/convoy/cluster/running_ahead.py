"""An iterator that a thread runs ahead of whoever takes its items."""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator, Iterable
from dataclasses import dataclass
from typing import TypeVar

ItemT = TypeVar("ItemT")


@dataclass(frozen=True, slots=True)
class _End:
    """After the last item; with the error that ended them, if one did."""

    error: BaseException | None = None


def ahead(items: Iterable[ItemT], num_ahead: int) -> Generator[ItemT]:
    """The items in their order, at most so many of them taken ahead by a thread, which starts with the first.

    An error of the items is raised where they are taken. Closing the iterator early stops the thread and closes
    the items.
    """
    ready: queue.Queue[ItemT | _End] = queue.Queue(num_ahead)
    is_closed = threading.Event()

    def produce() -> None:
        iterator = iter(items)
        try:
            for item in iterator:
                if not _put(ready, item, is_closed):
                    break
            _put(ready, _End(), is_closed)
        except BaseException as error:
            _put(ready, _End(error), is_closed)
        finally:
            if isinstance(iterator, Generator):
                iterator.close()

    thread = threading.Thread(target=produce, name="ahead", daemon=True)
    thread.start()
    try:
        while not isinstance(item := ready.get(), _End):
            yield item
        if item.error is not None:
            raise item.error
    finally:
        is_closed.set()
        thread.join()


def _put(ready: queue.Queue[ItemT], item: ItemT, is_closed: threading.Event) -> bool:
    """Wait for room, but not for a consumer that has gone; whether the item was put."""
    while not is_closed.is_set():
        try:
            ready.put(item, timeout=0.1)
            return True
        except queue.Full:
            continue
    return False
