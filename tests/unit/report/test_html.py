from __future__ import annotations

import json

import pytest
from markupsafe import Markup

from convoy.report.html import breakable, clean, json_text, shorten


def test_plain_texts_stay_as_they_are() -> None:
    for text in ("plain", "Zürich", "\u0642\u0637\u0629", "日本語", "🙂", "two\nlines"):
        assert clean(text) == text


@pytest.mark.parametrize("code", [0x00, 0x1B, 0x7F, 0x200B, 0x200E, 0x202E, 0x2066, 0xFEFF, 0xE000, 0xD800])
def test_what_cannot_be_seen_is_shown_by_its_code(code: int) -> None:
    assert clean(f"a{chr(code)}b") == f"a\\u{code:04x}b"
    clean(f"a{chr(code)}b").encode()


def test_markup_and_numbers_pass() -> None:
    markup = Markup("<b>\u202e</b>")
    assert clean(markup) is markup
    assert clean(3) == 3


def test_paths_break_behind_a_slash_and_stay_escaped() -> None:
    assert breakable("a/<b>/c\u202e.jpg") == "a/<wbr>&lt;b&gt;/<wbr>c\\u202e.jpg"
    assert breakable("plain") == "plain"


def test_long_texts_lose_their_middle() -> None:
    assert shorten("abcdefghij", 20) == "abcdefghij"
    short = shorten("a" * 50 + "tail", 20)
    assert len(short) == 20
    assert short.endswith("tail")


def test_json_has_no_numbers_that_are_none() -> None:
    text = json_text({"a": float("nan"), "b": [float("inf"), 1.5], "c": "\u202e<"})
    assert json.loads(text) == {"a": None, "b": [None, 1.5], "c": "\u202e<"}
    assert text.isascii()
