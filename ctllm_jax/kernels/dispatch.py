"""Which implementation of an op runs: the one that was named, or a clear refusal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, get_args

import jax
from jax.sharding import Mesh

Name = Literal["auto", "pallas", "cudnn", "xla"]
NAMES = get_args(Name)


def find_device(mesh: Mesh | None = None) -> tuple[str, str]:
    """(platform, device kind) of where an op will run: of the mesh, whose devices need not be here, else the default.

    The platform is "cpu", "gpu" or "tpu"; the kind is as `jax.Device.device_kind` says it.
    """
    device = jax.devices()[0] if mesh is None else mesh.devices.flat[0]
    platform = "gpu" if device.platform in ("cuda", "rocm") else device.platform
    return platform, device.device_kind


class CannotRun(ValueError):
    """A named implementation cannot run where it is asked to, or cannot do what is asked."""


def choose(op: str, implementation: Name, *, reasons: Mapping[str, str | None], platform: str | None = None) -> str:
    """The implementation that runs.

    Args:
      op: name of the op, for the message.
      implementation: one of NAMES; "auto" takes the first that can run.
      reasons: implementation -> why it cannot run here, or None if it can; fastest first.
      platform: where it is to run, for the message; None: the default backend.

    Raises:
      ValueError: an unknown name.
      CannotRun: one that cannot run here; the message says why, and what can.
    """
    able = [name for name, reason in reasons.items() if reason is None]
    if implementation not in NAMES:
        raise ValueError(f"{op}: implementation={implementation!r} must be one of {', '.join(NAMES)}")
    if implementation == "auto":
        return able[0]
    if implementation not in able:
        reason = reasons.get(implementation, f"there is no such implementation of {op}")
        raise CannotRun(f"{op}: implementation={implementation!r} cannot run on {platform or jax.default_backend()}:"
                        f" {reason}; what can: {', '.join(able)}")
    return implementation
