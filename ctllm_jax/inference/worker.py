"""A thread that runs an engine for callers in other threads."""

from __future__ import annotations

import itertools
import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence

from ctllm_jax.inference.engine import Engine
from ctllm_jax.inference.request import FAILED, Event, Request

logger = logging.getLogger(__name__)


class QueueFull(Exception):
    """The queue is full."""


class Worker:
    """Accepts requests from any thread for one engine in its own thread.

    Args:
      engine: used only by this object from now on.
      max_queue: largest number of requests that wait for a slot.

    Attributes:
      failures: errors in the engine. An error of a request ends that request; an error of a step ends all running
        requests. Waiting requests are served afterwards.
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
        """Whether the thread is running."""
        return self._thread.is_alive()

    @property
    def in_flight(self) -> int:
        """Requests that have not ended."""
        return len(self._listeners)

    def submit(self, requests: Sequence[Request], listen: Callable[[Event], None]) -> list[int]:
        """Queue requests, all or none; returns a ticket for each, which its events contain as `request`.

        Args:
          listen: called in the engine's thread with each event; must be fast, and must not raise.

        Raises:
          ValueError: `Engine.check` refuses one.
          QueueFull: there is no space for all of them.
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
        """Cancel a request, which its last event reports; an ended request is ignored."""
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
            for ticket, request in arrived:
                self._submit(ticket, request)
            try:
                for ticket in gone & self._numbers.keys():
                    self.engine.cancel(self._numbers[ticket])
                events = self.engine.step()
            except Exception:
                logger.exception("a step of the engine failed; the requests that it worked on are lost")
                self._begin_again()
                continue
            for event in events:
                self.failures += event.finish == FAILED
                if event.request in self._tickets:  # else its listener was told already, when a reset failed
                    self._tell(self._tickets[event.request], event)

    def _submit(self, ticket: int, request: Request) -> None:
        try:
            number = self.engine.submit(request)
        except Exception:
            logger.exception("the engine could not take a request; the others are not touched")
            self.failures += 1
            self._tell(ticket, Event(ticket, finish=FAILED))
        else:
            self._tickets[number], self._numbers[ticket] = ticket, number

    def _begin_again(self) -> None:
        """After any error later requests may succeed, so this thread must not end."""
        self.failures += 1
        try:
            lost = [self._tickets[number] for number in self.engine.reset() if number in self._tickets]
        except Exception:
            logger.exception("the engine could not be reset; all of its requests are lost")
            lost = list(self._numbers)
            for number in self._tickets:
                self.engine.cancel(number)
        for ticket in lost:
            self._tell(ticket, Event(ticket, finish=FAILED))

    def _tell(self, ticket: int, event: Event) -> None:
        with self._changed:
            listen = self._listeners[ticket]
            if event.finish:
                del self._listeners[ticket]
                if (number := self._numbers.pop(ticket, None)) is not None:
                    del self._tickets[number]
        try:
            listen(event._replace(request=ticket))
        except Exception:
            logger.exception("the listener of a request failed")
