"""`serve` as a user starts it: what it says, that it answers, and that it ends."""

import json
import re
import signal
import socket
import urllib.request

import pytest

from tests.cli.conftest import call
from tests.runs import start


def test_it_listens_answers_and_ends(text_run):
    """A port of its own; Ctrl-C, and the process is gone with its status."""
    process = start("serve", text_run.directory, "port=0", "slots=2", PYTHONUNBUFFERED="1")
    try:
        line = process.stdout.readline()
        while "http://" not in line:
            assert line, "ended before it listened"
            line = process.stdout.readline()
        url = re.search(r"http://127\.0\.0\.1:\d+", line).group()
        assert "text (" in line and "2 at once, 64 tokens each" in line
        assert "was not taught to answer: /v1/completions only" in process.stdout.readline()
        asked = urllib.request.Request(f"{url}/v1/completions", json.dumps(
            {"model": "text", "prompt": "the", "max_tokens": 5, "temperature": 0}).encode(),
            {"Content-Type": "application/json"})
        with urllib.request.urlopen(asked, timeout=120) as response:
            assert json.load(response)["usage"]["completion_tokens"] <= 5
        with urllib.request.urlopen(f"{url}/v1/models", timeout=30) as response:
            assert json.load(response)["data"][0]["chat"] is False
    finally:
        process.send_signal(signal.SIGINT)
        ended = process.wait_for_text()
    assert ended.returncode == 0 and ended.stdout == ""


@pytest.mark.parametrize(("words", "message"), [
    ([], "serve needs one MODEL"), (["nowhere"], "no model nowhere"),
    (["nowhere", "host=0.0.0.0"], "host=0.0.0.0 can be reached from elsewhere, and so needs an API key: set the "
                                  "environment variable CTLLM_API_KEY"),
    (["nowhere", "port=70000"], "port=70000"), (["nowhere", "api_key_env=sk-123"], "and never the key"),
    (["nowhere", "slot=3"], "did you mean slots?")])
def test_what_does_not_fit_is_said_in_a_line(words, message, monkeypatch):
    monkeypatch.delenv("CTLLM_API_KEY", raising=False)
    printed = call("serve", *words)
    assert printed.status == 2 and message in printed.err and "Traceback" not in printed.err


def test_a_port_that_is_taken(text_run):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        printed = call("serve", text_run.directory, f"port={taken.getsockname()[1]}")
    assert printed.status == 2 and "cannot be listened at" in printed.err
