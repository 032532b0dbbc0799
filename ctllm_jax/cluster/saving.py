"""Estimate the time of a checkpoint from the work of a process (`training.checkpoints.manager`).

Each process writes its own part of a step, reads that part back for its checksums, and waits until it is on the disk.
No process reads another one's files.
"""

CHECKSUM_SECONDS = 0.3
"""Of one processor, for the checksums of a GiB."""


def save_seconds(size: float, *, machines: int, write: float, read: float | None = None, shared: bool = False) -> float:
    """Seconds from the begin of a save until it counts.

    Args:
      size: bytes of the whole step; each machine has an equal part.
      write: bytes a second that a machine writes; with `shared`, all of them together.
      read: bytes a second at which it reads its part back; None: from its own page cache, as fast as the checksums.
    """
    part = size / machines
    back = 0.0 if read is None else part / read
    return (size if shared else part) / write + back + CHECKSUM_SECONDS * part / 2**30
