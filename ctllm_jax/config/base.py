"""The pieces every schema is made of.

A section is a frozen pydantic model that forbids unknown keys. Every key has a description (the help text), and three
marks may stand beside it: `changeable` (a resumed run may differ in it), `text` (its value may be read from a file or
from standard input: `key=@FILE`, `key=-`), and `shorthand` on the class (a bare value for the whole section).
"""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field


class Section(BaseModel):
    """A mapping of a config. `shorthand`, if set, is the key that a bare value for the whole section stands for."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)

    shorthand: ClassVar[str | None] = None


def key(default: Any = ..., meaning: str = "", *, changeable: bool = False, text: bool = False, **constraints) -> Any:
    """A key of a section: its default (`...` if it must be given), its meaning, and pydantic's constraints on it."""
    marks = {name: True for name, on in (("changeable", changeable), ("text", text)) if on}
    if isinstance(default, (dict, list)):
        made = default
        return Field(default_factory=lambda: type(made)(made), description=meaning, json_schema_extra=marks,
                     **constraints)
    return Field(default, description=meaning, json_schema_extra=marks, **constraints)


def section(schema: type[Section], meaning: str, *, changeable: bool = False) -> Any:
    """A key that holds a section, made from its own defaults when it is not given."""
    return Field(default_factory=schema, description=meaning, json_schema_extra={"changeable": True} if changeable else {})
