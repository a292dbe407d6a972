from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from pydantic import AfterValidator, Field, PositiveFloat, PositiveInt

from convoy.core.config import (
    StrictModel,
    as_override,
    load_config,
    parse_config,
    read_settings,
    write_settings,
)
from convoy.core.errors import ConfigError


class Inner(StrictModel):
    learning_rate: float = 0.1


class Outer(StrictModel):
    name: str
    views: int = 1
    inner: Inner = Inner()
    steps: tuple[Inner, ...] = ()
    space: dict[str, Any] = Field(default_factory=dict)
    taps: tuple[str, ...] = ("pooled",)


def test_file_then_overrides(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text("name: a\nviews: 2\ninner: {learning_rate: 0.5}\n")
    config = load_config(Outer, str(path), ["views=3", "inner.learning_rate=1e-3", "taps=[stem, pooled]"])
    assert config == Outer(name="a", views=3, inner=Inner(learning_rate=0.001), taps=("stem", "pooled"))


def test_override_makes_a_missing_section(tmp_path: Path) -> None:
    assert load_config(Outer, None, ["name=x", "inner.learning_rate=2"]).inner.learning_rate == 2
    path = tmp_path / "job.yaml"
    path.write_text("name: x\ninner:\n")
    assert load_config(Outer, str(path), ["inner.learning_rate=2"]).inner.learning_rate == 2


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("inner.lerning_rate=1", "did you mean 'learning_rate'"),
        ("veiws=1", "did you mean 'views'"),
        ("views=many", "views"),
        ("views", "section.key=value"),
        ("name.x=1", "'name' is a value, 'x', not a section"),
        ("inner.learning_rate.x.y=1", r"--set 'inner\.learning_rate=\{KEY: VALUE"),
        ("views=[", "not valid YAML"),
        ("name=2026-02-30", "not valid YAML: '2026-02-30' is no timestamp: day is out of range"),
        ("inner.learning_rate=.inf", r"inner\.learning_rate: inf is no finite number"),
        ("inner.learning_rate=-inf", r"inner\.learning_rate: -inf is no finite number"),
        ("inner.learning_rate=1e999", r"inner\.learning_rate: inf is no finite number"),
        ("steps=[{}, {learning_rate: .nan}]", r"steps\.1\.learning_rate: nan is no finite number"),
        ("space.rate={choices: [0.1, .inf]}", r"space\.rate\.choices\.1: inf is no finite number"),
    ],
)
def test_bad_override_is_explained(override: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load_config(Outer, None, ["name=x", "inner.learning_rate=1", override])


@pytest.mark.parametrize(
    "value",
    [
        "/data/\U00020bb7 \U0001f600",
        "no UTF-8: \udcff",
        "a\x85b\u2028c",
        "true",
        "1",
        "2026-01-01",
        "~",
        "",
        "a: #b",
        ["x", 3],
        {},
    ],
)
def test_a_value_comes_out_of_its_override_as_it_went_in(value: object) -> None:
    assert read_settings(None, [as_override("inner.key", value)]) == {"inner": {"key": value}}


class Nested(StrictModel):
    name: str = ""
    rotation: Inner | None = None
    phases: tuple[Inner, ...] | None = None
    outer: dict[str, Outer] = Field(default_factory=dict)


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("rotate.degrees=10", "rotate: unknown key; did you mean 'rotation'?"),
        ("learning_rates=1", "learning_rates: unknown key"),
        ("rotation.nam=x", "rotation.nam: unknown key"),
        ("phases=[{lerning_rate: 1}]", "phases.0.lerning_rate: unknown key; did you mean 'learning_rate'?"),
        ("outer={a: {name: x, veiws: 1}}", "outer.a.veiws: unknown key; did you mean 'views'?"),
    ],
)
def test_only_keys_of_the_same_section_are_meant(override: str, line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(Nested, None, [override])
    assert caught.value.what == line


def _refused(value: int) -> int:
    raise ValueError(f"{value} is too few")


class Numbers(StrictModel):
    own: Annotated[int, AfterValidator(_refused)] = 2
    depth: int | str = 0
    clip_norm: float | None = None
    inner: tuple[Inner, ...] = ()
    compile: bool = False
    sync: bool | Literal["auto"] = "auto"
    space: dict[str, Any] = Field(default_factory=dict)
    rates: tuple[PositiveFloat, ...] = Field(default=(1.0,), min_length=1)
    pairs: tuple[Annotated[tuple[PositiveFloat, ...], Field(min_length=2)], ...] = ()
    outer: Outer | None = None
    taps: tuple[int | str, ...] = ()
    workers: PositiveInt | Literal["auto"] = "auto"
    class_map: dict[str, str] | None = None
    two: tuple[str, ...] = Field(default=(), max_length=2)


@pytest.mark.parametrize(
    ("override", "keys"),
    [
        ("rates=[-1]", ["rates.0"]),
        ("rates=[]", ["rates"]),
        ("pairs=[[1, 0], [1], [2, 1]]", ["pairs.0.1", "pairs.1"]),
    ],
)
def test_a_list_is_not_called_too_short_for_an_item_that_is_wrong(override: str, keys: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(Numbers, None, [override])
    assert [line.partition(":")[0] for line in caught.value.what.splitlines()] == keys


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("inner=[adamw]", "inner.0: is a section: set inner.0.learning_rate"),
        ("outer=adamw", "outer: is a section: set outer.name, .views, .inner, .steps, .space, .taps"),
        ("outer={}", "outer.name: is required"),
        ("outer={name: 3}", "outer.name: Input should be a valid string"),
        ("depth=1.5", "depth: must be a whole number or a name"),
        ("depth={int: 3}", "depth: must be a whole number or a name"),
        ("taps=[stem, 1.5]", "taps.1: must be a whole number or a name"),
        ("sync=3", "sync: must be true or false or 'auto'"),
        ("workers=-1", "workers: must be greater than 0 or 'auto'"),
        ("class_map={a: 3}", "class_map.a: Input should be a valid string"),
        ("rates=[]", "rates: needs at least 1, and there are 0"),
        ("pairs=[[1]]", "pairs.0: needs at least 2, and there is 1"),
        ("own=1", "own: 1 is too few"),
        ("two=[a, b, c]", "two: needs at most 2, and there are 3"),
    ],
)
def test_what_is_wrong_is_said_in_words_of_a_config(override: str, line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(Numbers, None, [override])
    assert caught.value.what == line


def test_what_a_command_has_an_option_for_is_named_by_it() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(Outer, {"inner": 3}, where="--set", options=("name", "views"))
    assert caught.value.what.splitlines() == [
        "name: is required: give --name",
        "inner: is a section: set inner.learning_rate",
    ]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("depth=true", "depth: true is no number"),
        ("depth=off", "depth: false is no number"),
        ("clip_norm=yes", "clip_norm: true is no number"),
        ("inner=[{}, {learning_rate: true}]", r"inner\.1\.learning_rate: true is no number"),
    ],
)
def test_a_truth_value_is_no_number(override: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load_config(Numbers, None, [override])


def test_truth_values_and_words_stay_what_they_are() -> None:
    config = load_config(
        Numbers, None, ["compile=1", "sync=true", "depth='true'", "clip_norm=1", "space={a: true}"]
    )
    assert config == Numbers(compile=True, sync=True, depth="true", clip_norm=1.0, space={"a": True})


def test_missing_required_key_is_named() -> None:
    with pytest.raises(ConfigError, match="name: is required"):
        load_config(Outer, None, [])


@pytest.mark.parametrize(
    "text", ["name: a\nname: b\n", "name: a\ninner: {learning_rate: 1, learning_rate: 2}\n"]
)
def test_a_key_that_stands_twice_is_refused_with_its_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"the key '(name|learning_rate)' stands there twice[^$]*line 2"):
        load_config(Outer, str(path))
    with pytest.raises(ConfigError, match="stands there twice"):
        load_config(Outer, None, ["name=a", "inner={learning_rate: 1, learning_rate: 2}"])


