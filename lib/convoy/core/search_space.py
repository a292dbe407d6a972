"""Search spaces as values: which settings a search may choose from, and which point is drawn as the n-th."""

from __future__ import annotations

import copy
import difflib
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from convoy.core.errors import ConfigError
from convoy.core.fingerprints import digest
from convoy.core.randomness import generator

# Draws in a row that were drawn before, after which the rest of a finite space comes in its own order.
_MAX_REPEATS = 1000


class Scale(StrEnum):
    """How numbers between two ends are spread."""

    UNIFORM = "uniform"
    LOG_UNIFORM = "log_uniform"
    INT = "int"  # whole numbers, both ends included


@dataclass(frozen=True, slots=True)
class Choice:
    """One of some values, each as likely."""

    values: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Grid:
    """Every one of some values, together with every one of each other grid."""

    values: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Range:
    """A number between two ends."""

    low: float
    high: float
    scale: Scale


Domain = Choice | Grid | Range
Values = dict[str, Any]
_WORDS = ("choice", "grid", *Scale)


@dataclass(frozen=True, slots=True)
class SearchSpace:
    """A domain for each dotted key of a config. The key `config` stands for the whole of it."""

    domains: Mapping[str, Domain]

    @property
    def keys(self) -> Iterator[str]:
        """All dotted keys that get a value, those of the mappings under `config` among them."""
        for key, domain in self.domains.items():
            if key == WHOLE_CONFIG and not isinstance(domain, Range):
                yield from (str(inner) for value in domain.values for inner in value)
            else:
                yield key

    @property
    def grid_size(self) -> int:
        """Cells of the grids together; 1 without any."""
        return math.prod(len(one.values) for one in self.domains.values() if isinstance(one, Grid))

    @property
    def is_grid(self) -> bool:
        """Whether nothing is drawn, so that the number of points follows from the space."""
        return all(isinstance(domain, Grid) for domain in self.domains.values())

    @property
    def num_points(self) -> float:
        """Distinct points; infinite where a range has fractions."""
        return math.prod(_num_values(domain) for domain in self.domains.values())

    def points(self, seed: int) -> Iterator[Values]:
        """Distinct points in an order that depends on the seed only; ends where a finite space is exhausted.

        The grid is gone through again and again, each time with new draws of the other keys.
        """
        seen: set[str] = set()
        repeats, num_points = 0, self.num_points
        for number in itertools.count():
            values = self._point(seed, number)
            name = digest(values)
            if name in seen:
                repeats += 1
                if repeats > _MAX_REPEATS * self.grid_size:
                    yield from (values for values in self._all_points() if digest(values) not in seen)
                    return
                continue
            repeats = 0
            seen.add(name)
            yield values
            if len(seen) == num_points:
                return

    def spot_checks(self, limit: int) -> Iterator[Values]:
        """Points that hold every listed value and both ends of every range.

        All combinations of these where there are at most `limit`, else each beside the first of the others.
        """
        edges = {key: _edges(domain) for key, domain in self.domains.items()}
        if math.prod(len(values) for values in edges.values()) <= limit:
            for combination in itertools.product(*edges.values()):
                yield dict(zip(edges, combination, strict=True))
            return
        first = {key: values[0] for key, values in edges.items()}
        for key, values in edges.items():
            for value in values:
                yield {**first, key: value}

    def _all_points(self) -> Iterator[Values]:
        """Every point of a finite space; none of an infinite one."""
        if self.num_points == math.inf:
            return
        values = {
            key: range(int(domain.low), int(domain.high) + 1) if isinstance(domain, Range) else domain.values
            for key, domain in self.domains.items()
        }
        for combination in itertools.product(*values.values()):
            yield dict(zip(values, combination, strict=True))

    def _point(self, seed: int, number: int) -> Values:
        cell, values = number % self.grid_size, {}
        for key, domain in self.domains.items():
            if isinstance(domain, Grid):
                cell, position = divmod(cell, len(domain.values))
                values[key] = domain.values[position]
            else:
                values[key] = _draw(domain, seed, number, key)
        return values


def parse_space(settings: Mapping[str, Any]) -> SearchSpace:
    """The space of a config's mapping from dotted keys to domains; sections may be nested as well.

    A domain is `{choice: [...]}`, `{grid: [...]}`, `{uniform: [a, b]}`, `{log_uniform: [a, b]}` or
    `{int: [a, b]}`. Raises ConfigError that names the key.
    """
    domains = dict(_domains(settings, ()))
    if not domains:
        raise ConfigError(
            "the search space is empty: there is nothing to choose from",
            where="space",
            next_step="give at least one key a domain, such as `learning_rate: {log_uniform: [0.01, 1]}`",
        )
    return SearchSpace(domains)


