"""`launch.py serve MODEL`: an OpenAI-compatible server for a model, with a chat page."""

from __future__ import annotations

import contextlib
import os
import socket
from pathlib import Path
from typing import TYPE_CHECKING

from ctllm_jax.config.errors import UserError
from ctllm_jax.config.serve import ServeConfig

if TYPE_CHECKING:
    from ctllm_jax.cli import Context

SCHEMA = ServeConfig
_LOOPBACK = ("127.0.0.1", "localhost", "::1")
USAGE = """
usage: python launch.py serve MODEL [key=value …]

MODEL is a run directory (its newest checkpoint), or RUN@STEP. /v1/models, /v1/completions and /v1/chat/completions
answer as OpenAI's do, with streaming; a page to chat is at /, /health and /metrics are for those who watch over it:
  python launch.py serve runs/chat
  python launch.py serve runs/chat port=9000 slots=16 dtype=bfloat16
  CTLLM_API_KEY=secret python launch.py serve runs/chat host=0.0.0.0
It is for trying a model, and for evaluations. In production, export the model and use vLLM.
"""


def run(context: Context) -> int:
    """Load the model, listen until interrupted."""
    if len(context.targets) != 1:
        raise UserError("serve needs one MODEL: a run directory, or RUN@STEP")
    config = context.config
    key = read_key(config)
    try:
        import uvicorn

        from ctllm_jax.inference.connections import BACKLOG, allow_files, limited
        from ctllm_jax.inference.serving.server import Server
    except ImportError as error:
        raise UserError(f"serve needs the packages starlette and uvicorn ({error}): pip install 'ctllm-jax[serve]'"
                        ) from None
    from dataclasses import replace

    from ctllm_jax.inference.model import load_model, with_template
    from ctllm_jax.inference.serving.protocol import Served
    from ctllm_jax.inference.worker import Worker

    allow_files(config.max_connections)
    name = context.targets[0]
    model = load_model(name, dtype=config.dtype, mesh=config.mesh)
    if config.template is not None:
        model = with_template(model, config.template, name=name)
    engine = model.engine(slots=config.slots, max_length=config.max_length, steps=config.steps)
    model = replace(model, params=None)  # The engine has its own.
    served = Served(config.name or Path(name).name, model.tokenizer, model.template, model.prefix_id, model.stop_id,
                    model.stop_ids, engine.max_length, config.max_tokens, drawing=model.drawing)
    worker = Worker(engine, max_queue=config.max_queue)
    server = Server(served, worker, config, api_key=key)
    listener = uvicorn.Server(uvicorn.Config(
        server.app(), host=config.host, port=config.port, ws="none", lifespan="off", log_config=None, access_log=False,
        http=limited(read_timeout=config.read_timeout, max_connections=config.max_connections), backlog=BACKLOG,
        server_header=False, timeout_graceful_shutdown=3))
    try:
        sock = socket.create_server((config.host, config.port), backlog=BACKLOG,
                                    family=socket.AF_INET6 if ":" in config.host else socket.AF_INET)
    except OSError as error:
        worker.close()
        raise UserError(f"host={config.host} port={config.port} cannot be listened at: {error.strerror}") from None
    address = f"[{config.host}]" if ":" in config.host else config.host
    context.console.print(f"{served.name} ({model.run_dir}, step {model.step:,}): http://{address}:"
                          f"{sock.getsockname()[1]}/v1, a page to chat at /; {engine.slots} at once, "
                          f"{engine.max_length:,} tokens each; Ctrl-C ends")
    if config.host not in _LOOPBACK:
        context.console.print("[yellow]warning:[/] there is no TLS here, so the API key and all texts can be read on "
                              "the way: put a proxy with TLS before this server")
    if served.template is None:
        context.console.print("[yellow]warning:[/] the model was not taught to answer: /v1/completions only")
    try:
        with contextlib.suppress(KeyboardInterrupt):  # the way in which it ends
            listener.run(sockets=[sock])
    finally:
        worker.close()
        sock.close()
    return 0


def read_key(config: ServeConfig) -> str | None:
    """The API key, or None if none is needed.

    Raises:
      UserError: there is no key for an address that others can reach.
    """
    key = os.environ.get(config.api_key_env, "").strip()
    if not key and config.host not in _LOOPBACK:
        raise UserError(f"host={config.host} can be reached from elsewhere, and so needs an API key: set the "
                        f"environment variable {config.api_key_env}, or leave host at 127.0.0.1")
    return key or None
