"""The client of endpoints, against a real server that is slow, broken, or not what it should be."""

import email.utils
import logging
import socket
import subprocess
import sys
import threading
import time

import pytest

from ctllm_jax.config.endpoint import EndpointConfig
from ctllm_jax.config.errors import UserError
from ctllm_jax.data.chat import Message
from ctllm_jax.inference import endpoint
from ctllm_jax.inference.endpoint import Endpoint, EndpointError, Reply, Request
from tests.chat_server import KEY, ChatServer, Say, completion
from tests.runs import REPOSITORY

QUESTION = Request([Message("system", "简短回答"), Message("user", "今天")])


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """No proxy, and a key."""
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setenv("TEST_API_KEY", KEY)


def client(server, *, backoff=0.01, **options):
    url = server if isinstance(server, str) else server.base_url
    return Endpoint(EndpointConfig(**{"base_url": url, "model": "m", "api_key_env": "TEST_API_KEY", "timeout": 5.0,
                                      **options}), backoff=backoff)


def first(*says):
    """A script: these one after the other, then a good answer."""
    return lambda asked, number: says[number] if number < len(says) else "好"


def failure(server, **options):
    """The message of a request that fails."""
    with pytest.raises(EndpointError) as caught:
        client(server, **options).ask(QUESTION)
    assert KEY not in str(caught.value)
    return str(caught.value)


def test_a_request_is_what_a_server_expects():
    with ChatServer() as server:
        reply = client(server.base_url + "/", temperature=0.0, top_p=0.9, max_tokens=7, send_seed=True,
                       body={"top_k": 5, "top_p": None}).ask(QUESTION._replace(seed=11))
    assert reply == Reply("天今", False, "served-model", 3, 2)
    asked, = server.asked
    assert asked.path == "/v1/chat/completions" and asked.headers["Authorization"] == f"Bearer {KEY}"
    assert asked.headers["Content-Type"] == "application/json"
    assert asked.body == {"model": "m", "temperature": 0.0, "max_tokens": 7, "top_k": 5, "seed": 11, "messages": [
        {"role": "system", "content": "简短回答"}, {"role": "user", "content": "今天"}]}


def test_what_is_not_given_is_not_sent():
    with ChatServer() as server:
        client(server, api_key_env=None, max_tokens=None).ask(QUESTION._replace(seed=11))
    assert "Authorization" not in server.asked[0].headers
    assert server.asked[0].body.keys() == {"model", "messages"}


def test_a_cut_answer_says_so_and_an_empty_one_is_empty():
    with ChatServer(first(Say(body=completion("半", finish="length")), Say(body=completion(None)))) as server:
        endpoint = client(server)
        assert endpoint.ask(QUESTION)[:2] == ("半", True) and endpoint.ask(QUESTION)[:2] == ("", False)


OK = b"HTTP/1.1 200 OK\r\n"


@pytest.mark.parametrize("raw", [
    b"", b"\r\n\r\n", b"garbage\r\n\r\n", b"HTTP/1.1 abc OK\r\n\r\n", b"HTTP/1.1 99999 OK\r\n\r\n",
    b"HTTP/9.9 200 OK\r\n\r\n", b"HTTP/1.1 \xb2\xb2\xb2 OK\r\n\r\n", b"HTTP/1.1 " + b"2" * 70_000,
    OK + b"a: b\r\n" * 200 + b"\r\n",
    OK + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n", OK + b"Transfer-Encoding: chunked\r\n\r\n-5\r\nabc",
    b"HTTP/1.1 302 Found\r\nLocation: http://[::bad/\r\n\r\n", b"HTTP/1.1 302 Found\r\nLocation: \xff\r\n\r\n",
    b"HTTP/1.1 304 Not\r\n\r\n", b"HTTP/1.1 204 No\r\n\r\n", b"HTTP/1.1 500 x\r\n\r\n" + b'{"error":' + b"[" * 60_000,
    OK + b"\r\n" + b"[" * 60_000, OK + b'\r\n{"usage": ' + b"9" * 5000 + b"}",
    OK + b'\r\n{"error": {"message": "\\ud800"}}'], ids=lambda raw: repr(raw[:40]))
def test_no_bytes_of_a_server_raise_anything_but_an_error_of_the_endpoint(raw):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        def answer():
            connection, _ = listener.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(raw)

        thread = threading.Thread(target=answer)
        thread.start()
        message = failure(f"http://127.0.0.1:{listener.getsockname()[1]}/v1", retries=0)
        thread.join()
    assert message.startswith("http://127.0.0.1") and message.isprintable()


def test_what_a_server_says_of_itself_can_be_written_to_a_file():
    body = {**completion("x\ud800"), "model": "m\ud800", "usage": {"prompt_tokens": -5, "completion_tokens": "9"}}
    with ChatServer(lambda asked, number: Say(body=body)) as server:
        assert client(server).ask(QUESTION) == Reply("x?", False, "m?", 0, 0)


