from __future__ import annotations

from convoy.core.differences import Difference, describe_changes, differences


def test_values_are_named_by_the_keys_that_lead_to_them() -> None:
    first = {"a": {"b": 1, "c": [1, 2]}, "same": True, "gone": None}
    second = {"a": {"b": 2, "c": [1, 3]}, "same": True, "new": "x"}
    assert differences(first, second) == [
        Difference(key="a.b", first=1, second=2),
        Difference(key="a.c", first=[1, 2], second=[1, 3]),
        Difference(key="new", first=None, second="x"),
    ]
    assert differences(first, first) == []


def test_changes_are_told_a_line_each() -> None:
    assert describe_changes({"a": {"b": 1}}, {"a": {"b": "1"}}) == ["  a.b: was 1, is '1'"]
