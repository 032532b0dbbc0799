"""Text of the command line to values, and values to help: both led by the schema's annotations."""

from __future__ import annotations

import math
import sys
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from ctllm_jax.config.base import Section, marks_of

if TYPE_CHECKING:
    import yaml

_MOST_NODES = 100_000
"""Values of a YAML file, once its aliases are replaced."""


def is_section(annotation: Any) -> bool:
    """Whether an annotation is a section."""
    return isinstance(annotation, type) and issubclass(annotation, Section)


def without_none(annotation: Any) -> tuple[Any, bool]:
    """`(X, True)` of `X | None`, else `(annotation, False)`."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        rest = [arm for arm in typing.get_args(annotation) if arm is not type(None)]
        if len(rest) == 1 and len(typing.get_args(annotation)) == 2:
            return rest[0], True
    return annotation, False


def named_sections(annotation: Any) -> type[Section] | None:
    """The section of a `dict[str, Section]`, else None."""
    arguments = typing.get_args(annotation)
    if typing.get_origin(annotation) is dict and len(arguments) == 2 and is_section(arguments[1]):
        return arguments[1]
    return None


def keys_of(schema: type[Section], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every key below a section, dotted; a named section's keys come with `NAME` in the path."""
    for name, field in schema.model_fields.items():
        path = prefix + name
        yield path, field
        annotation, _ = without_none(field.annotation)
        inner = annotation if is_section(annotation) else named_sections(annotation)
        if inner is not None:
            yield from keys_of(inner, f"{path}." if is_section(annotation) else f"{path}.NAME.")


def describe_type(annotation: Any) -> str:
    """An annotation in words that a user knows: `int`, `a|b|c`, `list of text`."""
    annotation, optional = without_none(annotation)
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        words = "|".join(str(choice) for choice in arguments)
    elif origin is list:
        words = "list of " + describe_type(arguments[0])
    elif origin is dict:
        words = "NAME: " + describe_type(arguments[1])
    elif is_section(annotation):
        words = "section"
    else:
        words = {int: "int", float: "float", bool: "true|false", str: "text", Any: "value"}.get(annotation, str(annotation))
    return words + ("|null" if optional else "")


def describe_range(field: FieldInfo) -> str:
    """A key's bounds: `>= 1, < 2`, or empty."""
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
    parts = [f"{sign} {_bound(getattr(mark, name))}" for mark in field.metadata for name, sign in signs.items()
             if getattr(mark, name, None) is not None]
    return ", ".join(parts)


def _bound(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"


def describe_default(field: FieldInfo) -> str:
    """A key's default, or `required`."""
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True, validated_data={})
    if isinstance(value, Section):
        return ""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value) or "empty"


def mark(field: FieldInfo, name: str) -> bool:
    """Whether a key carries a mark: `changeable`, `local`, `text`."""
    return bool(marks_of(field).get(name))


def fill_absent(schema: type[Section], values: dict[str, Any]) -> dict[str, Any]:
    """The values of a section that an earlier version wrote, with those of the keys that it did not know.

    Such a key takes the value of its `older` mark, else its default. A required key stays absent, and so do the keys
    of an optional section that the earlier version did not have.
    """
    filled = dict(values)
    for name, field in schema.model_fields.items():
        annotation, optional = without_none(field.annotation)
        inner = (typing.get_args(annotation) or (None,))[0] if typing.get_origin(annotation) is list else None
        if is_section(annotation) and (isinstance(values.get(name), dict) or name not in values and not optional):
            filled[name] = fill_absent(annotation, values.get(name, {}))
        elif inner is not None and is_section(inner) and isinstance(values.get(name), list):
            filled[name] = [fill_absent(inner, entry) for entry in values[name]]
        elif name not in values and not field.is_required():
            default = field.get_default(call_default_factory=True)
            filled[name] = marks_of(field).get("older", default)
    return filled


def parse(text: str, field: FieldInfo) -> Any:
    """The value of a key from the text after `=`.

    A text key takes it byte for byte (with the mark `text` also `@FILE`, `-` for standard input, `@@…` for a literal @).
    Numbers, switches and choices are read by type. Lists are YAML, or words between commas.

    Raises:
      ValueError: the text is not of the key's type; the message says what is needed.
    """
    annotation, optional = without_none(field.annotation)
    if optional and text == "null":
        return None
    if annotation is str:
        return _read_text(text) if mark(field, "text") else text
    if typing.get_origin(annotation) in (list, dict) or is_section(annotation):
        return _parse_structure(text, annotation)
    try:
        return TypeAdapter(annotation).validate_python(_number(text) if annotation in (int, float) else text)
    except ValidationError:
        raise ValueError(f"needs {describe_type(field.annotation)}") from None


def _number(text: str) -> str:
    return text.replace("_", "")


def _read_text(text: str) -> str:
    if text == "-":
        try:
            return sys.stdin.buffer.read().decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"standard input is not UTF-8: {error.reason} at byte {error.start + 1}") from None
    if text.startswith("@@"):
        return text[1:]
    if text.startswith("@"):
        try:
            return Path(text[1:]).read_bytes().decode("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"cannot read {text[1:]}: {error}; a text that begins with @ is written @@…") from None
    return text


def _parse_structure(text: str, annotation: Any) -> Any:
    import yaml

    is_list = typing.get_origin(annotation) is list
    if is_list and not text.lstrip().startswith("["):
        return text.split(",") if text else []
    try:
        value = parse_yaml(text)
    except (yaml.YAMLError, RecursionError):
        value = None
    if not isinstance(value, list if is_list else dict):
        raise ValueError(f"needs {describe_type(annotation)}, in YAML's inline form such as {'[a, b]' if is_list else '{key: value}'}")
    return value


def parse_yaml(text: str) -> Any:
    """The values of a YAML text. Raises ValueError if it is not YAML, or its aliases expand to too many values."""
    import yaml

    check_aliases(yaml.compose(text, Loader=yaml.SafeLoader))
    return yaml.safe_load(text)


def check_aliases(root: yaml.Node | None) -> None:
    """Raise ValueError if a file has too many values after all aliases are expanded."""
    if root is not None and _count_nodes(root, {}) > _MOST_NODES:
        raise ValueError(f"its aliases (*NAME) repeat more than {_MOST_NODES:,} values")


def _count_nodes(node: yaml.Node, known: dict[int, float]) -> float:
    """Number of values of a file after all aliases are expanded; infinite if one contains itself."""
    if id(node) not in known:
        known[id(node)] = math.inf
        children = node.value if isinstance(node.value, list) else []
        known[id(node)] = 1 + sum(_count_nodes(part, known) for child in children
                                  for part in (child if isinstance(child, tuple) else (child,)))
    return known[id(node)]


def key_lines(node: yaml.Node | None, prefix: str = "") -> Iterator[tuple[str, int]]:
    """(dotted key, line from 1) of every value of a YAML file."""
    import yaml

    if isinstance(node, yaml.MappingNode):
        for name, value in node.value:
            path = f"{prefix}{name.value}"
            yield path, name.start_mark.line + 1
            yield from key_lines(value, f"{path}.")
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            yield f"{prefix}{index}", value.start_mark.line + 1
            yield from key_lines(value, f"{prefix}{index}.")