@pytest.mark.parametrize(("url", "key", "warns"), [
    ("http://model.example/v1", "TEST_API_KEY", True), ("http://10.0.0.7:8000/v1", "TEST_API_KEY", True),
    ("https://model.example/v1", "TEST_API_KEY", False), ("http://127.0.0.1:8000/v1", "TEST_API_KEY", False),
    ("http://[::1]:8000/v1", "TEST_API_KEY", False), ("http://localhost:8000/v1", "TEST_API_KEY", False),
    ("http://model.example/v1", None, False)])
def test_a_key_that_leaves_this_machine_unencrypted_is_warned_of(url, key, warns, caplog):
    client(url, api_key_env=key)
    assert ("can be read on the way" in caplog.text) == warns and KEY not in caplog.text


@pytest.mark.parametrize("say", [
    Say(status=429, body={"error": {"message": "slow down"}}), Say(status=500), Say(status=503, body=b"<html>"),
    Say(status=408), Say(cut=True), Say(body=b'{"choices": [{"mess'), Say(status=200, delay=3.0)], ids=str)
def test_what_passes_is_tried_again(say):
    with ChatServer(first(say, say)) as server:
        assert client(server, timeout=0.3).ask(QUESTION).text == "好"
    assert len(server.asked) == 3


def test_a_closed_connection_is_tried_again():
    """Something that accepts and hangs up, each time."""
    with socket.create_server(("127.0.0.1", 0)) as front:
        def hang_up():
            for _ in range(2):
                front.accept()[0].close()

        thread = threading.Thread(target=hang_up)
        thread.start()
        message = failure(f"http://127.0.0.1:{front.getsockname()[1]}", retries=1)
        thread.join(timeout=5)
        assert not thread.is_alive()
    assert "the connection was lost" in message and "after 2 tries" in message


@pytest.mark.parametrize("status", [400, 401, 403, 404, 422])
def test_what_stays_is_not_tried_again(status):
    with ChatServer(first(Say(status=status, body={"error": {"message": f"no: {KEY} is bad\x1b[31m"}}))) as server:
        message = failure(server)
    assert len(server.asked) == 1 and f" {status} " in message and "no: … is bad" in message
    assert "\x1b" not in message


def test_tries_end():
    with ChatServer(lambda asked, number: Say(status=502, body=b"bad gateway")) as server:
        message = failure(server, retries=2)
    assert len(server.asked) == 3 and "502" in message and "bad gateway" in message and "after 3 tries" in message


def test_waits_double_and_are_not_all_the_same():
    waits = []

    class Stop(threading.Event):
        """Records how long it should wait, and does not wait."""

        def wait(self, timeout=None):
            waits.append(timeout)
            return False

    with ChatServer(lambda asked, number: Say(status=500)) as server, pytest.raises(EndpointError):
        client(server, retries=4, backoff=0.1).ask(QUESTION, stop=Stop())
    waits = [wait for wait in waits if wait]
    assert len(waits) == 4
    assert all(0.05 * 2**n <= wait <= 0.1 * 2**n for n, wait in enumerate(waits))
    assert len({wait / 2**n for n, wait in enumerate(waits)}) > 1


@pytest.mark.parametrize("as_date", [False, True])
def test_retry_after_is_honored_by_all(as_date, monkeypatch):
    noted = threading.Event()
    monkeypatch.setattr(endpoint.logger, "log", lambda *arguments: noted.set())

    def script(asked, number):
        if number:
            noted.wait(60)  # nobody gets an answer before the first request's has been read
            return "好"
        return Say(status=429, headers={"Retry-After": email.utils.formatdate(time.time() + 2.0, usegmt=True)
                                        if as_date else "1"})

    with ChatServer(script) as server:
        replies = list(client(server, concurrency=2).ask_many([QUESTION] * 4))
    assert all(isinstance(reply, Reply) for reply in replies)
    asked_at = server.asked[0].time
    # The other thread has asked once at the same time.
    assert sum(asked.time - asked_at < 0.9 for asked in server.asked) <= 2
    assert server.asked[-1].time - asked_at > 0.9


def test_a_wait_of_a_day_is_not_waited_for():
    with ChatServer(first(Say(status=429, headers={"Retry-After": "86400"}))) as server:
        assert "it asks to wait 86,400 s" in failure(server)


def test_a_body_that_trickles_ends_with_the_timeout():
    with ChatServer(lambda asked, number: Say("好" * 500, trickle=0.05)) as server:
        assert "no answer within timeout=0.5 s" in failure(server, timeout=0.5, retries=0)


