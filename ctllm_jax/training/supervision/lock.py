"""The lock of a run directory: a second trainer of the same run is refused, with the name of the owner.

RUN/lock is a JSON text of the owner: host, process, start time, job, and a heartbeat that a thread increments. It is
created by a hard link (or an exclusive create if hard links are not supported), of which exactly one succeeds, also on
NFS. A process that finds a lock takes it over if its owner is dead: on the same machine, if the process has ended;
otherwise, if the heartbeat did not change for `run.stale_after` seconds. The heartbeat is watched, so clocks of
different machines are never compared. The owner is the first process of a run; the others follow its decision.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ctllm_jax.config.errors import UserError
from ctllm_jax.config.pretrain import RunConfig
from ctllm_jax.config.statuses import FAILED
from ctllm_jax.storage import is_remote, open_path
from ctllm_jax.training.supervision.owner import is_gone, parse_owner, refusal, say_owner, whoami

log = logging.getLogger(__name__)
LOCK, _TAKEOVER = "lock", "lock.takeover"
_BEATS = 6
"""Number of heartbeats within `stale_after`."""
_LINE = 1000
"""Size of the text in bytes. It is constant, so that a heartbeat is one write in place."""
_UNREADABLE = 5.0
"""Seconds until the text must follow an exclusive create; also the limit of a whole takeover."""


class Lock:
    """The lock of one run directory.

    Args:
      run_dir: made if it does not exist.
      stale_after: seconds without a heartbeat after which an owner on another machine counts as dead.
      what: the command, for the message to a refused process.
    """

    def __init__(self, run_dir: Path, *, stale_after: float, what: str = ""):
        self.path, self._stale_after = run_dir / LOCK, stale_after
        self._mine = {**whoami(), "id": uuid.uuid4().hex, "since": round(time.time(), 3), "beat": 0,
                      "stale_after": stale_after, "command": what[:200]}
        self._file = -1
        self._watched: tuple[Any, float] | None = None
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def attempt(self) -> dict[str, Any] | None:
        """Try to become the owner. Returns None on success, or an owner whose state is not known yet; then call again.

        Raises:
          UserError: the owner is alive (the message says who it is and what to do), or the directory is not writable.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            return self._attempt()
        except OSError as error:
            raise UserError(f"{self.path.parent} cannot be written: {error.strerror}") from error

    def release(self) -> None:
        """Release the lock, if this process still holds it."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._file < 0:
            return
        os.close(self._file)
        self._file = -1
        try:
            for _ in range(100):
                with self._alone() as alone:
                    if alone and _read(self.path).get("id") == self._mine["id"]:
                        self.path.unlink()
                if alone:
                    return
                time.sleep(0.02)
        except OSError as error:
            log.warning("%s cannot be removed (%s): the next start finds that its owner is gone", self.path,
                        error.strerror)

    def _attempt(self) -> dict[str, Any] | None:
        if self._make(self.path):
            self._begin()
            return None
        owner = _read(self.path)
        dead = is_gone(owner) if owner else None
        if dead is False:
            raise UserError(refusal(owner, self._mine, self.path.parent))
        return self._take(owner) if dead or self._stands_still(owner) else owner

    def _stands_still(self, owner: dict[str, Any]) -> bool:
        """Whether a heartbeat did not change for long enough; a change shows that the owner is alive."""
        now, seen = time.monotonic(), (owner.get("id"), owner.get("beat"))
        if self._watched is None or self._watched[0] != seen:
            if owner and self._watched is not None and self._watched[0][0] == owner["id"]:
                raise UserError(refusal(owner, self._mine, self.path.parent))
            self._watched = seen, now - self._age(self.path)
        return now - self._watched[1] > (owner.get("stale_after", self._stale_after) if owner else _UNREADABLE)

    def _age(self, path: Path) -> float:
        """Seconds since a file was written, by the file server's clock; 0 if it does not exist."""
        probe = self.path.with_name(f".lock.{self._mine['id']}")
        try:
            probe.touch()
            return max(0.0, probe.stat().st_mtime - path.stat().st_mtime)
        except FileNotFoundError:
            return 0.0
        finally:
            probe.unlink(missing_ok=True)

    def _take(self, owner: dict[str, Any]) -> dict[str, Any] | None:
        """Replace a dead owner by this process; of several processes that try, exactly one succeeds."""
        with self._alone() as alone:
            if not alone or _read(self.path).get("id") != owner.get("id"):
                return owner
            self.path.unlink(missing_ok=True)
            if not self._make(self.path):
                return owner  # another process came first, as if there had been no lock
        if owner:
            log.warning("%s was held by %s, which is gone: taken over", self.path, say_owner(owner))
        self._begin()
        return None

    def _make(self, path: Path) -> bool:
        """Create the file with its text, unless it exists."""
        candidate = path.with_name(f".{path.name}.{self._mine['id']}")
        text = self._text()
        try:
            candidate.write_bytes(text)
            try:
                os.link(candidate, path)
            finally:
                candidate.unlink()
            return True
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, errno.EMLINK):
                raise
        try:
            file = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            return False
        with open(file, "wb") as opened:
            opened.write(text)
        return True

    @contextmanager
    def _alone(self) -> Iterator[bool]:
        """Whether this process alone may change the owner; after a crash inside, nobody may for a while."""
        guard = self.path.with_name(_TAKEOVER)
        try:
            os.close(os.open(guard, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))
        except FileExistsError:
            if self._age(guard) > _UNREADABLE:
                guard.unlink(missing_ok=True)
            yield False
            return
        try:
            yield True
        finally:
            guard.unlink(missing_ok=True)

    def _begin(self) -> None:
        # Heartbeats use this open file, so if another process replaces the lock, they never reach the new file.
        self._file = os.open(self.path, os.O_RDWR)
        self._ended.clear()
        self._thread = threading.Thread(target=self._beat, daemon=True, name="heartbeat")
        self._thread.start()

    def _beat(self) -> None:
        while not self._ended.wait(self._stale_after / _BEATS):
            try:
                owner = _read(self.path)
                if owner and owner["id"] != self._mine["id"]:
                    # This process was suspended for so long that it counted as dead. It must not write there any more.
                    log.critical("%s has another owner now, %s: ending at once", self.path.parent, say_owner(owner))
                    os._exit(FAILED)
                if not self.path.exists() and self._make(self.path):
                    os.close(self._file)
                    self._file = os.open(self.path, os.O_RDWR)
                self._mine["beat"] += 1
                os.pwrite(self._file, self._text(), 0)
                os.fsync(self._file)
            except Exception as error:  # any error, because without heartbeats another process would take over
                log.warning("the heartbeat of %s failed (%s)", self.path, error)

    def _text(self) -> bytes:
        return json.dumps(self._mine).encode().ljust(_LINE - 1) + b"\n"


