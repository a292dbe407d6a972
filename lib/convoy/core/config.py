"""One YAML file a job, read strictly: an unknown key is an error that names the nearest valid one."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError
from yaml.composer import ComposerError
from yaml.constructor import ConstructorError

from convoy.core.config_problems import explained
from convoy.core.errors import ConfigError
from convoy.core.json_values import leaves, not_finite


class StrictModel(BaseModel):
    """Base of all config models: immutable, and closed to unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)


ConfigT = TypeVar("ConfigT", bound=BaseModel)

_NO_CONFIG = (
    "write `key: value` lines into the file, as in the examples in jobs/configs, or name another by --config"
)


def load_config(model: type[ConfigT], path: str | None, overrides: Sequence[str] = ()) -> ConfigT:
    """The config of a job from a YAML file (may be None) and `section.key=value` overrides, in that order.

    Values of overrides are read as YAML, so `views=3`, `taps=[pooled]` and `weights=null` mean what they say.
    Raises ConfigError for a file that cannot be read, bad YAML, an unknown key or a value that does not fit.
    """
    return parse_config(model, read_settings(path, overrides), where=path or "--set")


def parse_config(
    model: type[ConfigT], settings: Mapping[str, Any], *, where: str, options: Collection[str] = ()
) -> ConfigT:
    """The config that a mapping of keys describes; ConfigError for an unknown key or a value that does not fit.

    `options` are the keys that a command has an option of the same name for, which is named where they are missing.
    A number that is not finite fits nowhere: the records of a job are JSON, which has no word for it. Nor does a truth
    value in place of a number, which pydantic takes for 0 or 1.
    """
    try:
        config = model.model_validate(settings)
        values = config.model_dump()
        problems = [f"{key}: {value} is no finite number" for key, value in not_finite(values)]
        problems += [
            f"{key}: {str(truth).lower()} is no number" for key, truth in _taken_for_numbers(settings, values)
        ]
    except ValidationError as error:
        problems = explained(model, error, options)
    if problems:
        raise ConfigError(
            "\n".join(problems),
            where=where,
            next_step="correct the config, or see the examples in jobs/configs",
        )
    return config


def _read_file(path: str) -> bytes:
    return Path(path).read_bytes()


def read_settings(
    path: str | None, overrides: Sequence[str], *, read: Callable[[str], bytes] = _read_file
) -> dict[str, Any]:
    """What a config (may be None) and its overrides say, unchecked; `read` gives the bytes at a path.

    Raises ConfigError for a file that cannot be read or is empty, bad YAML or an override that cannot be read.
    """
    settings = _read_yaml(path, read) if path else {}
    for override in overrides:
        _apply_override(settings, override)
    return settings


def as_override(key: str, value: Any) -> str:
    """An override that sets a key to a value, whatever characters that has: JSON's escapes are not all YAML's."""
    return f"{key}={yaml.safe_dump(value, default_flow_style=True)}"


def write_settings(settings: Mapping[str, Any]) -> str:
    """Settings as the text of a config file, which `read_settings` reads to the same values."""
    return yaml.safe_dump(dict(settings), sort_keys=True, allow_unicode=True)


class _StrictLoader(yaml.SafeLoader):
    """PyYAML, which also refuses a key twice in one mapping, and in its own words what only looks like a date."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """A mapping as it is written, before what `<<` brings is merged into it."""
        node = super().compose_mapping_node(anchor)
        seen: set[tuple[str, Any]] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if (key.tag, key.value) in seen:
                    raise ComposerError(
                        None, None, f"the key '{key.value}' stands there twice", key.start_mark
                    )
                seen.add((key.tag, key.value))
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """The value of a node; a YAML error too where it only looks like a date or a number, as 2026-02-30."""
        try:
            return super().construct_object(node, deep=deep)
        except ValueError as error:
            raise ConstructorError(
                None, None, f"'{node.value}' is no {node.tag.rpartition(':')[2]}: {error}", node.start_mark
            ) from None


def _parse_yaml(text: str) -> Any:
    return yaml.load(text, _StrictLoader)


def _read_yaml(path: str, read: Callable[[str], bytes]) -> dict[str, Any]:
    try:
        text = read(path).decode()
        loaded = _parse_yaml(text)
    except FileNotFoundError:
        raise ConfigError("the config file does not exist", where=path, next_step="check --config") from None
    except OSError as error:
        raise ConfigError(
            f"the config file cannot be read: {error.strerror}", where=path, next_step="check --config"
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"the config is not valid YAML: {error}", where=path, next_step=_NO_CONFIG
        ) from None
    if not text.strip():
        raise ConfigError("the config file is empty", where=path, next_step=_NO_CONFIG)
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise ConfigError("the config must be a mapping of keys to values", where=path, next_step=_NO_CONFIG)
    for key in loaded:
        if not isinstance(key, str):
            raise ConfigError(
                f"the config has a key that YAML reads as {key}, which is no text",
                where=path,
                next_step="correct the key, or put it in quotes: on, off, yes, no, null, numbers and dates are no text",
            )
    return loaded


def _apply_override(settings: dict[str, Any], override: str) -> None:
    dotted, separator, text = override.partition("=")
    if not separator or not dotted:
        raise ConfigError(
            "an override must look like section.key=value", where=override, next_step="correct --set"
        )
    *sections, key = dotted.strip().split(".")
    target = settings
    for depth, section in enumerate(sections, start=1):
        if target.get(section) is None:
            # Missing, or a section of which a file has the name only.
            target[section] = {}
        target = target[section]
        if not isinstance(target, dict):
            raise ConfigError(
                f"'{section}' is a value, '{target}', not a section",
                where=override,
                next_step=f"set the whole section: --set '{'.'.join(sections[:depth])}={{KEY: VALUE, ...}}'",
            )
    try:
        target[key] = _parse_yaml(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"the value is not valid YAML: {error}", where=override) from None


def _taken_for_numbers(settings: Mapping[str, Any], values: Mapping[str, Any]) -> Iterator[tuple[str, bool]]:
    """The truth values among settings that have become numbers, each after its dotted key."""
    became = dict(leaves(values))
    for key, said in leaves(settings):
        if isinstance(said, bool) and type(became.get(key)) in {int, float}:
            yield key, said
