"""The configuration reference, generated from the schema: python -m tools.reference > docs/configuration.md"""

import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import annotated_types as rules
from pydantic.fields import FieldInfo

from dcpo_openrlhf.recipe.fields import Section
from dcpo_openrlhf.recipe.schema import Recipe

INTRODUCTION = """# Configuration

Every key of a recipe, from the schema in [`dcpo_openrlhf/recipe/schema.py`](../dcpo_openrlhf/recipe/schema.py).
This page is generated: `python -m tools.reference > docs/configuration.md`.

A recipe is YAML and lists only what differs from the defaults; a command line adds `section.key=value`.
`base: FILE` at its top level, a path from the recipe's own folder, names a recipe that this one is laid over, section
by section.
Unknown keys, wrong types and broken rules are errors, all told at once. Rules between keys (`recipe/rules.py`) and
what model, data and machine allow (`recipe/preflight.py`) are checked before anything starts; `--dry-run` does only
that and prints the whole recipe. `~` and `$VARIABLES` are filled in in paths.
"""
_BOUNDS = {rules.Gt: (">", "gt"), rules.Ge: ("≥", "ge"), rules.Lt: ("<", "lt"), rules.Le: ("≤", "le")}


def page() -> str:
    """The whole page: one table a section."""
    return "\n".join([INTRODUCTION, *_sections()])


def _sections() -> Iterator[str]:
    for name, field in Recipe.model_fields.items():
        section = typing.cast(type[Section], field.annotation)
        yield f"## {name}\n"
        if section.__doc__ and section.__doc__ != Section.__doc__:
            yield section.__doc__.strip() + "\n"
        yield "| key | type | default | meaning |\n|---|---|---|---|"
        yield from (_row(name, key, info) for key, info in section.model_fields.items())
        yield ""


def _row(section: str, key: str, field: FieldInfo) -> str:
    kind = ", ".join([_type_name(field.annotation), *_limits(field.metadata)])
    default = "**required**" if field.is_required() else f"`{_value(field.default)}`"
    meaning = " ".join((field.description or "").split())
    return "| " + " | ".join(_escape(text) for text in (f"`{section}.{key}`", kind, default, meaning)) + " |"


def _type_name(annotation: Any) -> str:
    """The type as a recipe's author would say it, with its bounds."""
    arguments = typing.get_args(annotation)
    origin = typing.get_origin(annotation)
    if origin is Annotated:
        return ", ".join([_type_name(arguments[0]), *_limits(arguments[1:])])
    if origin is Literal:
        return " or ".join(f"`{value}`" for value in arguments)
    if origin in (types.UnionType, typing.Union):
        return " or ".join(_type_name(option) for option in arguments)
    if annotation is type(None):
        return "`null`"
    if origin is list:
        return f"a list of {_type_name(arguments[0])}"
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return f"{{{', '.join(annotation.model_fields)}}}"
    names: dict[Any, str] = {bool: "true or false", Path: "path", str: "text", float: "number"}
    return names.get(annotation) or annotation.__name__


def _limits(metadata: typing.Iterable[Any]) -> Iterator[str]:
    for item in metadata:
        if isinstance(item, FieldInfo):
            yield from _limits(item.metadata)
        elif type(item) in _BOUNDS:
            sign, attribute = _BOUNDS[type(item)]
            yield f"{sign} {getattr(item, attribute):g}"


def _value(default: Any) -> str:
    if default is None:
        return "null"
    if isinstance(default, Section):
        return f"{{{', '.join(f'{key}: {_value(value)}' for key, value in default)}}}"
    return str(default).lower() if isinstance(default, bool) else str(default)


def _escape(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    print(page(), end="")
