"""What pydantic finds wrong with a config, in the words of whoever wrote it."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterator, Sequence
from types import NoneType, UnionType
from typing import Any, Union, get_origin

from pydantic import BaseModel, ValidationError

# What a value of a union may be, by the beginning of pydantic's name for what it is not. Text is a name there.
_KINDS = {"int": "a whole number", "float": "a number", "bool": "true or false", "string": "a name"}
_OPENING = "Input should be "


def explained(model: type[BaseModel], error: ValidationError, options: Collection[str] = ()) -> list[str]:
    """One line for each key of a config of the model that is wrong; `options` as in `parse_config`."""
    found: dict[tuple[str, ...], list[Any]] = {}
    for problem in _without_lost_items(error.errors()):
        found.setdefault(_location(model, problem), []).append(problem)
    return [
        f"{'.'.join(location) or model.__name__}: {_explanation(model, location, problems, options)}"
        for location, problems in found.items()
    ]


def _without_lost_items(problems: Sequence[Any]) -> list[Any]:
    """The problems without those of lists that are too short only for want of the items that are wrong."""
    above = {problem["loc"][:depth] for problem in problems for depth in range(len(problem["loc"]))}
    return [problem for problem in problems if problem["type"] != "too_short" or problem["loc"] not in above]


def _location(model: type[BaseModel], problem: Any) -> tuple[str, ...]:
    """Where a problem is; that of a kind in a union, which has its name behind the key, is at the key."""
    location = tuple(str(part) for part in problem["loc"])
    is_kind = (
        problem["type"] != "extra_forbidden"
        and location[-1:]
        and _is_union(_declared(model, location[:-1]))
        and location[-1] not in _keys(model, location[:-1])
    )
    return location[:-1] if is_kind else location


def _explanation(
    model: type[BaseModel], location: Sequence[str], problems: Sequence[Any], options: Collection[str]
) -> str:
    """What is wrong at a location: one problem, or one with each kind of a union."""
    if len(problems) > 1:
        return f"must be {' or '.join(dict.fromkeys(_kind(problem) for problem in problems))}"
    (problem,) = problems
    match problem["type"]:
        case "extra_forbidden":
            nearest = difflib.get_close_matches(location[-1], _keys(model, location[:-1]), n=1)
            return "unknown key" + (f"; did you mean '{nearest[0]}'?" if nearest else "")
        case "missing":
            key = ".".join(location)
            return "is required" + (f": give --{key}" if key in options else "")
        case "model_type":
            keys = ", .".join(_keys(model, location))
            return f"is a section: set {'.'.join([*location, keys])}"
        case "too_short" | "too_long" as kind:
            limit, bound = ("at least", "min_length") if kind == "too_short" else ("at most", "max_length")
            given = problem["ctx"]["actual_length"]
            return f"needs {limit} {problem['ctx'][bound]}, and there {'is' if given == 1 else 'are'} {given}"
        case _:
            return str(problem["msg"]).removeprefix("Value error, ")


def _kind(problem: Any) -> str:
    return _KINDS.get(problem["type"].partition("_")[0], str(problem["msg"]).removeprefix(_OPENING))


def _keys(model: type[BaseModel], location: Sequence[str]) -> list[str]:
    """The keys that the section at a location of a config may have; none where there is a value."""
    return [key for section in _models_in(_declared(model, location)) for key in section.model_fields]


def _declared(model: type[BaseModel], location: Sequence[str]) -> Any:
    """The type of the last key on the way to a location: numbers of items and kinds of a union have none."""
    declared: Any = model
    for part in location:
        fields = (section.model_fields.get(part) for section in _models_in(declared))
        declared = next((field.annotation for field in fields if field is not None), declared)
    return declared


def _models_in(declared: Any) -> Iterator[type[BaseModel]]:
    """The models that a type names, not those inside of them."""
    if isinstance(declared, type) and issubclass(declared, BaseModel):
        yield declared
    for argument in getattr(declared, "__args__", ()):
        yield from _models_in(argument)


def _is_union(declared: Any) -> bool:
    """Whether a type, or that of its items, leaves a choice beside null."""
    kinds = [kind for kind in getattr(declared, "__args__", ()) if kind is not NoneType]
    return (get_origin(declared) in {Union, UnionType} and len(kinds) > 1) or any(map(_is_union, kinds))
