from __future__ import annotations

from convoy.report.stillness import Stillness


def test_it_is_told_after_two_minutes_and_each_time_that_they_have_doubled() -> None:
    stillness = Stillness(1000.0)
    told = {now_s - 1000: line for now_s in range(1000, 2000, 5) if (line := stillness.news(now_s))}
    assert told == {
        seconds: f"no slice has been finished for {seconds} s" for seconds in (120, 240, 480, 960)
    }


def test_slices_that_take_long_are_not_told_of() -> None:
    stillness = Stillness(0.0)
    stillness.finished(100.0)
    stillness.finished(150.0)
    assert stillness.news(449.0) is None
    assert stillness.news(450.0) == "no slice has been finished for 300 s; before, 100 s were the most"
    assert stillness.news(749.0) is None
    stillness.finished(750.0)
    # The wait that was told of is a usual one from now on.
    assert stillness.news(750.0 + 1799.0) is None
    assert stillness.news(750.0 + 1800.0) is not None
