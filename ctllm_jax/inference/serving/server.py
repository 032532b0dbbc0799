"""An OpenAI-compatible HTTP server for a model: /v1/models, /v1/completions, /v1/chat/completions, and a chat page.

For trying a model and for tests. When a client disconnects, its slot is freed. Requests that are too large, too slow,
malformed or unauthorized get an error status, and do not affect others.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import logging
import re
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from ctllm_jax.config.serve import ServeConfig
from ctllm_jax.inference.request import FAILED, Event
from ctllm_jax.inference.serving.metrics import Metrics
from ctllm_jax.inference.serving.protocol import Answer, ProtocolError, Served, read_chat, read_completions
from ctllm_jax.inference.worker import QueueFull, Worker

LOOPBACK = ("127.0.0.1", "localhost", "::1")
_HOST = re.compile(r"([a-z0-9.-]+|\[[0-9a-f:.]+\])(?::[0-9]{1,5})?", re.IGNORECASE)
_PAGE = Path(__file__).with_name("chat_page.html")
_OPEN = ("/", "/health")
"""Paths that need no key: they reveal nothing about the model, and start no work."""
# Only our page may be shown or run here, and it contacts no other server.
_POLICY = ("default-src 'none'; img-src data:; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
           "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'")
_CLIENT_GONE = 499
logger = logging.getLogger(__name__)


class Server:
    """Shared state of the routes.

    Args:
      served: the model's context for reading requests.
      worker: the thread of the engine.
      api_key: the key that requests must contain; None: none.
    """

    def __init__(self, served: Served, worker: Worker, config: ServeConfig, *, api_key: str | None):
        self._served, self._worker, self._config, self._key = served, worker, config, api_key
        self.metrics = Metrics()

    def app(self) -> Starlette:
        """The application."""
        return Starlette(
            routes=[Route("/", self._page), Route("/health", self._health), Route("/metrics", self._metrics),
                    Route("/v1/models", self._models), Route("/v1/models/{name:path}", self._models),
                    Route("/v1/completions", self._completions, methods=["POST"]),
                    Route("/v1/chat/completions", self._chat, methods=["POST"])],
            middleware=[Middleware(_Guard, self)],
            exception_handlers={HTTPException: _http_error})

    def allows(self, request: Request) -> None:
        """Raise ProtocolError if a request has no key, comes from another site's page, or has an ambiguous length."""
        if "content-length" in request.headers and "transfer-encoding" in request.headers:
            # A proxy before this server may read one of them where this server reads the other.
            raise ProtocolError(400, "give Content-Length or Transfer-Encoding, not both: the end of the body is not "
                                     "certain")
        if self._key is None:
            # Without a key, only the host name protects the server: a page under another name that resolves here gets
            # no answer.
            if _host(request.headers.get("host", "")) not in LOOPBACK:
                raise ProtocolError(403, "Host: this server is asked as localhost or 127.0.0.1; for another name, give "
                                         f"it a key ({self._config.api_key_env})")
        elif request.url.path not in _OPEN:
            kind, _, given = request.headers.get("authorization", "").partition(" ")
            if kind.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), self._key.encode()):
                raise ProtocolError(401, "this server needs its API key: Authorization: Bearer KEY",
                                    code="invalid_api_key")

    async def _page(self, request: Request) -> Response:
        return HTMLResponse(_PAGE.read_text(encoding="utf-8"), headers={
            "Content-Security-Policy": _POLICY, "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"})

    async def _health(self, request: Request) -> Response:
        is_well = self._worker.alive
        return JSONResponse({"status": "ok" if is_well else "down"}, status_code=200 if is_well else 503)

    async def _metrics(self, request: Request) -> Response:
        worker, engine = self._worker, self._worker.engine
        counts = engine.counts
        text = self.metrics.text(
            gauges={"slots": ("requests that can run at once", engine.slots),
                    "running": ("requests that run", engine.running),
                    "waiting": ("requests that wait for a slot", max(0, worker.in_flight - engine.running))},
            counters={"requests_total": ("texts asked for", counts["requests"]),
                      "cancelled_total": ("texts that nobody waited for any more", counts["cancelled"]),
                      "prefill_tokens_total": ("tokens of prompts that were read", counts["prefill_tokens"]),
                      "reused_tokens_total": ("tokens of prompts that were in the cache", counts["reused_tokens"]),
                      "generated_tokens_total": ("tokens that were written", counts["generated_tokens"]),
                      "engine_failures_total": ("errors in the engine", worker.failures)})
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4")

    async def _models(self, request: Request) -> Response:
        served = self._served
        model = {"id": served.name, "object": "model", "created": served.created, "owned_by": "ctllm-jax",
                 "max_model_len": served.max_length, "chat": served.template is not None}
        name = request.path_params.get("name")
        if name is None:
            return JSONResponse({"object": "list", "data": [model]})
        if name != served.name:
            raise ProtocolError(404, f"no model {name!r}: there is {served.name!r}", code="model_not_found")
        return JSONResponse(model)

    async def _completions(self, request: Request) -> Response:
        return await self._answer(request, read_completions)

    async def _chat(self, request: Request) -> Response:
        return await self._answer(request, read_chat)

    async def _answer(self, request: Request, read: Callable[[Served, bytes], Answer]) -> Response:
        began = time.monotonic()
        body = await self._body(request)
        answer = await asyncio.to_thread(read, self._served, body)
        events: asyncio.Queue[Event] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def listen(event: Event) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended, and nothing waits
                loop.call_soon_threadsafe(events.put_nowait, event)

        if len(answer.requests) > self._worker.capacity:
            raise ProtocolError(400, f"{len(answer.requests)} texts in one request; at most {self._worker.capacity}",
                                param="n")
        try:
            tickets = self._worker.submit(answer.requests, listen)
        except QueueFull:
            raise ProtocolError(429, "too many requests wait already; try again", code="queue_full") from None
        except ValueError as error:
            raise ProtocolError(400, str(error), param="prompt") from None
        running = self._events(tickets, events, began)
        if answer.stream:
            return StreamingResponse(_sse(answer, running), media_type="text/event-stream",
                                     headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        return await self._whole(request, answer, running)

    async def _whole(self, request: Request, answer: Answer, running: AsyncIterator[tuple[int, Event]]) -> Response:
        """Return the complete answer; nothing if the client disconnects before."""
        said: list[list[Event]] = [[] for _ in answer.requests]

        async def collect() -> None:
            async with contextlib.aclosing(running):
                async for index, event in running:
                    said[index].append(event)

        collecting, leaving = asyncio.create_task(collect()), asyncio.create_task(_left(request))
        try:
            await asyncio.wait((collecting, leaving), return_when=asyncio.FIRST_COMPLETED)
            if not collecting.done():
                return Response(status_code=_CLIENT_GONE)
            await collecting
        finally:
            for task in (collecting, leaving):
                task.cancel()
            await asyncio.gather(collecting, leaving, return_exceptions=True)
        return JSONResponse(answer.whole(said))

    async def _events(self, tickets: list[int], events: asyncio.Queue[Event],
                      began: float) -> AsyncIterator[tuple[int, Event]]:
        """Yield (choice, event) until all have ended; leaving the loop early cancels the rest."""
        left, has_begun = set(tickets), False
        try:
            while left:
                try:
                    async with asyncio.timeout_at(began - time.monotonic() + asyncio.get_running_loop().time()
                                                  + self._config.timeout):
                        event = await events.get()
                except TimeoutError:
                    raise ProtocolError(408, f"the answer took longer than {self._config.timeout:g} s") from None
                if event.finish:
                    left.discard(event.request)
                if event.finish == FAILED:
                    raise ProtocolError(500, "the engine failed on this request; the log says why")
                if event.finish == "cancelled":
                    raise ProtocolError(503, "the server is shutting down")
                if event.tokens and not has_begun:
                    has_begun = True
                    self.metrics.first_token.add(time.monotonic() - began)
                yield event.request - tickets[0], event
            self.metrics.answer.add(time.monotonic() - began)
        finally:
            for ticket in left:
                self._worker.cancel(ticket)

    async def _body(self, request: Request) -> bytes:
        """Read the body if it is JSON, within the size limit, and arrives in time."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            # A page of another site can send other content types here without a preflight request.
            raise ProtocolError(415, "Content-Type must be application/json")
        most = self._config.max_body
        declared = request.headers.get("content-length", "0")
        too_large = ProtocolError(413, f"the body is larger than {most:,} bytes")
        if declared.isdecimal() and int(declared) > most:
            raise too_large
        content = bytearray()
        try:
            async with asyncio.timeout(self._config.read_timeout):
                async for chunk in request.stream():
                    content += chunk
                    if len(content) > most:
                        raise too_large
        except TimeoutError:
            raise ProtocolError(408, f"the body did not arrive in {self._config.read_timeout:g} s") from None
        return bytes(content)


class _Guard:
    """Middleware of all routes: the key check, errors in OpenAI's format, and the count of answers."""

    def __init__(self, app: Any, server: Server):
        self._app, self._server = app, server

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        request, status = Request(scope), 0

        async def watched(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            self._server.allows(request)
            await self._app(scope, receive, watched)
        except ProtocolError as error:
            if not status:
                # The unread rest of the body is not awaited.
                unread = error.status in (401, 403, 408, 413, 415) or "transfer-encoding" in request.headers
                headers = {"Connection": "close"} if unread else {}
                headers |= {"Retry-After": "1"} if error.status == 429 else {}
                headers |= {"WWW-Authenticate": "Bearer"} if error.status == 401 else {}
                await JSONResponse(error.body(), status_code=error.status, headers=headers)(scope, receive, watched)
        except ClientDisconnect:
            status = _CLIENT_GONE
        except Exception:
            logger.exception("%s %s failed", scope["method"], scope["path"])
            if status:
                raise
            error = ProtocolError(500, "the server failed on this request; the log says why")
            await JSONResponse(error.body(), status_code=500)(scope, receive, watched)
        finally:
            known = any(route.path == scope["path"] for route in scope["app"].routes) if "app" in scope else False
            self._server.metrics.answers[scope["path"] if known else "other", status or 500] += 1


async def _sse(answer: Answer, running: AsyncIterator[tuple[int, Event]]) -> AsyncIterator[str]:
    """Server-sent events. An error after the start is sent as an event."""
    async with contextlib.aclosing(running):
        try:
            async for index, event in running:
                for chunk in answer.chunks(index, event):
                    yield _line(chunk)
            if (last := answer.last_chunk()) is not None:
                yield _line(last)
        except ProtocolError as error:
            yield _line(error.body())
    yield "data: [DONE]\n\n"


def _line(content: Any) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False, separators=(',', ':'))}\n\n"


async def _left(request: Request) -> None:
    """Wait until the client has disconnected."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _http_error(request: Request, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else 500
    message = {404: f"no such path: {request.url.path}", 405: f"{request.method} is not for {request.url.path}"}
    return JSONResponse(ProtocolError(status, message.get(status, str(error))).body(), status_code=status,
                        headers=getattr(error, "headers", None))


def _host(header: str) -> str:
    """The name of a Host header, without its port; empty where it is malformed."""
    match = _HOST.fullmatch(header)
    return match[1].strip("[]").lower() if match else ""