@contextmanager
def own(run: RunConfig, *, what: str, free: bool = False) -> Iterator[None]:
    """Own a run directory inside the context; all processes of a run call this at the same point.

    Args:
      what: the command.
      free: nothing will be written there, so no owner is needed.

    Raises:
      UserError: another process is the owner; the message names it.
    """
    if free:
        yield
        return
    import jax

    from ctllm_jax.cluster.distributed import tell_all

    run_dir, stale_after = open_path(run.dir), run.stale_after
    lock = make_lock(run_dir, stale_after=stale_after, what=what) if jax.process_index() == 0 else None
    problem, told, state = None, False, 0
    try:
        while state == 0:
            if lock is not None:
                try:
                    owner = lock.attempt()
                    state = 1 if owner is None else 0
                    if owner and not told:
                        log.warning("%s was in use by %s: watching for at most %g s whether it still is", run_dir,
                                    say_owner(owner), owner.get("stale_after", stale_after))
                        told = True
                except UserError as error:
                    problem, state = error, 2
            state = tell_all(state)
            if state == 0:
                time.sleep(min(1.0, stale_after / 20) if told else 0.05)
        if state == 2:
            raise problem or UserError(f"{run_dir} is in use; the first process says by whom")
        yield
    finally:
        if lock is not None:
            lock.release()


def read_owner(run_dir: Path) -> dict[str, Any] | None:
    """The owner of a run directory, from its lock; None: nobody."""
    return _read(run_dir / LOCK) or None


def make_lock(run_dir: Path, *, stale_after: float, what: str) -> Any:
    """The lock of a run directory, on a disk or an object store; arguments as of `Lock`."""
    if is_remote(run_dir):
        from ctllm_jax.training.supervision.lock_object import ObjectLock

        return ObjectLock(run_dir, name=LOCK, stale_after=stale_after, what=what)
    return Lock(run_dir, stale_after=stale_after, what=what)


def _read(path: Path) -> dict[str, Any]:
    """The owner; empty if there is none, or its text is not written yet."""
    try:
        return parse_owner(path.read_bytes())
    except FileNotFoundError:
        return {}
