"""A client of OpenAI-compatible chat completions, based on the standard library. No jax.

The key is sent only in one header of requests to `base_url`: redirects are not followed, and no message shows it.
"""

from __future__ import annotations

import email.utils
import http.client
import ipaddress
import json
import logging
import math
import os
import queue
import random
import socket
import ssl
import threading
import time
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from ctllm_jax.config.endpoint import EndpointConfig
from ctllm_jax.config.errors import UserError
from ctllm_jax.config.statuses import FAILED
from ctllm_jax.data.chat import Message
from ctllm_jax.report.readable import visible

_LONGEST_WAIT = 60.0  # seconds between two tries, unless the server asks for more
_LONGEST_RETRY_AFTER = 3600.0
_MOST_BYTES = 2**25
_SHOWN = 500  # characters of a server's text in a message
_STOPS_ALL = (401, 402, 404, 405)
"""Statuses that every request would get: key, account, address or model are wrong."""
_MAY_STOP_ALL = 403
"""After the server has answered another request, these statuses concern only this request, such as a gateway's content
filter."""
logger = logging.getLogger(__name__)


class Request(NamedTuple):
    """The messages to answer, the seed that is sent if `send_seed` is set, and a temperature that replaces the
    config's."""

    messages: Sequence[Message]
    seed: int | None = None
    temperature: float | None = None


class Reply(NamedTuple):
    """An answer. `is_cut`: the limit on tokens ended it. `model` is the name that the server reported."""

    text: str
    is_cut: bool
    model: str
    prompt_tokens: int
    completion_tokens: int


class EndpointError(UserError):
    """The reason for a missing answer.

    Attributes:
      retriable: a retry may succeed.
      concerns_all: every other request would fail, too.
      retry_after: seconds that the server asks to wait.
    """

    def __init__(self, message: str, *, retriable: bool = False, concerns_all: bool = False,
                 retry_after: float | None = None):
        super().__init__(message)
        self.retriable, self.concerns_all, self.retry_after = retriable, concerns_all, retry_after


