"""Clients that keep a connection without asking anything, and those that do not take their answers."""

import resource
import select
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress

import pytest

from ctllm_jax.config.errors import UserError
from ctllm_jax.inference.connections import allow_files
from tests.inference.serving import COMPLETIONS, body, serving


@pytest.fixture(scope="module")
def running(small):
    with serving(small, read_timeout=1.5) as running:
        yield running


HEALTH = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"


def test_every_head_has_its_time(running):
    """A second head that is left open, one that comes byte by byte, and a body that nobody asked for."""
    for rest in (b"GET /health HT", b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: "):
        with socket.create_connection(("127.0.0.1", running.port), timeout=20) as connection:
            connection.sendall(HEALTH)
            assert b"200 OK" in connection.recv(4096)
            connection.sendall(rest)
            assert b"408" in connection.recv(4096) and connection.recv(4096) == b""
    for begun in (b"", HEALTH[:-4] + b"\r\nContent-Length: 9999\r\n\r\n"):
        with socket.create_connection(("127.0.0.1", running.port)) as connection:
            connection.sendall(begun)
            connection.settimeout(0.2)
            for _ in range(100):
                with suppress(TimeoutError):
                    if connection.recv(4096) == b"":
                        break
                with suppress(BrokenPipeError):
                    connection.sendall(b"G")
            else:
                raise AssertionError("a byte now and then keeps a connection open")


def test_who_does_not_read_is_left(running):
    """Answers that are never taken fill the buffers; then the connection is cut."""
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", running.port))
        connection.setblocking(False)
        page = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n" * 100
        poller = select.poll()
        poller.register(connection, select.POLLOUT)
        for _ in range(1000):
            (_, events), = poller.poll(20_000)
            if events & (select.POLLHUP | select.POLLERR):
                break
            with suppress(BlockingIOError, ConnectionError):
                connection.send(page)
            if not poller.poll(0):
                poller.modify(connection, 0)  # full in both directions: only its end is waited for
        else:
            raise AssertionError("the server goes on writing to a client that does not read")


def test_connections_are_limited_and_those_that_say_nothing_give_way(small, monkeypatch):
    with serving(small, slots=1, max_connections=6, read_timeout=300.0) as running, ExitStack() as stack:
        for _ in range(40):
            stack.enter_context(socket.create_connection(("127.0.0.1", running.port)))
        assert running.ask("/health")[0] == 200 and running.ask(COMPLETIONS, body())[0] == 200
        # All of them are being answered: there is no room, until one has its answer.
        free, step = threading.Event(), running.worker.engine.step
        monkeypatch.setattr(running.worker.engine, "step", lambda: (free.wait(60), step())[1])
        with ThreadPoolExecutor(6) as pool:
            asked = [pool.submit(running.ask, COMPLETIONS, body(seed=seed)) for seed in range(6)]
            while running.worker.in_flight < 6:
                time.sleep(0.01)
            assert running.ask("/health")[0] == 503
            free.set()
            assert [each.result()[0] for each in asked] == [200] * 6
        assert running.ask("/health")[0] == 200


def test_files_are_allowed_for_the_connections_or_it_is_said(monkeypatch):
    limits = {"now": (256, 4096)}
    monkeypatch.setattr(resource, "getrlimit", lambda which: limits["now"])
    monkeypatch.setattr(resource, "setrlimit", lambda which, pair: limits.update(now=pair))
    allow_files(512)
    assert limits["now"] == (768, 4096)
    allow_files(100)
    assert limits["now"] == (768, 4096)
    with pytest.raises(UserError, match="max_connections=4096 needs 4,352 open files, and the limit is 4,096"):
        allow_files(4096)
