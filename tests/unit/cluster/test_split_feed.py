from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from convoy.cluster.running_ahead import ahead
from convoy.cluster.split_feed import TaskOrder


def test_tasks_are_each_epochs_steps_and_then_its_validation() -> None:
    tasks = TaskOrder(num_steps=3, num_validation_batches=2)
    assert [tasks.parse(task) for task in range(7)] == [
        (0, 0, True),
        (0, 1, True),
        (0, 2, True),
        (0, 0, False),
        (0, 1, False),
        (1, 0, True),
        (1, 1, True),
    ]
    for task in range(20):
        epoch, number, is_step = tasks.parse(task)
        assert tasks.step(epoch, number if is_step else 3 + number) == task


def test_items_come_in_order_and_the_thread_ends_with_them() -> None:
    assert list(ahead(range(50), 3)) == list(range(50))
    assert all(thread.name != "ahead" for thread in threading.enumerate())


def test_an_error_of_the_items_comes_after_those_before_it() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise ValueError("broken")

    taken = ahead(items(), 3)
    assert next(taken) == 1
    with pytest.raises(ValueError, match="broken"):
        next(taken)


def test_closing_early_closes_the_items() -> None:
    closed = threading.Event()

    def items() -> Iterator[int]:
        try:
            yield from range(1000)
        finally:
            closed.set()

    taken = ahead(items(), 2)
    assert next(taken) == 0
    taken.close()
    assert closed.is_set()
