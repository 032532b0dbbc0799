"""Waits until every process of a run has arrived, and names those that have not.

JAX's own wait ends with an abort (SIGABRT, status 134) that names nobody. So the processes first meet here: process 0
listens at the coordinator's address, which JAX's service uses afterwards, and each other process connects and sends one
line of JSON with its number. When all are there, or the time is over, process 0 sends each of them one line with the
verdict.
"""

from __future__ import annotations

import json
import logging
import os
import selectors
import socket
import time
from typing import Any

from ctllm_jax.config.errors import UserError
from ctllm_jax.config.statuses import REQUEUE

log = logging.getLogger(__name__)
_LINE = 4096
"""Bytes of a line, at most."""
_MARGIN, _PAUSE = 5.0, 0.5
"""Seconds that a process waits longer than process 0 for the verdict, and between two attempts to connect."""
_PORT_SECONDS = 30.0
"""How long process 0 waits for a port that another program still uses, such as an earlier attempt that is ending."""
_NEWS = 60.0
"""Seconds between two messages about who is missing."""


class Missing(UserError):
    """Some process did not arrive in time. The same command may succeed later, so the status is that of a requeue."""

    status = REQUEUE


def call_roll(address: str, *, index: int, count: int, seconds: float) -> None:
    """Return when all processes have arrived. Every process of the run calls this.

    Args:
      address: host:port of process 0.
      index, count: which process this is, and of how many.
      seconds: how long to wait for the others.

    Raises:
      Missing: not all arrived in time; the message names the missing ones.
      UserError: two processes have the same number, they disagree on how many there are, or the port is in use.
    """
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    mine = {"index": index, "count": count, "host": socket.gethostname(), "pid": os.getpid()}
    verdict = (_Host(mine, seconds).meet(host, int(port)) if index == 0 else
               _report(mine, (host, int(port)), seconds=seconds))
    if verdict.get("problem"):
        raise (Missing if verdict.get("missing") else UserError)(str(verdict["problem"]))


def is_loopback(host: str) -> bool:
    """Whether a host of an address is this machine's loopback, which no other machine reaches."""
    return host.strip("[]") in ("localhost", "::1") or host.startswith("127.")


