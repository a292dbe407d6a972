from __future__ import annotations

import pytest

from convoy.report.words import duration, size


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1e3, "1 kB"),
        (1.234e9, "1.23 GB"),
        (999.9e9, "1,000 GB"),
        (1.5e12, "1.5 TB"),
        (66e15, "66 PB"),
        (1.5e18, "1,500 PB"),
    ],
)
def test_sizes_have_the_largest_unit_that_fits(num_bytes: float, text: str) -> None:
    assert size(num_bytes) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0 s"),
        (0.0312, "0.0312 s"),
        (119.0, "119 s"),
        (120.0, "2 min"),
        (7200.0, "2 h"),
        (47.5 * 3600, "47.5 h"),
        (1250 * 3600.0, "52.1 days"),
        (1234.4 * 86400, "1,234 days"),
    ],
)
def test_times_have_the_unit_that_suits_them(seconds: float, text: str) -> None:
    assert duration(seconds) == text
