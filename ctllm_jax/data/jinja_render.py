"""Render untrusted Jinja templates in a separate process. No jax.

Jinja's sandbox protects this machine's files, but does not prevent endless loops or texts of gigabytes, and it has had
security holes. So a child process renders them (`jinja_child`), with limits on memory and CPU time, and without the
environment of this process. One child serves all templates of a process.
"""

from __future__ import annotations

import atexit
import hashlib
import importlib.util
import json
import os
import select
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

_CHILD = Path(__file__).with_name("jinja_child.py")
_KEPT = ("PATH", "PYTHONPATH", "PYTHONHOME", "LD_LIBRARY_PATH", "VIRTUAL_ENV", "LANG", "LC_ALL", "SYSTEMROOT")
MEMORY = 2**30
MOST_CHARACTERS = 2**24
COMPUTING = 5.0
"""CPU seconds of a template; a dialogue takes less than a millisecond."""
WAITING = 60.0
"""Wall-clock seconds after which a child that does not react to its own limit is killed."""


class RenderError(Exception):
    """A template cannot be compiled or rendered; `line` is set if it is malformed."""

    def __init__(self, message: str, *, line: int | None = None):
        super().__init__(message)
        self.line = line


class _Renderer:
    """The child process, started on first use, and again after it had to be killed."""

    def __init__(self):
        self._lock = threading.Lock()
        self._child: subprocess.Popen | None = None
        self._owner = 0
        self._known: set[str] = set()

    def render(self, source: str, values: dict[str, Any] | None, *, marks: tuple[str, str]) -> str:
        """Render a template; if `values` is None, only compile it. Raises RenderError on failure."""
        name = hashlib.sha256(source.encode("utf-8", "surrogatepass")).hexdigest()
        with self._lock:
            if self._child is None or self._owner != os.getpid() or self._child.poll() is not None:
                self._start()
            task = {"name": name, "source": None if name in self._known else source, "values": values, "marks": marks}
            try:
                self._child.stdin.write(json.dumps(task).encode() + b"\n")
                self._child.stdin.flush()
                answer = json.loads(self._read())
            except BaseException as error:  # also on Ctrl-C, because the next answer would belong to this task
                self.close()
                if not isinstance(error, OSError | ValueError):
                    raise
                raise RenderError(str(error) if isinstance(error, TimeoutError) else
                                  "the process that renders it ended; it may need too much memory") from None
            if "error" in answer:
                raise RenderError(answer["error"], line=answer.get("line"))
            self._known.add(name)
            return answer["text"]

    def _start(self) -> None:
        self._child = subprocess.Popen(
            [sys.executable, "-P", str(_CHILD), str(COMPUTING), str(MEMORY), str(MOST_CHARACTERS)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True,
            env={name: os.environ[name] for name in _KEPT if name in os.environ})
        self._owner, self._known = os.getpid(), set()

    def _read(self) -> bytes:
        """Read a line. Raises TimeoutError if it does not arrive, ValueError if the child has ended."""
        until, parts = time.monotonic() + WAITING, []
        descriptor = self._child.stdout.fileno()
        while not parts or not parts[-1].endswith(b"\n"):
            if not select.select([descriptor], [], [], max(0.0, until - time.monotonic()))[0]:
                raise TimeoutError(f"it does not end within {WAITING:g} s")
            parts.append(os.read(descriptor, 2**16))
            if not parts[-1]:
                raise ValueError("the child has ended")
        return b"".join(parts)

    def close(self) -> None:
        """End the child."""
        child, self._child = self._child, None
        if child is not None and self._owner == os.getpid():
            child.kill()
            for pipe in (child.stdin, child.stdout):
                try:
                    pipe.close()
                except OSError:
                    pass  # the reader of the data has gone
            child.wait()


_renderer = _Renderer()
atexit.register(_renderer.close)


def is_available() -> bool:
    """Whether jinja2 is installed."""
    return importlib.util.find_spec("jinja2") is not None


def render(source: str, values: dict[str, Any] | None, *, marks: tuple[str, str] = ("", "")) -> str:
    """Return the text that a template renders.

    Args:
      values: the template's variables, as JSON; None: the template is only compiled.
      marks: written around the content of `{% generation %}`.

    Raises:
      RenderError: it is malformed, refuses the values, or exceeds a limit.
    """
    return _renderer.render(source, values, marks=marks)
