"""A recipe from its file: bases, overrides, and one line for everything that is wrong with it."""

import difflib
import os
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import ValidationError

from dcpo_openrlhf.recipe.fields import Section
from dcpo_openrlhf.recipe.schema import Recipe, RecipeError


def load_recipe(path: str | Path, overrides: list[str] | None = None) -> Recipe:
    """The validated recipe in `path`, laid over its base, with `overrides` ("section.key=value") applied.

    Raises RecipeError naming every violation: unknown keys with their path and the nearest known name, wrong types,
    broken rules; and the base that a bad key stands in.
    """
    path = Path(path)
    values, homes = _layers(path, named_by="--recipe")
    for override in overrides or []:
        _apply_override(values, override)
        homes.pop(tuple(override.partition("=")[0].split(".")), None)
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        lines = [_explain(dict(e)) + _home(e["loc"], homes, path) for e in error.errors()]
        raise RecipeError(f"{path}:\n" + "\n".join(f"  {line}" for line in "\n".join(lines).splitlines())) from None


Homes = dict[tuple[Any, ...], Path]
"""(section,) and (section, key) -> the file that sets it."""


def _layers(path: Path, *, named_by: str, above: tuple[Path, ...] = ()) -> tuple[dict[Any, Any], Homes]:
    """The recipe in `path` laid over its base, which may have a base itself, and where each value stands."""
    own = _read(path, named_by)
    values: dict[Any, Any] = {}
    homes: Homes = {}
    if "base" in own:
        name, chain = own.pop("base"), (*above, path)
        if not isinstance(name, str) or not name:
            raise RecipeError(
                f"{path}: base = {name!r} must be the path of a recipe, from {path.parent}/; name one or drop the key"
            )
        base = path.parent / Path(os.path.expandvars(name)).expanduser()
        if base.resolve() in (file.resolve() for file in chain):
            circle = " -> ".join(str(file) for file in (*chain, base))
            raise RecipeError(f"{path}: base = {name} leads in a circle: {circle}; drop one of these keys")
        values, homes = _layers(base, named_by=f"{path}: base =", above=chain)
    for section, keys in own.items():
        below = values.get(section, {})
        if not isinstance(below, dict):  # an error in the base, which is told
            continue
        values[section] = below | keys if isinstance(keys, dict) else keys
        homes |= {(section,): path} | ({(section, key): path for key in keys} if isinstance(keys, dict) else {})
    return values, homes


def _read(path: Path, named_by: str) -> dict[Any, Any]:
    """The mapping in the file; `named_by` begins the error where there is none."""
    try:
        values = yaml.load(path.read_text(), _UniqueKeys)
    except FileNotFoundError:
        where = (
            "recipes/ holds the ones that ship"
            if named_by == "--recipe"
            else "a base is looked for from the folder of the recipe that names it: copy it there too, or "
            "copy what --dry-run prints, which needs no base"
        )
        raise RecipeError(f"{named_by} {path}: no such file; {where}") from None
    except OSError as error:
        raise RecipeError(f"{named_by} {path}: cannot be read ({error.strerror}); name a readable file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot be read as YAML: {error}") from None
    values = {} if values is None else values
    if not isinstance(values, dict):
        raise RecipeError(f"{path}: a recipe is a mapping of sections, got {type(values).__name__} {values!r:.60}")
    return values


def _home(where: tuple[Any, ...], homes: Homes, recipe: Path) -> str:
    """What to say of a bad value's place: nothing where that is the recipe itself."""
    file = homes.get(where[:2])
    return f" (in {file})" if file and file != recipe else ""


def resolved_yaml(recipe: Recipe) -> str:
    """The whole recipe, defaults included, as YAML that load_recipe reads back to an equal recipe."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)


class _UniqueKeys(yaml.SafeLoader):
    """YAML's safe loader; a key that stands twice in one mapping is an error, where YAML would keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key.value!r} stands twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _apply_override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    parts = key.split(".")
    if not equals or len(parts) != 2 or not all(parts):
        raise RecipeError(f"override {override!r}: the form is section.key=value, for example train.steps=10")
    section, name = parts
    field = Recipe.model_fields.get(section)
    if field is None:
        raise RecipeError(f"override {override!r}: no section {section!r}{_nearest(section, Recipe.model_fields)}")
    fields = typing.cast(type[Section], field.annotation).model_fields
    if name not in fields:
        raise RecipeError(f"override {override!r}: no key {section}.{name}{_nearest(name, fields)}")
    if not isinstance(values.setdefault(section, {}), dict):
        raise RecipeError(f"section {section!r} must be a mapping, got {values[section]!r}")
    try:
        values[section][name] = _typed(text, fields[name].annotation)
    except yaml.YAMLError as error:
        raise RecipeError(f"override {override!r}: the value is not valid YAML: {error}") from None


def _typed(text: str, annotation: Any) -> Any:
    """The override's text as YAML reads it, or unchanged where the schema wants text (so that 007 stays 007)."""
    options = list(_options(annotation))
    if text == "null" and type(None) in options:
        return None
    listed = any(typing.get_origin(option) is list for option in options) and text.lstrip().startswith("[")
    if (str in options or Path in options) and not listed:
        return text
    return yaml.safe_load(text)


def _options(annotation: Any) -> Iterator[Any]:
    """The types that the annotation allows."""
    if typing.get_origin(annotation) is Annotated:
        yield from _options(typing.get_args(annotation)[0])
    elif typing.get_origin(annotation) in (types.UnionType, typing.Union):
        for option in typing.get_args(annotation):
            yield from _options(option)
    else:
        yield annotation


def _explain(error: dict[str, Any]) -> str:
    where = ".".join(str(part) for part in error["loc"] if not str(part).startswith("("))  # the tag of a form
    if error["type"] == "extra_forbidden":
        *path, name = error["loc"]
        model: Any = Recipe
        for part in path:
            field = model.model_fields.get(part)  # none where part is a form's tag or a place in a list
            model = _section(field.annotation) if field else model
        known = model.model_fields if path else ["base", *model.model_fields]
        return f"unknown key {where}{_nearest(str(name), known)}"
    if error["type"] == "missing":
        section = Recipe.model_fields[error["loc"][0]].annotation
        keys = [where] if len(error["loc"]) > 1 else [f"{where}.{k}" for k in _required(section)]
        return f"{', '.join(keys)} is required; set it in the recipe or as {keys[0]}=VALUE"
    if error["type"] == "model_type":
        return f"{where} = {error['input']!r} must be a mapping of keys, for example {where}: {{key: value}}"
    if error["type"] == "list_type":
        one = "" if error["input"] is None else error["input"]
        return f"{where} = {error['input']!r} must be a list, for example {where}=[{one}]"
    if not where:  # a rule between fields speaks for itself
        return error["msg"].removeprefix("Value error, ")
    reason = error["msg"].replace("Input should be", "must be").replace("Input is", "is")
    return f"{where} = {error['input']!r} {reason}"


def _section(annotation: Any) -> Any:
    """The section that a key is, or that the entries of its list are."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    return next((found for inner in typing.get_args(annotation) if (found := _section(inner))), None)


def _required(section: Any) -> list[str]:
    return [name for name, field in section.model_fields.items() if field.is_required()]


def _nearest(name: str, known: typing.Iterable[str]) -> str:
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known)}"
