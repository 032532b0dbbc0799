"""The pieces every schema is made of.

A section is a frozen pydantic model that forbids unknown keys, and control characters in its texts. Every key has a
description (the help text) and may have these marks: `changeable` (its value may change on resume), `local` (its value
may differ between the processes of a run), `prose` (its texts may contain line ends and tabs), `text` (prose that can
be read from a file or standard input: `key=@FILE`, `key=-`), `output` (a "file" or "folder" that the command writes,
which is checked first), and `older` (the value for runs started before the key existed, if that is not the default).
`shorthand` on the class is the key that a bare value for the whole section stands for.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator
from pydantic.config import JsonDict
from pydantic.fields import FieldInfo

from ctllm_jax.config.control import find_control


class Section(BaseModel):
    """A mapping of a config. `shorthand`, if set, is the key that a bare value for the whole section sets."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)

    shorthand: ClassVar[str | None] = None

    @field_validator("*")
    @classmethod
    def _refuse_control_characters(cls, value: Any, info: ValidationInfo) -> Any:
        """Values are written to job scripts, paths, logs and pages, where a line end or an escape could act as a
        command."""
        prose = bool(info.field_name and marks_of(cls.model_fields[info.field_name]).get("prose"))
        for text in _texts(value):
            found = find_control(text, prose=prose)
            if found is not None:
                raise ValueError(f"{text[:80]!r} holds the control character U+{ord(found):04X}; "
                                 + ("only line ends and tabs are allowed here" if prose
                                    else "write the value as one line of plain text"))
        return value


def marks_of(field: FieldInfo) -> JsonDict:
    """The marks of a key, such as `changeable` and `older`."""
    return field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}


def _texts(value: Any) -> Iterator[str]:
    """Every text of a value, including names of mappings; a section has checked its own."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for name, inner in value.items():
            yield from _texts(name)
            yield from _texts(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _texts(inner)


def key(default: Any = ..., meaning: str = "", *, changeable: bool = False, local: bool = False, text: bool = False,
        prose: bool = False, output: str | None = None, older: Any = ..., **constraints) -> Any:
    """Declare a key of a section: its default (`...` if it is required), its description, its marks, and pydantic's
    constraints."""
    marks: JsonDict = {name: on for name, on in (("changeable", changeable), ("local", local), ("text", text),
                                       ("prose", prose or text), ("output", output)) if on}
    if older is not ...:
        marks["older"] = older
    if isinstance(default, (dict, list)):
        made = default
        return Field(default_factory=lambda: type(made)(made), description=meaning, json_schema_extra=marks,
                     **constraints)
    return Field(default, description=meaning, json_schema_extra=marks, **constraints)


def section(schema: type[Section], meaning: str, *, changeable: bool = False) -> Any:
    """A key that holds a section, made from its own defaults when it is not given."""
    return Field(default_factory=schema, description=meaning, json_schema_extra={"changeable": True} if changeable else {})
