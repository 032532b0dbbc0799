"""Which implementation of an op runs here: the one that was named, or a clear refusal."""

from __future__ import annotations

from collections.abc import Mapping

import jax

NAMES = ("auto", "pallas", "cudnn", "xla")


def choose(op: str, implementation: str, *, reasons: Mapping[str, str | None]) -> str:
    """The implementation that runs.

    Args:
      op: name of the op, for the message.
      implementation: one of NAMES; "auto" takes the first that can run.
      reasons: implementation -> why it cannot run here, or None if it can; fastest first.

    Raises:
      ValueError: an unknown name, or one that cannot run here; the message says why, and what can.
    """
    able = [name for name, reason in reasons.items() if reason is None]
    if implementation not in NAMES:
        raise ValueError(f"{op}: implementation={implementation!r} must be one of {', '.join(NAMES)}")
    if implementation == "auto":
        return able[0]
    if implementation not in able:
        reason = reasons.get(implementation, f"there is no such implementation of {op}")
        raise ValueError(f"{op}: implementation={implementation!r} cannot run on {jax.default_backend()}: {reason};"
                         f" what can: {', '.join(able)}")
    return implementation
