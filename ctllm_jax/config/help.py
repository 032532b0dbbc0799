"""The help text of a schema: every key with type, default, range and meaning."""

from __future__ import annotations

import textwrap

from ctllm_jax.config.base import Section
from ctllm_jax.config.types import describe_default, describe_range, describe_type, is_section, keys_of, without_none


def describe_keys(schema: type[Section], *, width: int = 100) -> str:
    """Every key of a schema, one paragraph each, in the order of the schema."""
    lines = []
    for path, info in keys_of(schema):
        annotation, _ = without_none(info.annotation)
        if is_section(annotation):
            lines.append(f"\n  {path}: {info.description}")
            continue
        facts = [describe_type(info.annotation), describe_range(info)]
        default = describe_default(info)
        facts.append(default if default == "required" else f"default {default}")
        lines.append(f"  {path} ({'; '.join(fact for fact in facts if fact)})")
        lines += textwrap.wrap(info.description or "", width, initial_indent="      ", subsequent_indent="      ")
    return "\n".join(lines)