class Endpoint:
    """A client of one endpoint, for any number of threads.

    Args:
      backoff: seconds before the second try; they double from one try to the next, with a random part.

    Raises:
      UserError: the variable that the config names holds no key.
    """

    def __init__(self, config: EndpointConfig, *, backoff: float = 1.0):
        self.config = config
        self.url = f"{config.base_url}/chat/completions"
        self._key = _read_key(config.api_key_env)
        self._backoff = backoff
        address = urlsplit(self.url)
        is_here = _is_loopback(address.hostname or "")
        if self._key is not None and address.scheme == "http" and not is_here:
            logger.warning("%s: the API key and all texts are sent without encryption, and can be read on the way: use "
                           "https, or a tunnel to an address of this machine", self.url)
        # Addresses of this machine never use a proxy; for others urllib reads the environment.
        proxies = [urllib.request.ProxyHandler({})] if is_here else []
        self._opener = urllib.request.build_opener(_NoRedirect, *proxies)
        self._free_at = 0.0  # time until which the server has asked all requests to wait
        self._has_answered = False

    def ask(self, request: Request, *, stop: threading.Event | None = None) -> Reply:
        """The answer to a request, after as many tries as the config allows.

        Args:
          stop: once set, no further retry is made.

        Raises:
          EndpointError: there is none.
        """
        stop = stop or threading.Event()
        for attempt in range(self.config.retries + 1):
            if stop.wait(max(0.0, self._free_at - time.monotonic())):
                raise EndpointError(f"{self.url}: stopped")
            try:
                reply = self._try(request)
                self._has_answered = True
                return reply
            except EndpointError as error:
                asked = error.retry_after or 0.0
                if not error.retriable or attempt == self.config.retries or asked > _LONGEST_RETRY_AFTER:
                    tries = f" (after {attempt + 1} tries)" if attempt else ""
                    tries += f"; it asks to wait {asked:,.0f} s" if asked > _LONGEST_RETRY_AFTER else ""
                    raise EndpointError(f"{error}{tries}", concerns_all=error.concerns_all) from None
                # Half of the wait is random, so that requests that failed together are not retried together.
                wait = min(self._backoff * 2**attempt, _LONGEST_WAIT) * random.uniform(0.5, 1.0)
                if asked:
                    self._free_at = max(self._free_at, time.monotonic() + asked)
                logger.log(logging.INFO if attempt < 2 else logging.WARNING, "%s; try %d of %d in %.1f s", error,
                           attempt + 2, self.config.retries + 1, max(wait, asked))
                if stop.wait(max(wait, asked)):
                    raise EndpointError(f"{self.url}: stopped") from None
        raise AssertionError("a loop that returns or raises")

    def ask_many(self, requests: Iterable[Request], *, ahead: int | None = None) -> Iterator[Reply | EndpointError]:
        """Yield the answer to each request, or the reason why there is none, in the order of the requests.

        Args:
          ahead: requests begun before their answers are taken; None: four times `concurrency`.

        Raises:
          EndpointError: one that concerns all requests; one of an endpoint that has never answered; the last of
            `max_failures` in a row.
        """
        ahead = max(self.config.concurrency, 4 * self.config.concurrency if ahead is None else ahead)
        tasks: queue.SimpleQueue = queue.SimpleQueue()
        stop = threading.Event()
        pending: deque[Future] = deque()
        failures = 0

        def taken() -> Reply | EndpointError:
            nonlocal failures
            reply = pending.popleft().result()
            failures = failures + 1 if isinstance(reply, EndpointError) else 0
            if failures and (reply.concerns_all or failures >= self.config.max_failures):
                last = EndpointError(f"{reply}; {failures} requests in a row have failed" if failures > 1 else
                                     str(reply))
                last.status = FAILED if reply.retriable else last.status
                raise last
            return reply

        def work() -> None:
            while (task := tasks.get()) is not None:
                request, future = task
                try:
                    future.set_result(self.ask(request, stop=stop))
                except EndpointError as error:
                    future.set_result(error)
                except BaseException as error:
                    future.set_exception(error)

        # Daemon threads, so that a hanging request does not delay the end of the process.
        threads = [threading.Thread(target=work, daemon=True) for _ in range(self.config.concurrency)]
        for thread in threads:
            thread.start()
        try:
            for request in requests:
                future: Future = Future()
                pending.append(future)
                tasks.put((request, future))
                if len(pending) >= ahead:
                    yield taken()
            while pending:
                yield taken()
        finally:
            stop.set()
            for _ in threads:
                tasks.put(None)

    def _try(self, request: Request) -> Reply:
        config = self.config
        body = {"model": config.model, "messages": [{"role": message.role, "content": message.content}
                                                    for message in request.messages],
                "max_tokens": config.max_tokens, "top_p": config.top_p,
                "temperature": config.temperature if request.temperature is None else request.temperature,
                "seed": request.seed if config.send_seed else None, **config.body}
        headers = {"Content-Type": "application/json", "Accept": "application/json", "User-Agent": "ctllm-jax"}
        if self._key is not None:
            headers["Authorization"] = f"Bearer {self._key}"
        data = json.dumps({name: value for name, value in body.items() if value is not None}).encode()
        sent = urllib.request.Request(self.url, data=data, headers=headers, method="POST")
        until = time.monotonic() + config.timeout
        try:
            with self._opener.open(sent, timeout=config.timeout) as response:
                content = self._read(response, until)
                kind = response.headers.get_content_type()
        except urllib.error.HTTPError as error:
            raise self._refused(error, until) from None
        except urllib.error.URLError as error:
            raise self._lost(error.reason) from None
        except (OSError, http.client.HTTPException) as error:
            raise self._lost(error) from None
        return self._parse(content, kind)

    def _read(self, response: Any, until: float) -> bytes:
        """Read the body until the time `until`, because a socket's timeout restarts with each read."""
        parts, size = [], 0
        while part := response.read1(2**16):
            parts.append(part)
            size += len(part)
            if size > _MOST_BYTES:
                raise EndpointError(f"{self.url}: an answer of more than {_MOST_BYTES:,} bytes")
            if time.monotonic() > until:
                raise TimeoutError
        if response.length:
            raise http.client.IncompleteRead(b"", response.length)
        return b"".join(parts)

    def _refused(self, error: urllib.error.HTTPError, until: float) -> EndpointError:
        """The error for a status other than 2xx, with the server's text."""
        status = error.code
        try:
            with error:
                said = self._say(_error_text(self._read(error, until)))
        except (EndpointError, OSError, http.client.HTTPException):
            said = ""
        if 300 <= status < 400:
            return EndpointError(f"{self.url}: redirected to {self._say(error.headers.get('Location') or 'nowhere')}, "
                                 "which is not followed: a key is sent to base_url alone; give the address itself, if "
                                 "you trust it", concerns_all=True)
        hint = {401: "; is the key right, and api_key_env its variable?" if self._key else
                     "; it wants a key: api_key_env names the variable that holds it",
                404: f"; is base_url right, and is there a model {self.config.model!r}?"}.get(status, "")
        concerns_all = status in _STOPS_ALL or status == _MAY_STOP_ALL and not self._has_answered
        return EndpointError(
            f"{self.url}: {status} {self._say(error.reason or '')}{': ' if said else ''}{said}{hint}",
            retriable=status in (408, 429) or status >= 500, concerns_all=concerns_all,
            retry_after=_seconds(error.headers.get("Retry-After")))

    def _lost(self, reason: Any) -> EndpointError:
        """The error of a failed or lost connection."""
        host = urlsplit(self.url).netloc
        never = not self._has_answered
        if isinstance(reason, ssl.SSLCertVerificationError):
            return EndpointError(f"{self.url}: the certificate of {host} is not trusted: {reason.verify_message}",
                                 concerns_all=True)
        if isinstance(reason, socket.gaierror):
            return EndpointError(f"{self.url}: there is no host {host}, or no name service ({reason.strerror})",
                                 retriable=reason.errno == socket.EAI_AGAIN, concerns_all=never)
        if isinstance(reason, ConnectionRefusedError):
            said = f"{host} refuses connections: is the server up, and this its port?"
        elif isinstance(reason, TimeoutError):
            said = f"no answer within timeout={self.config.timeout:g} s"
        elif isinstance(reason, http.client.IncompleteRead):
            said = "the connection was lost in the middle of an answer"
        else:
            said = self._say(f"the connection was lost: {reason or type(reason).__name__}")
        return EndpointError(f"{self.url}: {said}", retriable=True, concerns_all=never)

    def _parse(self, content: bytes, kind: str) -> Reply:
        never = not self._has_answered
        try:
            found = json.loads(content.decode("utf-8-sig"))
        except (ValueError, RecursionError):
            # JSON that does not parse was truncated; a page of HTML means a wrong address.
            raise EndpointError(f"{self.url}: the answer is not JSON but {kind}: {self._say(_decoded(content))[:80]!r}",
                                retriable="json" in kind, concerns_all=never) from None
        if isinstance(found, dict) and found.get("error"):
            # Some servers answer 200 with an error inside.
            raise EndpointError(f"{self.url}: {self._say(_error_text(content))}")
        choices = found.get("choices") if isinstance(found, dict) else None
        if not isinstance(choices, list):
            seen = ", ".join(found) if isinstance(found, dict) else type(found).__name__
            raise EndpointError(f"{self.url}: the answer has no choices, so this is no chat completion; it has "
                                f"{self._say(seen) or 'nothing'}", concerns_all=never)
        if not choices:
            raise EndpointError(f"{self.url}: the answer's choices are empty")
        message = choices[0].get("message") if isinstance(choices[0], dict) else None
        text = message.get("content", ...) if isinstance(message, dict) else ...
        if text is not None and not isinstance(text, str):
            raise EndpointError(f"{self.url}: the answer has no text in choices[0].message.content", concerns_all=never)
        usage = found["usage"] if isinstance(found.get("usage"), dict) else {}
        counts = [usage.get(name) for name in ("prompt_tokens", "completion_tokens")]
        # A half surrogate can be written in JSON, but not in UTF-8.
        text, model = (each.encode("utf-8", errors="replace").decode("utf-8")
                       for each in (text or "", str(found.get("model") or self.config.model)))
        return Reply(text, choices[0].get("finish_reason") == "length", model,
                     *(max(0, count) if isinstance(count, int) else 0 for count in counts))

    def _say(self, text: str) -> str:
        """A server's text for a message: on one line, short, and without the key."""
        text = text.replace(self._key, "…") if self._key else text
        text = " ".join(visible(text).split())
        return text if len(text) <= _SHOWN else text[:_SHOWN] + "…"


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect is an error, because it would send the key and the prompt to an address that the user did not give."""

    def http_error_302(self, *args: Any) -> None:
        return None

    http_error_301 = http_error_303 = http_error_307 = http_error_308 = http_error_302


def _read_key(name: str | None) -> str | None:
    if name is None:
        return None
    shown = f"api_key_env={name}" if name.isupper() else "api_key_env"  # else it may be the key itself
    value = os.environ.get(name, "").strip()
    if not value:
        raise UserError(f"{shown}: there is no such environment variable, or it is empty")
    if not all("!" <= character <= "~" for character in value):
        raise UserError(f"{shown}: the variable holds white space or characters that no HTTP header can hold")
    return value


def _is_loopback(host: str) -> bool:
    try:
        address = ipaddress.ip_address(host)
        return address.is_loopback or address.is_unspecified
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def _seconds(value: str | None) -> float | None:
    """Seconds of a Retry-After header: a number, or a date."""
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except ValueError:
            return None
    return max(0.0, seconds) if math.isfinite(seconds) else None


def _error_text(content: bytes) -> str:
    """A server's description of an error: its JSON's message, or the plain text."""
    text = _decoded(content)
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return text
    for name in ("error", "message", "detail"):
        if isinstance(found, dict) and found.get(name):
            found = found[name]
    return found if isinstance(found, str) else json.dumps(found, ensure_ascii=False)


def _decoded(content: bytes) -> str:
    return content.decode("utf-8", errors="replace")
