"""A server under load: 200 requests of mixed lengths at once, a quarter of which hang up midway.

    python benchmarks/server_load.py MODEL [--requests N] [--clients N] [--slots N]

Starts `launch.py serve MODEL` at a free port of this machine, warms it up, and asks for completions from many clients,
half of them as streams. Every answer must be whole and the same when it is asked for again alone; at the end no slot
may be taken, and what was asked for must be what ended and what was cancelled. Figures are of this machine and model.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import random
import re
import shlex
import signal
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from data_loading import cpu_name

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("jax", "starlette", "uvicorn")
PROMPTS = ("今天天气", "这家酒店的", "从前有一个", "The ", "手机")


class Answer(NamedTuple):
    """What a client got: HTTP status, text, seconds to its first and last byte."""

    status: int
    text: str
    first: float
    whole: float


def ask(base: str, body: dict[str, Any]) -> Answer:
    """A request, read to its end."""
    began = time.perf_counter()
    request = urllib.request.Request(f"{base}/v1/completions", json.dumps(body).encode(),
                                     {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=600) as response:
        lines, first = [], 0.0
        for line in response:
            first = first or time.perf_counter() - began
            lines.append(line.decode())
        status = response.status
    if not body["stream"]:
        return Answer(status, json.loads("".join(lines))["choices"][0]["text"], first, time.perf_counter() - began)
    events = [line[6:].strip() for line in lines if line.startswith("data: ")]
    if events[-1] != "[DONE]":
        raise RuntimeError("a stream ended early")
    text = "".join(choice["text"] for event in events[:-1] for choice in json.loads(event)["choices"])
    return Answer(status, text, first, time.perf_counter() - began)


def hang_up(port: int, body: dict[str, Any], *, after: float) -> None:
    """Ask, wait a little, and be gone."""
    content = json.dumps(body).encode()
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                           b"Content-Length: %d\r\n\r\n" % len(content) + content)
        time.sleep(after)


def read_metrics(base: str) -> dict[str, float]:
    """The server's own figures that have no label."""
    with urllib.request.urlopen(f"{base}/metrics", timeout=60) as response:
        text = response.read().decode()
    return {name: float(value) for name, value in re.findall(r"^ctllm_(\w+) ([\d.e+]+)$", text, re.MULTILINE)}


def start(model: str, slots: int) -> tuple[subprocess.Popen, int]:
    """The server and its port, once it answers."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port = sock.getsockname()[1]
    server = subprocess.Popen([sys.executable, str(ROOT / "launch.py"), "serve", model, f"port={port}",
                               f"slots={slots}", "max_queue=1000"], stdout=subprocess.DEVNULL)
    until = time.monotonic() + 120
    while time.monotonic() < until and server.poll() is None:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                return server, port
        except OSError:
            time.sleep(0.2)
    server.kill()
    raise RuntimeError("the server does not answer")


def measure(base: str, port: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """The load, and what came of it."""
    draw = random.Random(0)
    with urllib.request.urlopen(f"{base}/v1/models", timeout=60) as response:
        name = json.load(response)["data"][0]["id"]
    bodies = [{"model": name, "prompt": draw.choice(PROMPTS) * draw.randint(1, 12), "seed": number,
               "max_tokens": draw.randint(1, 80), "temperature": 1.0, "stream": bool(number % 2)}
              for number in range(arguments.requests)]
    leaving = draw.sample(range(arguments.requests), arguments.requests // 4)
    leave = {number: draw.uniform(0, 0.15) for number in leaving}

    def client(number: int) -> Answer | None:
        if number in leave:
            return hang_up(port, {**bodies[number], "max_tokens": 120}, after=leave[number])
        return ask(base, bodies[number])

    with ThreadPoolExecutor(arguments.clients) as pool:  # programs are compiled
        list(pool.map(lambda body: ask(base, body), bodies[:arguments.clients]))
    before, began = read_metrics(base), time.perf_counter()
    with ThreadPoolExecutor(arguments.clients) as pool:
        answers = list(pool.map(client, range(arguments.requests)))
    seconds = time.perf_counter() - began
    until = time.monotonic() + 60
    while (metrics := read_metrics(base))["running"] + metrics["waiting"] and time.monotonic() < until:
        time.sleep(0.1)
    since = {key: metrics[key] - before[key] for key in metrics}
    stayed = {number: answer for number, answer in enumerate(answers) if number not in leave}
    changed = sum(ask(base, bodies[number]).text != stayed[number].text for number in draw.sample(sorted(stayed), 20))
    first, whole = ([getattr(answer, part) for answer in stayed.values()] for part in ("first", "whole"))
    statuses = Counter(answer.status for answer in stayed.values())
    return {"requests": arguments.requests, "hung_up": len(leave), "answered": statuses[200],
            "lost": len(stayed) - statuses[200], "asked_again_alone": 20, "another_text": changed,
            "slots_taken_at_the_end": metrics["running"], "waiting_at_the_end": metrics["waiting"],
            "cancelled_by_the_server": since["cancelled_total"], "engine_failures": since["engine_failures_total"],
            "seconds": seconds, "generated_tokens_per_second": since["generated_tokens_total"] / seconds,
            **{f"seconds_to_{part}_byte": {"median": statistics.median(times), "p95": sorted(times)[
                int(len(times) * 0.95)], "most": max(times)} for part, times in (("first", first), ("last", whole))}}


def main() -> None:
    """Measure, print, write; status 1 where something was lost."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a MODEL: a run directory, RUN@STEP or a Hugging Face folder")
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--clients", type=int, default=40, help="requests on their way at once")
    parser.add_argument("--slots", type=int, default=8, help="of the server")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "server_load.json")
    arguments = parser.parse_args()
    server, port = start(arguments.model, arguments.slots)
    try:
        figures = measure(f"http://127.0.0.1:{port}", port, arguments)
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(60)
    for name, value in figures.items():
        parts = value if isinstance(value, dict) else {"": value}
        shown = ", ".join(f"{part} {each:,.4g}".strip() for part, each in parts.items())
        print(f"{name.replace('_', ' '):28} {shown}")
    result = {"figures": figures, "slots": arguments.slots, "clients": arguments.clients, "device": cpu_name(),
              "python": platform.python_version(), "load_average": os.getloadavg()[0],
              "versions": {package: importlib.metadata.version(package) for package in PACKAGES},
              "command": shlex.join(["python", "benchmarks/server_load.py", *sys.argv[1:]])}
    arguments.output.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    sys.exit(bool(figures["lost"] or figures["another_text"] or figures["slots_taken_at_the_end"]
                  or figures["engine_failures"]))


if __name__ == "__main__":
    main()
