"""A small model behind its server, on this machine's loopback, in threads of this process."""

import http.client
import json
import socket
import threading
import time
from contextlib import contextmanager
from typing import NamedTuple

import uvicorn

from ctllm_jax.config.serve import ServeConfig
from ctllm_jax.config.sft import TemplateConfig
from ctllm_jax.data.templates import open_template
from ctllm_jax.data.tokenizer import load_tokenizer
from ctllm_jax.inference.connections import BACKLOG, limited
from ctllm_jax.inference.engine import Engine
from ctllm_jax.inference.serving.protocol import Served
from ctllm_jax.inference.serving.server import Server
from ctllm_jax.inference.worker import Worker
from data_prep.train_tokenizer import fit
from tests.inference.models import make_model

VOCABULARY, LENGTH = 300, 1024
COMPLETIONS = "/v1/completions"


class Small(NamedTuple):
    """A model, and how it is served."""

    model: tuple
    served: Served


class Running(NamedTuple):
    """A server: where it is, and what is behind it."""

    port: int
    worker: Worker
    server: Server

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}"

    def ask(self, path, body=None, *, headers=(), method=None):
        """(status, headers, body) of a request as bytes or JSON."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=300)
        try:
            content = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
            connection.request(method or ("GET" if body is None else "POST"), path, content,
                               {"Content-Type": "application/json", **dict(headers)})
            response = connection.getresponse()
            return response.status, dict(response.headers), response.read()
        finally:
            connection.close()

    def is_idle(self, seconds=20):
        """Whether all slots are free, within some seconds."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if not (self.worker.in_flight or self.worker.engine.busy or self.worker.engine.running):
                return True
            time.sleep(0.02)
        return False


def body(**fields):
    """A request of `COMPLETIONS`."""
    return {"model": "small", "prompt": "今天", "max_tokens": 12, "seed": 1, **fields}


def make_small(folder):
    """A model of random weights with a SentencePiece tokenizer and a plain template."""
    (folder / "t.model").write_bytes(fit(["今天天气不错 the model reads text"] * 20, vocab_size=VOCABULARY,
                                         character_coverage=0.99))
    tokenizer = load_tokenizer(folder / "t.model")
    template = open_template(TemplateConfig(kind="plain"), tokenizer)
    model = make_model(f"model.vocab_size={VOCABULARY}", f"model.context_length={LENGTH}", "model.init_std=0.2")
    return Small(model, Served("small", tokenizer, template, tokenizer.eos_id, tokenizer.eos_id,
                               (tokenizer.eos_id,), LENGTH))


@contextmanager
def serving(small, *, api_key=None, slots=4, steps=4, **settings):
    """A running server; at the end it is shut down, and nothing of it is left."""
    config = ServeConfig(slots=slots, steps=steps, **settings)
    engine = Engine(*small.model, tokenizer=small.served.tokenizer, slots=slots, max_length=small.served.max_length,
                    steps=steps)
    worker = Worker(engine, max_queue=config.max_queue)
    server = Server(small.served, worker, config, api_key=api_key)
    protocol = limited(read_timeout=config.read_timeout, max_connections=config.max_connections)
    listener = uvicorn.Server(uvicorn.Config(server.app(), http=protocol, ws="none", lifespan="off", log_config=None,
                                             access_log=False, timeout_graceful_shutdown=1, backlog=BACKLOG))
    with socket.create_server(("127.0.0.1", 0), backlog=BACKLOG) as sock:
        thread = threading.Thread(target=listener.run, kwargs={"sockets": [sock]})
        thread.start()
        try:
            while not listener.started:
                assert thread.is_alive()
                time.sleep(0.01)
            yield Running(sock.getsockname()[1], worker, server)
        finally:
            listener.should_exit = True
            thread.join()
            worker.close()
    assert not worker.alive