def test_a_key_may_take_the_place_of_one_that_is_merged_in(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text("a: &a {x: 1, y: 2}\nin: {b: &b {<<: *a, x: 3}}\nc: {<<: *b, y: 4, '1': 5, 1: 6}\n")
    assert read_settings(str(path), []) == {
        "a": {"x": 1, "y": 2},
        "in": {"b": {"x": 3, "y": 2}},
        "c": {"x": 3, "y": 4, "1": 5, 1: 6},
    }


@pytest.mark.parametrize("value", ["2026-02-30", "2026-01-01T25:00:00", "0x_"])
def test_a_value_that_only_looks_like_a_date_or_a_number_is_refused_with_its_line(
    tmp_path: Path, value: str
) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(f"views: 1\ninner: {{name: [{value}]}}\n")
    with pytest.raises(ConfigError, match=rf"not valid YAML: '{value}' is no (timestamp|int): [^$]*line 2"):
        load_config(Outer, str(path))
    path.write_text(f"views: 1\nname: '{value}'\n")
    assert load_config(Outer, str(path)).name == value


@pytest.mark.parametrize(
    ("key", "read"),
    [("on", "True"), ("no", "False"), ("~", "None"), ("3", "3"), ("2026-01-01", "2026-01-01")],
)
def test_a_key_that_yaml_reads_as_no_text_is_named_as_it_was_read(
    tmp_path: Path, key: str, read: str
) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(f"name: a\n{key}: 1\n")
    with pytest.raises(ConfigError, match=f"a key that YAML reads as {read}, [^$]*put it in quotes"):
        read_settings(str(path), [])
    path.write_text(f"'{key}': 1\n")
    assert read_settings(str(path), []) == {key: 1}


@pytest.mark.parametrize("text", ["- a\n- b\n", "a: [", "\xff"])
def test_file_that_is_not_a_mapping_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "job.yaml"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError):
        load_config(Outer, str(path))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "the config file is empty"),
        (b" \n\n", "the config file is empty"),
        (b"\x89PNG\r\n", "not valid YAML: 'utf-8' codec can't decode byte 0x89"),
        (b"name: \0", "not valid YAML: unacceptable character"),
        (b"name", "must be a mapping"),
    ],
)
def test_a_file_that_is_no_config_is_named_with_what_to_do(tmp_path: Path, data: bytes, words: str) -> None:
    path = tmp_path / "job.yaml"
    path.write_bytes(data)
    with pytest.raises(ConfigError, match=words) as caught:
        load_config(Outer, str(path), ["name=x"])
    assert caught.value.where == str(path)
    assert "key: value" in caught.value.next_step


def test_a_file_of_comments_leaves_all_to_overrides(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text("# name: a\n")
    assert load_config(Outer, str(path), ["name=x"]) == Outer(name="x")


def test_missing_file_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        load_config(Outer, "/nowhere/job.yaml")


def test_a_folder_in_place_of_a_config_file_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        load_config(Outer, str(tmp_path))


def test_settings_that_were_written_are_read_to_the_same_values(tmp_path: Path) -> None:
    settings = {
        "rate": 1e-05,
        "text": "1e-05",
        "yes": "on",
        "none": None,
        "list": [1, 2.5, "ü"],
        "inner": {"flag": False},
    }
    path = tmp_path / "written.yaml"
    path.write_text(write_settings(settings), encoding="utf-8")
    assert read_settings(str(path), []) == settings
