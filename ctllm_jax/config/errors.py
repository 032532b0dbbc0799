"""Errors that a user can fix, reported without a traceback."""

import difflib
from collections.abc import Sequence
from typing import Any

from ctllm_jax.config.statuses import WRONG_INPUT


class UserError(ValueError):
    """Wrong input at the user's boundary. The message names the field or file, the value, and what is needed; exit status 2."""

    status: int = WRONG_INPUT


def check_format(found: Any, *, newest: int, where: object, key: str = "format") -> None:
    """Refuse a file whose format is none of 1 to `newest`, which this version reads; `found` is what the file states."""
    if type(found) is not int or not 1 <= found <= newest:
        raise UserError(f"{where}: {key}={found!r}, this version reads format {newest}"
                        f"{' and older ones' if newest > 1 else ''}; use the version of ctllm_jax that wrote it")


def unknown(kind: str, name: str, names: Sequence[str]) -> UserError:
    """The error for a name that is not among `names`, with the nearest one."""
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.0)
    return UserError(f"{kind} {name!r} does not exist; nearest: {near[0] if near else 'none'}. There are: "
                     f"{', '.join(names)}")
