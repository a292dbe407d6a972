"""What pydantic finds wrong with a config, in the words of whoever wrote it."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError


def explained(model: type[BaseModel], error: ValidationError) -> list[str]:
    """One line for each thing that is wrong with a config of the model, after its dotted key."""
    return [_line(model, problem) for problem in _without_lost_items(error.errors())]


def _without_lost_items(problems: Sequence[Any]) -> list[Any]:
    """The problems without those of lists that are too short only for want of the items that are wrong."""
    above = {problem["loc"][:depth] for problem in problems for depth in range(len(problem["loc"]))}
    return [problem for problem in problems if problem["type"] != "too_short" or problem["loc"] not in above]


def _line(model: type[BaseModel], problem: Any) -> str:
    *section, key = location = [str(part) for part in problem["loc"]] or [model.__name__]
    dotted = ".".join(location)
    if problem["type"] != "extra_forbidden":
        return f"{dotted}: {problem['msg']}"
    nearest = difflib.get_close_matches(key, _keys(model, section), n=1)
    hint = f"; did you mean '{nearest[0]}'?" if nearest else ""
    return f"{dotted}: unknown key{hint}"


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
