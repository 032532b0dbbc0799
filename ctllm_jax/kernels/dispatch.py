"""Choice of the implementation of an op: the named one, or a clear error."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, get_args

import jax
from jax.sharding import Mesh

Name = Literal["auto", "pallas", "cudnn", "xla"]
NAMES = get_args(Name)


def find_device(mesh: Mesh | None = None) -> tuple[str, str]:
    """Return (platform, device kind) where an op will run: of the mesh, whose devices may be absent, else of the
    default device.

    The platform is "cpu", "gpu" or "tpu"; the kind is that of `jax.Device.device_kind`.
    """
    device = jax.devices()[0] if mesh is None else mesh.devices.flat[0]
    platform = "gpu" if device.platform in ("cuda", "rocm") else device.platform
    return platform, device.device_kind


class CannotRun(ValueError):
    """A named implementation cannot run on this platform, or does not support the arguments."""


def choose(op: str, implementation: Name, *, reasons: Mapping[str, str | None], platform: str | None = None) -> str:
    """Return the implementation that runs.

    Args:
      op: name of the op, for the message.
      implementation: one of NAMES; "auto" chooses the first that can run.
      reasons: implementation -> why it cannot run here, or None if it can; fastest first.
      platform: where it will run, for the message; None: the default backend.

    Raises:
      ValueError: an unknown name.
      CannotRun: the implementation cannot run here; the message gives the reason and the alternatives.
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
