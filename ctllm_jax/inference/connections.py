"""Limits on connections before authentication: their number, and how long each may be idle."""

from __future__ import annotations

import asyncio
import resource
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

from ctllm_jax.config.errors import UserError

BACKLOG = 128
"""Number of connections that are accepted between checks of the limit."""
_OTHER_FILES = 128


def limited(*, read_timeout: float, max_connections: int) -> type[H11Protocol]:
    """Uvicorn's protocol, with limits.

    Args:
      read_timeout: seconds in which the head of every request must arrive, counted from the connection or from the
        answer to the request before; and seconds in which a client must take what was sent.
      max_connections: one more closes the connection that has waited longest for a head. Where none does, because all
        are being answered, the new one gets 503.
    """

    class Protocol(H11Protocol):
        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._for_head: asyncio.TimerHandle | None = None
            self._for_reader: asyncio.TimerHandle | None = None
            self._follow()
            if len(self.connections) > max_connections:
                waiting = [(each._for_head.when(), each) for each in self.connections
                           if isinstance(each, Protocol) and each._for_head is not None]
                min(waiting, key=lambda found: found[0])[1]._end(b"503 Service Unavailable")

        def connection_lost(self, exc: Exception | None) -> None:
            for timer in (self._for_head, self._for_reader):
                if timer is not None:
                    timer.cancel()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._follow()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            self._follow()

        def pause_writing(self) -> None:
            super().pause_writing()
            self._for_reader = self.loop.call_later(read_timeout, self.transport.abort)

        def resume_writing(self) -> None:
            super().resume_writing()
            if self._for_reader is not None:
                self._for_reader.cancel()

        def _follow(self) -> None:
            """Run a timer while waiting for a head, and none while its request is answered."""
            waits = self.cycle is None or self.cycle.response_complete
            if waits and self._for_head is None:
                self._for_head = self.loop.call_later(read_timeout, self._end, b"408 Request Timeout")
            elif not waits and self._for_head is not None:
                self._for_head.cancel()
                self._for_head = None

        def _end(self, status: bytes) -> None:
            if self._for_head is not None:
                self._for_head.cancel()
            self._for_head = None
            if self.transport.is_closing():  # what was sent last was not taken
                self.transport.abort()
                return
            # Without a request, a status could be mistaken for the answer to a request that is in transit.
            if self.conn.trailing_data[0] or self.cycle is None:
                self.transport.write(b"HTTP/1.1 %s\r\nConnection: close\r\nContent-Length: 0\r\n\r\n" % status)
            self.transport.close()
            self._for_reader = self.loop.call_later(read_timeout, self.transport.abort)

    return Protocol


def allow_files(max_connections: int) -> None:
    """Raise this process's limit on open files to the number that these connections need.

    Raises:
      UserError: the system does not allow so many.
    """
    needed = max_connections + BACKLOG + _OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if resource.RLIM_INFINITY in (soft, hard) or soft >= needed:
        return
    if hard < needed:
        most = max(1, hard - BACKLOG - _OTHER_FILES)
        raise UserError(f"max_connections={max_connections} needs {needed:,} open files, and the limit is {hard:,}: "
                        f"raise it (ulimit -Hn), or set max_connections to at most {most}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
