"""A server of chat completions on this machine's loopback, which fails in the ways that it is told to."""

import json
import threading
import time
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple

KEY = "sk-secret-0123456789abcdef"


class Asked(NamedTuple):
    """A request as it arrived."""

    path: str
    headers: dict
    body: dict
    time: float


class Say(NamedTuple):
    """How a request is answered. `body` of None: a completion of `text`; `cut`: the connection ends before the body."""

    text: str = ""
    status: int = 200
    headers: dict = {}
    body: object = None
    delay: float = 0.0
    cut: bool = False
    trickle: float = 0.0


def completion(text, *, finish="stop", model="served-model"):
    """A completion as OpenAI writes it."""
    return {"id": "1", "object": "chat.completion", "model": model,
            "choices": [{"index": 0, "finish_reason": finish, "message": {"role": "assistant", "content": text}}],
            "usage": {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}}


class ChatServer:
    """Answers with `script(asked, number of the request, from 0)`, a `Say` or a text; `asked` holds what came."""

    def __init__(self, script=lambda asked, number: asked.body["messages"][-1]["content"][::-1], path="/v1"):
        self.script, self.path = script, path
        self.asked = []
        self.lock = threading.Lock()
        self.at_once = self.most_at_once = 0
        self.closing = threading.Event()

    @property
    def base_url(self):
        return f"http://127.0.0.1:{self.server.server_address[1]}{self.path}"

    def __enter__(self):
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                outer.handle(self)

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01})
        self.thread.start()
        return self

    def __exit__(self, *exception):
        self.closing.set()
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    def handle(self, handler):
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        asked = Asked(handler.path, dict(handler.headers), body, time.monotonic())
        with self.lock:
            number = len(self.asked)
            self.asked.append(asked)
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            say = self.script(asked, number)
            say = Say(say) if isinstance(say, str) else say
            self.closing.wait(say.delay)
        finally:
            with self.lock:  # before the answer: its reader may ask again before this thread continues
                self.at_once -= 1
        with suppress(BrokenPipeError, ConnectionResetError):
            self.send(handler, say)

    def send(self, handler, say):
        body = completion(say.text) if say.body is None else say.body
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        handler.close_connection = True
        handler.send_response(say.status)
        headers = {"Content-Type": "application/json", "Content-Length": str(len(data)), **say.headers}
        for name, value in headers.items():
            handler.send_header(name, value)
        handler.end_headers()
        data = data[:len(data) // 2] if say.cut else data
        if not say.trickle:
            handler.wfile.write(data)
            return
        for index in range(len(data)):
            handler.wfile.write(data[index:index + 1])
            handler.wfile.flush()
            if self.closing.wait(say.trickle):
                return