class _Host:
    """Process 0: collects the others, by number."""

    def __init__(self, mine: dict[str, Any], seconds: float):
        self._mine, self._count, self._seconds = mine, mine["count"], seconds
        self._end = time.monotonic() + seconds
        self._arrived: dict[socket.socket, dict[str, Any]] = {}
        self._lines: dict[socket.socket, bytes] = {}
        self._selector = selectors.DefaultSelector()

    def meet(self, host: str, port: int) -> dict[str, Any]:
        """Wait for all other processes, send each the result, and return it."""
        with self._selector, self._listen(host, port) as server:
            server.setblocking(False)
            self._selector.register(server, selectors.EVENT_READ)
            try:
                verdict = self._collect(server)
                for peer in self._lines:
                    self._send(peer, verdict)
            finally:
                for peer in self._lines:
                    peer.close()
        return verdict

    def _listen(self, host: str, port: int) -> socket.socket:
        end = time.monotonic() + min(_PORT_SECONDS, self._seconds)
        while True:
            try:
                if is_loopback(host):
                    family = socket.AF_INET6 if ":" in host else socket.AF_INET
                    return socket.create_server((host, port), family=family, backlog=self._count)
                if socket.has_dualstack_ipv6():
                    return socket.create_server(("", port), family=socket.AF_INET6, backlog=self._count,
                                                dualstack_ipv6=True)
                return socket.create_server(("", port), backlog=self._count)
            except OSError as error:
                if time.monotonic() > end:
                    raise UserError(f"process 0 cannot listen at port {port} ({error.strerror or error}): another"
                                    " program uses it; end that one, or set another port in"
                                    " JAX_COORDINATOR_ADDRESS") from None
            time.sleep(_PAUSE)

    def _collect(self, server: socket.socket) -> dict[str, Any]:
        news = time.monotonic() + _NEWS
        while len(self._arrived) < self._count - 1:
            now = time.monotonic()
            if now >= self._end:
                return {"missing": True, "problem": f"{self._missing()} did not arrive within {self._seconds:g} s: look"
                        " at what they wrote, and whether they were started; the same command may be given again"}
            if now >= news:
                log.warning("%s did not arrive yet: waiting for %.0f s more", self._missing(), self._end - now)
                news = now + _NEWS
            for key, _ in self._selector.select(min(self._end, news) - now):
                problem = self._admit(server) if key.fileobj is server else self._read(key.fileobj)
                if problem:
                    self._admit_late(server)
                    return {"problem": problem}
        return {}

    def _admit_late(self, server: socket.socket) -> None:
        """Wait a little for those that are about to connect: they would wait for a process 0 that has ended."""
        end = time.monotonic() + _MARGIN
        with selectors.DefaultSelector() as selector:
            selector.register(server, selectors.EVENT_READ)
            while len(self._lines) < self._count - 1 and selector.select(max(0.0, end - time.monotonic())):
                self._admit(server)

    def _admit(self, server: socket.socket) -> None:
        try:
            peer, _ = server.accept()
        except OSError:
            return
        peer.setblocking(False)
        self._lines[peer] = b""
        self._selector.register(peer, selectors.EVENT_READ)

    def _read(self, peer: socket.socket) -> str | None:
        """Read a peer's message; returns a problem that ends the run. A peer with another message is not a process of
        this run, and one that hangs up has not arrived."""
        try:
            data = peer.recv(_LINE)
        except OSError:
            data = b""
        self._lines[peer] += data
        line, end, _ = self._lines[peer].partition(b"\n")
        if data and not end and len(line) < _LINE:
            return None
        said = (_parse(line) or {}) if data and peer not in self._arrived else {}
        if not isinstance(said.get("index"), int):
            self._drop(peer)
            return None
        if said.get("count") != self._count:
            return (f"the processes disagree on how many they are: {self._count} says process 0 on"
                    f" {self._mine['host']}, {said.get('count')} says process {said['index']} on {said.get('host')}")
        for other in (self._mine, *self._arrived.values()):
            if other["index"] == said["index"]:
                where = " and ".join(f"on {each.get('host')} (pid {each.get('pid')})" for each in (other, said))
                return f"two processes are number {said['index']}: {where}"
        self._arrived[peer] = said
        return None

    def _drop(self, peer: socket.socket) -> None:
        self._selector.unregister(peer)
        self._arrived.pop(peer, None)
        del self._lines[peer]
        peer.close()

    def _missing(self) -> str:
        there = {0, *(each["index"] for each in self._arrived.values())}
        names = name_numbers([index for index in range(self._count) if index not in there])
        return f"{names} of {self._count}"

    @staticmethod
    def _send(peer: socket.socket, verdict: dict[str, Any]) -> None:
        try:
            peer.settimeout(_MARGIN)
            peer.sendall(json.dumps(verdict).encode() + b"\n")
        except OSError as error:
            log.warning("a process left before the run began: %s", error)


def _report(mine: dict[str, Any], address: tuple[str, int], *, seconds: float) -> dict[str, Any]:
    """In any other process: report to process 0 until it sends the result."""
    end = time.monotonic() + seconds
    answered, why = False, "no answer"
    while (left := end - time.monotonic()) > 0:
        try:
            with socket.create_connection(address, timeout=min(left, 10.0)) as peer:
                peer.settimeout(left + _MARGIN)
                peer.sendall(json.dumps(mine).encode() + b"\n")
                answered = True
                with peer.makefile("rb") as file:
                    line = file.readline(1 << 20)
            if (verdict := _parse(line)) is not None:
                return verdict
            why = "the connection was closed"
        except OSError as error:
            why = str(error.strerror or error)
        time.sleep(min(_PAUSE, max(left, 0)))
    there = "answers there, but the run did not begin" if answered else f"cannot be reached there ({why})"
    return {"missing": True, "problem": f"process {mine['index']} of {mine['count']} waited {seconds:g} s for process 0"
            f" at {address[0]}:{address[1]}, which {there}: look at what process 0 wrote, and whether it was started;"
            " the same command may be given again"}


def _parse(line: bytes) -> dict[str, Any] | None:
    """The JSON object of a line; None if it is not one."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def name_numbers(numbers: list[int], *, most: int = 12) -> str:
    """`process 3`, or `processes 1, 3-7 and 9 more`, of sorted numbers."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and spans[-1][1] == number - 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    shown = [f"{first}" if first == last else f"{first}-{last}" for first, last in spans[:most]]
    rest = sum(last - first + 1 for first, last in spans[most:])
    return f"process{'es' * (len(numbers) > 1)} {', '.join(shown)}{f' and {rest} more' if rest else ''}"