def test_an_answer_without_end_is_left(monkeypatch):
    monkeypatch.setattr("ctllm_jax.inference.endpoint._MOST_BYTES", 1000)
    with ChatServer(lambda asked, number: "好" * 1000) as server:
        assert "an answer of more than 1,000 bytes" in failure(server)


@pytest.mark.parametrize("target", ["http://127.0.0.2:{port}/v1/chat/completions", "/v2/chat/completions"])
@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_a_redirect_is_not_followed(target, status):
    """Neither key nor prompt reach an address that nobody gave."""
    with ChatServer() as other, ChatServer() as server:
        location = target.format(port=other.server.server_address[1])
        server.script = lambda asked, number: Say(status=status, headers={"Location": location})
        message = failure(server)
    assert len(server.asked) == 1 and not other.asked
    assert "redirected to" in message and location in message and "not followed" in message


@pytest.mark.parametrize(("say", "message"), [
    (Say(body=b"<html>hello</html>", headers={"Content-Type": "text/html"}), "not JSON but text/html: '<html>hello"),
    (Say(body={"object": "list", "data": []}), "no choices, so this is no chat completion; it has object, data"),
    (Say(body=[1]), "no choices"), (Say(body={"choices": []}), "choices are empty"),
    (Say(body={"choices": [{"text": "old"}]}), "no text in choices[0].message.content"),
    (Say(body={"choices": [{"message": {"content": 3}}]}), "no text in choices[0].message.content"),
    (Say(body={"error": {"message": "overloaded"}}), "overloaded"),
    (Say(status=401, body={"error": {"message": "bad key"}}), "401 Unauthorized: bad key; is the key right"),
    (Say(status=404, body={"detail": "model m does not exist"}), "model m does not exist; is base_url right"),
    (Say(status=400, body=b"plain words"), "400 Bad Request: plain words")], ids=str)
def test_what_is_no_answer_is_said(say, message):
    with ChatServer(first(say)) as server:
        assert message in failure(server)
    assert len(server.asked) == 1


def test_a_server_that_wants_a_key_says_which_option():
    with ChatServer(first(Say(status=401))) as server:
        assert "api_key_env names the variable" in failure(server, api_key_env=None)


def test_nothing_there_is_said(unused_port):
    assert "refuses connections: is the server up" in failure(f"http://127.0.0.1:{unused_port}/v1", retries=1)
    assert "there is no host nowhere.invalid" in failure("http://nowhere.invalid/v1", retries=0)


@pytest.fixture
def unused_port():
    with socket.create_server(("127.0.0.1", 0)) as found:
        port = found.getsockname()[1]
    return port


def test_answers_come_in_the_order_of_the_questions():
    """Earlier questions take longer; four at a time, never more."""
    def script(asked, number):
        text = asked.body["messages"][-1]["content"]
        return Say(text, delay=0.02 * (12 - int(text)) % 0.1)

    with ChatServer(script) as server:
        requests = [Request([Message("user", str(index))]) for index in range(12)]
        replies = list(client(server, concurrency=4).ask_many(requests, ahead=6))
    assert [reply.text for reply in replies] == [str(index) for index in range(12)]
    assert 1 < server.most_at_once <= 4


def test_no_more_is_asked_than_the_window(monkeypatch):
    """Requests are taken as answers are: nothing is paid for that nobody waits for."""
    taken = []

    def requests():
        for index in range(100):
            taken.append(index)
            yield Request([Message("user", str(index))])

    with ChatServer() as server:
        replies = client(server, concurrency=2).ask_many(requests(), ahead=5)
        next(replies)
        replies.close()
        time.sleep(0.1)
    assert len(taken) == 5 and len(server.asked) <= 5


def test_one_failure_is_a_value_and_many_are_the_end():
    def script(asked, number):
        text = asked.body["messages"][-1]["content"]
        return Say(status=400, body={"error": "too long"}) if text.startswith("bad") else text

    texts = ["a", "bad", "b", "bad", "bad", "bad", "c"]
    with ChatServer(script) as server:
        endpoint = client(server, concurrency=1, max_failures=3)
        replies = endpoint.ask_many([Request([Message("user", text)]) for text in texts])
        got = [next(replies) for _ in range(5)]
        assert [isinstance(reply, EndpointError) for reply in got] == [False, True, False, True, True]
        with pytest.raises(EndpointError, match="too long.*3 requests in a row have failed"):
            next(replies)


def test_a_refused_question_is_its_own_matter_once_others_were_answered():
    def script(asked, number):
        return Say(status=403) if asked.body["messages"][-1]["content"] == "bad" else "good"

    with ChatServer(script) as server:
        endpoint = client(server, concurrency=1)
        got = list(endpoint.ask_many([Request([Message("user", text)]) for text in ("a", "bad", "b")]))
        assert [isinstance(reply, EndpointError) for reply in got] == [False, True, False]
    with ChatServer(lambda asked, number: Say(status=403)) as server, pytest.raises(EndpointError):
        list(client(server).ask_many([QUESTION] * 50))


