"""A thread around an engine, for those who ask from others."""

from __future__ import annotations

import itertools
import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence

from ctllm_jax.inference.engine import Engine
from ctllm_jax.inference.request import Event, Request

FAILED = "error"
"""How a request ends that an error in the engine ended."""
logger = logging.getLogger(__name__)


class QueueFull(Exception):
    """So many wait already."""


class Worker:
    """Requests of any thread, to one engine in its own.

    Args:
      engine: nobody else's from now on.
      max_queue: requests that may wait for a slot.

    Attributes:
      failures: steps that ended in an error; what was running then was told, and the engine began anew.
    """

    def __init__(self, engine: Engine, *, max_queue: int = 64):
        self.engine = engine
        self.capacity = engine.slots + max_queue
        self.failures = 0
        self._changed = threading.Condition()
        self._inbox: deque[tuple[int, Request]] = deque()
        self._gone: set[int] = set()
        self._listeners: dict[int, Callable[[Event], None]] = {}
        self._tickets: dict[int, int] = {}
        self._numbers: dict[int, int] = {}
        self._count = itertools.count()
        self._closing = False
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether anyone works."""
        return self._thread.is_alive()

    @property
    def in_flight(self) -> int:
        """Requests that have not ended."""
        return len(self._listeners)

    def submit(self, requests: Sequence[Request], listen: Callable[[Event], None]) -> list[int]:
        """Line requests up, all or none; a ticket for each, which its events carry as `request`.

        Args:
          listen: called in the engine's thread with each event; must be quick, and may not fail.

        Raises:
          ValueError: what `Engine.check` refuses.
          QueueFull: no room for all of them.
        """
        for request in requests:
            self.engine.check(request)
        with self._changed:
            if self._closing or len(self._listeners) + len(requests) > self.capacity:
                raise QueueFull
            tickets = [next(self._count) for _ in requests]
            self._inbox.extend(zip(tickets, requests, strict=True))
            self._listeners |= dict.fromkeys(tickets, listen)
            self._changed.notify()
        return tickets

    def cancel(self, ticket: int) -> None:
        """End a request, whose last event says so; one that has ended is left alone."""
        with self._changed:
            if ticket in self._listeners:
                self._gone.add(ticket)
                self._changed.notify()

    def close(self) -> None:
        """Cancel everything and end the thread."""
        with self._changed:
            self._closing = True
            self._gone |= self._listeners.keys()
            self._changed.notify()
        self._thread.join()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._inbox or self._gone or self._closing or self.engine.busy)
                if self._closing and not self._listeners:
                    return
                arrived, gone = list(self._inbox), set(self._gone)
                self._inbox.clear()
                self._gone.clear()
            try:
                for ticket, request in arrived:
                    number = self.engine.submit(request)
                    self._tickets[number], self._numbers[ticket] = ticket, number
                for ticket in gone & self._numbers.keys():
                    self.engine.cancel(self._numbers[ticket])
                events = self.engine.step()
            except Exception:
                # Whatever it was, the next requests may go well: a server that is silent helps nobody.
                logger.exception("the engine failed; its %d requests are told, and it begins anew", self.in_flight)
                self.failures += 1
                self.engine.reset()
                with self._changed:
                    self._inbox.clear()
                    lost = list(self._listeners)
                for ticket in lost:
                    self._tell(ticket, Event(ticket, finish=FAILED))
                continue
            for event in events:
                self._tell(self._tickets[event.request], event._replace(request=self._tickets[event.request]))

    def _tell(self, ticket: int, event: Event) -> None:
        with self._changed:
            listen = self._listeners[ticket]
            if event.finish:
                del self._listeners[ticket]
                if (number := self._numbers.pop(ticket, None)) is not None:
                    del self._tickets[number]
        listen(event)
