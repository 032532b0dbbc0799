"""The lock of a run directory on an object store, by conditional writes.

An object RUN/lock is created only if it does not exist. Each heartbeat replaces it only in the version that this
process wrote last. So if several processes find a dead owner's object, exactly one takes it over; an owner that was
mistaken for dead notices this at its next heartbeat, and ends.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
import uuid
from pathlib import Path
from typing import Any

from ctllm_jax.config.errors import UserError
from ctllm_jax.config.statuses import FAILED, REQUEUE
from ctllm_jax.storage import Conditional, StoreError
from ctllm_jax.training.supervision.owner import is_gone, parse_owner, refusal, say_owner, whoami

log = logging.getLogger(__name__)
_LAST = 10.0
"""Time limit of the last heartbeat in seconds."""
_BEATS = 6
"""Number of heartbeats within `stale_after`."""


class ObjectLock:
    """The lock of one run directory on an object store; arguments as of `lock.Lock`."""

    def __init__(self, run_dir: Path, *, name: str, stale_after: float, what: str = ""):
        self._run_dir, self._stale_after = run_dir, stale_after
        self._object = Conditional(run_dir / name)
        self._mine = {**whoami(), "id": uuid.uuid4().hex, "since": round(time.time(), 3), "beat": 0,
                      "stale_after": stale_after, "command": what[:200]}
        self._version: bytes | None = None
        self._watched: tuple[Any, float] | None = None
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def attempt(self) -> dict[str, Any] | None:
        """As `lock.Lock.attempt`."""
        try:
            return self._attempt()
        except StoreError as error:
            told = UserError(f"{self._run_dir} cannot be used: {error.strerror}")
            told.status = told.status if error.lasting else REQUEUE
            raise told from error

    def release(self) -> None:
        """Release the lock, if this process still holds it."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join(timeout=_LAST)
            self._thread = None
        if self._version is None:
            return
        try:
            self._object.write(None, version=self._version)
        except StoreError as error:
            log.warning("%s cannot be removed (%s): the next start waits until its owner counts as gone",
                        self._object.path, error)
        self._version = None

    def _attempt(self) -> dict[str, Any] | None:
        found = self._object.read()
        if found is None:
            return self._put(version=None)
        owner, version = parse_owner(found[0]), found[1]
        dead = is_gone(owner) if owner else None
        if dead is False:
            raise UserError(refusal(owner, self._mine, self._run_dir))
        if not dead and not self._stands_still(owner, version):
            return owner
        held = self._put(version=version)
        if held is None and owner:
            log.warning("%s was held by %s, which is gone: taken over", self._object.path, say_owner(owner))
        return held

    def _put(self, *, version: bytes | None) -> dict[str, Any] | None:
        self._version = self._object.write(self._text(), version=version)
        if self._version is None:
            found = self._object.read()  # another process was first; or this one was, and the answer was lost
            if found is None or parse_owner(found[0]).get("id") != self._mine["id"]:
                return parse_owner(found[0]) if found else {}
            self._version = found[1]
        self._ended.clear()
        self._thread = threading.Thread(target=self._beat, daemon=True, name="heartbeat")
        self._thread.start()
        return None

    def _stands_still(self, owner: dict[str, Any], version: bytes) -> bool:
        """Whether it was not rewritten for long enough, by watching it, so that no two clocks are compared."""
        now = time.monotonic()
        if self._watched is None or self._watched[0] != version:
            if owner and self._watched is not None:
                raise UserError(refusal(owner, self._mine, self._run_dir))
            self._watched = version, now
        return now - self._watched[1] > owner.get("stale_after", self._stale_after)

    def _beat(self) -> None:
        while not self._ended.wait(self._stale_after / _BEATS):
            try:
                self._mine["beat"] += 1
                written = self._object.write(self._text(), version=self._version)
                if written is None:
                    written = self._after_conflict()
                self._version = written
            except Exception as error:  # any error, because without heartbeats another process would take over
                log.warning("the heartbeat of %s failed (%s)", self._run_dir, error)

    def _after_conflict(self) -> bytes | None:
        """After a lost answer, the object is our own new version; anything else is another owner."""
        found = self._object.read()
        if found is None:
            return self._object.write(self._text(), version=None)
        owner = parse_owner(found[0])
        if owner.get("id") == self._mine["id"]:
            return found[1]
        # This process was suspended for so long that it counted as dead. It must not write there any more.
        log.critical("%s has another owner now, %s: ending at once", self._run_dir,
                     say_owner(owner) if owner else "unknown")
        os._exit(FAILED)

    def _text(self) -> bytes:
        return json.dumps(self._mine).encode()