def with_values(settings: Mapping[str, Any], values: Values) -> dict[str, Any]:
    """The settings of a config with some values put in at their dotted keys; neither argument is changed.

    The keys of a value under `config`, dotted as well, are put in first. A value that is a section replaces the
    whole section, before keys in it are put in. Raises ConfigError where a key leads through something that is no
    section.
    """
    result = copy.deepcopy(dict(settings))
    others = {dotted: value for dotted, value in values.items() if dotted != WHOLE_CONFIG}
    for group in (values.get(WHOLE_CONFIG, {}), others):
        # Not in the order of the mapping: a drawn point that was read back from its JSON has another.
        for dotted in sorted(map(str, group), key=lambda key: key.count(".")):
            _put(result, dotted, copy.deepcopy(group[dotted]))
    return result


WHOLE_CONFIG = "config"


def _domains(section: Mapping[str, Any], above: Sequence[str]) -> Iterator[tuple[str, Domain]]:
    for key, value in section.items():
        path = (*above, str(key))
        dotted = ".".join(path)
        if not isinstance(value, Mapping) or not value:
            raise _bad_domain(dotted, f"is {value!r}, which is no domain")
        if len(value) == 1 and next(iter(value)) in _WORDS:
            ((word, arguments),) = value.items()
            yield dotted, _domain(dotted, word, arguments)
        elif any(not isinstance(inner, Mapping) for inner in value.values()):
            raise _bad_domain(dotted, _guess(value))
        else:
            yield from _domains(value, path)


def _guess(value: Mapping[str, Any]) -> str:
    nearest = difflib.get_close_matches(str(next(iter(value))), _WORDS, n=1)
    return f"has no domain '{next(iter(value))}'" + (f"; did you mean '{nearest[0]}'?" if nearest else "")


def _domain(dotted: str, word: str, arguments: Any) -> Domain:
    if not isinstance(arguments, list | tuple) or not arguments:
        raise _bad_domain(dotted, f"needs a list of values under '{word}'")
    if dotted == WHOLE_CONFIG and not all(isinstance(value, Mapping) for value in arguments):
        raise _bad_domain(dotted, "stands for the whole config: its values are mappings of keys")
    if word in ("choice", "grid"):
        if len({digest(value) for value in arguments}) < len(arguments):
            raise _bad_domain(dotted, f"lists a value twice under '{word}'")
        return Choice(tuple(arguments)) if word == "choice" else Grid(tuple(arguments))
    scale = Scale(word)
    try:
        low, high = (int(end) if scale is Scale.INT else float(end) for end in arguments)
    except (TypeError, ValueError):
        raise _bad_domain(dotted, f"needs two numbers under '{word}'") from None
    lowest = 0.0 if scale is Scale.LOG_UNIFORM else -math.inf
    if not lowest < low < high < math.inf:
        positive = "positive, " if scale is Scale.LOG_UNIFORM else ""
        raise _bad_domain(dotted, f"needs ends that are {positive}finite and ascending, not {arguments}")
    return Range(low, high, scale)


def _bad_domain(dotted: str, problem: str) -> ConfigError:
    return ConfigError(
        f"the key '{dotted}' of the search space {problem}",
        where=f"space.{dotted}",
        next_step="use one of {choice: [...]}, {grid: [...]}, {uniform: [a, b]}, {log_uniform: [a, b]}, {int: [a, b]}",
    )


def _put(settings: dict[str, Any], dotted: str, value: Any) -> None:
    *sections, key = dotted.split(".")
    target = settings
    for section in sections:
        inner = target.get(section)
        if inner is None:
            inner = target[section] = {}
        if not isinstance(inner, dict):
            raise ConfigError(
                f"'{section}' is {inner!r}, not a section: '{dotted}' cannot be set in it",
                where=f"space.{dotted}",
                next_step=f"write `{section}` in `base` as a section",
            )
        target = inner
    target[key] = value


def _draw(domain: Choice | Range, seed: int, number: int, key: str) -> Any:
    random = generator(seed, "search", number, key)
    if isinstance(domain, Choice):
        return domain.values[int(random.integers(len(domain.values)))]
    match domain.scale:
        case Scale.INT:
            return int(random.integers(int(domain.low), int(domain.high), endpoint=True))
        case Scale.UNIFORM:
            return float(random.uniform(domain.low, domain.high))
        case Scale.LOG_UNIFORM:
            drawn = math.exp(random.uniform(math.log(domain.low), math.log(domain.high)))
            return min(max(drawn, domain.low), domain.high)


def _num_values(domain: Domain) -> float:
    if not isinstance(domain, Range):
        return len(domain.values)
    return int(domain.high) - int(domain.low) + 1 if domain.scale is Scale.INT else math.inf


def _edges(domain: Domain) -> tuple[Any, ...]:
    if isinstance(domain, Range):
        return (domain.low, domain.high)
    return domain.values