@pytest.mark.parametrize("say", [Say(status=401), Say(status=404), Say(body=[], headers={"Content-Type": "text/html"})])
def test_what_all_would_meet_ends_at_once(say):
    with ChatServer(lambda asked, number: say) as server, pytest.raises(EndpointError):
        list(client(server, concurrency=2).ask_many([QUESTION] * 50))
    assert len(server.asked) <= 8


def test_the_proxy_of_the_environment_is_for_other_machines(monkeypatch):
    with ChatServer() as proxy, ChatServer() as server:
        monkeypatch.setenv("http_proxy", proxy.base_url.removesuffix("/v1"))
        assert client(server).ask(QUESTION).text == "天今" and not proxy.asked
        named = server.base_url.replace("127.0.0.1", "localhost")
        assert client(named).ask(QUESTION).text == "天今" and not proxy.asked
        assert client("http://model.invalid/v1").ask(QUESTION).text == "天今"
        assert proxy.asked[0].path == "http://model.invalid/v1/chat/completions"
        monkeypatch.setenv("no_proxy", ".invalid")
        assert "there is no host" in failure("http://model.invalid/v1", retries=0)


@pytest.mark.parametrize(("value", "message"), [
    (None, "api_key_env=TEST_API_KEY: there is no such environment variable"), ("  ", "or it is empty"),
    ("two words", "no HTTP header can hold"), ("schlüssel", "no HTTP header can hold")])
def test_a_key_that_cannot_be_sent_is_said_and_not_shown(value, message, monkeypatch):
    monkeypatch.delenv("TEST_API_KEY") if value is None else monkeypatch.setenv("TEST_API_KEY", value)
    with pytest.raises(UserError, match=message) as caught:
        client("http://localhost/v1")
    assert (value or "x y") not in str(caught.value)


def test_a_line_end_behind_a_key_is_not_sent(monkeypatch):
    monkeypatch.setenv("TEST_API_KEY", f"{KEY}\n")
    with ChatServer() as server:
        client(server).ask(QUESTION)
    assert server.asked[0].headers["Authorization"] == f"Bearer {KEY}"


def test_the_key_is_in_no_log(caplog):
    caplog.set_level(logging.DEBUG)
    with ChatServer(first(*[Say(status=500, body={"error": f"with {KEY}"})] * 4)) as server:
        endpoint = client(server)
        endpoint.ask(QUESTION)
    assert "try 2 of 6" in caplog.text and "with …" in caplog.text
    assert KEY not in caplog.text + repr(endpoint) + str(endpoint.config)


@pytest.mark.parametrize(("options", "message"), [
    ({"base_url": "ftp://host/v1"}, "must begin with http://"), ({"base_url": "host/v1"}, "must begin with http://"),
    ({"base_url": "http://"}, "and a host"), ({"base_url": "http://host:99999/v1"}, "not a URL"),
    ({"base_url": "http://a..b/v1"}, "not a URL"),
    ({"base_url": "http://host/v1?key=1"}, r"without \?"), ({"base_url": "http://host/v 1"}, "white space"),
    ({"base_url": "http://host/v1/chat/completions"}, "before /chat/completions"),
    ({"base_url": "https://me:pw-4711@host/v1"}, "must not hold a user name"),
    ({"api_key_env": "sk-0123"}, "the name of an environment variable"), ({"body": {"stream": True}}, "stream"),
    ({"timeout": 0}, "greater than 0")])
def test_a_wrong_config_is_said(options, message):
    with pytest.raises(ValueError, match=message) as caught:
        EndpointConfig(**{"base_url": "http://host/v1", "model": "m", **options})
    assert "pw-4711" not in caught.value.errors()[0]["msg"]


def test_a_hanging_server_does_not_hold_up_the_end():
    """A process that fails while a request hangs is gone at once."""
    program = """
import sys
from ctllm_jax.config.endpoint import EndpointConfig
from ctllm_jax.data.chat import Message
from ctllm_jax.inference.endpoint import Endpoint, Request
endpoint = Endpoint(EndpointConfig(base_url=sys.argv[1], model='m', concurrency=2, retries=0))
assert 'jax' not in sys.modules
list(endpoint.ask_many([Request([Message('user', text)]) for text in ('bad', 'slow')]))
"""
    def script(asked, number):
        return Say(status=401) if asked.body["messages"][0]["content"] == "bad" else Say("late", delay=300)

    with ChatServer(script) as server:
        done = subprocess.run([sys.executable, "-c", program, server.base_url], cwd=REPOSITORY, capture_output=True,
                              text=True, timeout=120)
    assert "401 Unauthorized" in done.stderr
