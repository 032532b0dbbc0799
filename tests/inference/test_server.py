"""The server: OpenAI's own client, many clients at once, and clients that do not behave."""

import json
import random
import re
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest

from ctllm_jax.inference.serving.protocol import ProtocolError, read_chat
from tests.inference.serving import COMPLETIONS, LENGTH, body, serving

CHAT = "/v1/chat/completions"
KEY = "sk-test-0123456789"


@pytest.fixture(scope="module")
def running(small):
    with serving(small, max_queue=300, read_timeout=1.5, max_body=20_000) as running:
        yield running
        assert running.is_idle() and running.worker.failures == 0


@pytest.fixture(scope="module")
def client(running):
    with openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def told(answer):
    """The message of an error."""
    status, _, content = answer
    return status, json.loads(content)["error"]["message"]


def test_models(client):
    assert [model.id for model in client.models.list()] == ["small"]
    assert client.models.retrieve("small").id == "small"
    with pytest.raises(openai.NotFoundError, match="no model 'other'"):
        client.models.retrieve("other")


@pytest.mark.parametrize("options", [{"temperature": 0}, {"seed": 7}, {"seed": 7, "top_p": 0.5, "n": 3},
                                     {"temperature": 0, "stop": ["e", "天"]}, {"seed": 3, "logprobs": 3, "echo": True}])
def test_streamed_or_whole_it_is_the_same(client, options):
    asked = {"model": "small", "prompt": ["今天", "the model"], "max_tokens": 30, **options}
    whole = client.completions.create(**asked)
    assert len(whole.choices) == 2 * options.get("n", 1)
    texts, finishes = [""] * len(whole.choices), [None] * len(whole.choices)
    logprobs = [[] for _ in whole.choices]
    for chunk in client.completions.create(**asked, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            finishes[choice.index] = choice.finish_reason or finishes[choice.index]
            logprobs[choice.index] += choice.logprobs.token_logprobs if choice.logprobs else []
    assert texts == [choice.text for choice in whole.choices]
    assert finishes == [choice.finish_reason for choice in whole.choices]
    if "logprobs" in options:
        assert logprobs == [choice.logprobs.token_logprobs for choice in whole.choices]
    if "stop" in options:
        assert not any("e" in text or "天" in text for text in texts)
    if "n" in options:
        assert len(set(texts)) == 6


def test_chat(client, small):
    messages = [{"role": "system", "content": "今天"}, {"role": "user", "content": [{"type": "text", "text": "the"}]}]
    asked = dict(model="small", messages=messages, max_tokens=20, seed=4, logprobs=True, top_logprobs=2)
    whole = client.chat.completions.create(**asked)
    choice = whole.choices[0]
    assert choice.message.role == "assistant" and whole.usage.completion_tokens == len(choice.logprobs.content)
    assert all(len(each.top_logprobs) == 2 for each in choice.logprobs.content)
    spelled = b"".join(bytes(each.bytes) for each in choice.logprobs.content)
    assert spelled.decode(errors="replace").startswith(choice.message.content.rstrip("\ufffd")[:3])
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == choice.message.content
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage and chunks[-2].choices[0].finish_reason == choice.finish_reason
    with client.chat.completions.stream(model="small", messages=messages, max_tokens=20, seed=4) as stream:
        assert "".join(event.delta for event in stream if event.type == "content.delta") == choice.message.content


def test_a_prompt_is_scored(client, small):
    """Echo: the prompt's own tokens with their log-probabilities, and none of what was put before them."""
    tokenizer = small.served.tokenizer
    ids = tokenizer.encode("the model reads 😀")
    asked = dict(model="small", max_tokens=1, echo=True, logprobs=2, temperature=0)
    text = client.completions.create(**asked, prompt="the model reads 😀").choices[0]
    assert text.text.startswith("the model reads 😀") and len(text.logprobs.tokens) == len(ids) + 1
    given = client.completions.create(**asked, prompt=[tokenizer.eos_id, *ids]).choices[0]
    assert given.logprobs.token_logprobs[0] is None and given.logprobs.tokens[0] == "</s>"
    assert given.logprobs.token_logprobs[1:] == pytest.approx(text.logprobs.token_logprobs, abs=1e-4)
    assert given.logprobs.tokens[1:] == text.logprobs.tokens and "bytes:\\xf0" in text.logprobs.tokens
    for token, logp, likeliest in zip(text.logprobs.tokens, text.logprobs.token_logprobs, text.logprobs.top_logprobs,
                                      strict=True):
        assert likeliest[token] == logp and 2 <= len(likeliest) <= 3
    only = client.completions.create(**{**asked, "max_tokens": 0}, prompt="the model reads 😀").choices[0]
    assert only.text == "the model reads 😀" and len(only.logprobs.tokens) == len(ids)


def test_two_hundred_at_once_some_of_them_gone_midway(running):
    """Mixed lengths, streamed and whole; a quarter hangs up. The rest have their whole text, and all slots are free."""
    draw = random.Random(0)
    asked = [body(prompt="今天 the " * draw.randint(1, 40), max_tokens=draw.randint(1, 80), seed=number,
                  stream=bool(number % 2)) for number in range(200)]
    leaves = set(draw.sample(range(200), 50))

    def ask(number):
        if number not in leaves:
            status, _, content = running.ask(COMPLETIONS, asked[number])
            assert status == 200
            return text_of(content, asked[number]["stream"])
        content = json.dumps({**asked[number], "max_tokens": 500}).encode()
        with socket.create_connection(("127.0.0.1", running.port)) as connection:
            connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                               b"Content-Length: %d\r\n\r\n" % len(content) + content)
            time.sleep(draw.random() * 0.3)

    before = running.worker.engine.counts["finished"]
    with ThreadPoolExecutor(40) as pool:
        texts = list(pool.map(ask, range(200)))
    assert running.is_idle()
    counts = running.worker.engine.counts
    assert counts["requests"] == counts["finished"] + counts["cancelled"]
    assert counts["finished"] - before >= 150 and counts["cancelled"] > 0
    for number in draw.sample(sorted(set(range(200)) - leaves), 12):
        assert texts[number] == text_of(running.ask(COMPLETIONS, asked[number])[2], asked[number]["stream"])


def text_of(content, streamed):
    if not streamed:
        return json.loads(content)["choices"][0]["text"]
    lines = [line[6:] for line in content.decode().splitlines() if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    return "".join(choice["text"] for line in lines[:-1] for choice in json.loads(line)["choices"])


MESSAGES = {"model": "small", "messages": [{"role": "user", "content": "今天"}]}


@pytest.mark.parametrize(("path", "content", "status", "message"), [
    (COMPLETIONS, b"{", 400, "not JSON"), (COMPLETIONS, b"[]", 400, "body"), (COMPLETIONS, b"\xff", 400, "not JSON"),
    (COMPLETIONS, b"[" * 15_000, 400, "not JSON"), (COMPLETIONS, {"prompt": "x"}, 400, "model: Field required"),
    (COMPLETIONS, body(model="gpt-4"), 404, "no model 'gpt-4': there is 'small'"),
    (COMPLETIONS, body(max_token=3), 400, "max_token: is not supported"),
    (COMPLETIONS, body(max_tokens="3"), 400, "max_tokens: Input should be a valid integer"),
    (COMPLETIONS, body(temperature=-1), 400, "temperature"), (COMPLETIONS, body(temperature=2.1), 400, "temperature"),
    (COMPLETIONS, body(temperature=float("nan")), 400, "temperature"),
    (COMPLETIONS, body(top_k=2**31), 400, "top_k"), (COMPLETIONS, body(top_k=-2), 400, "top_k"),
    (COMPLETIONS, body(top_p=float("nan")), 400, "top_p"), (COMPLETIONS, body(min_p=1), 400, "min_p"),
    (COMPLETIONS, body(repetition_penalty=float("inf")), 400, "repetition_penalty"),
    (COMPLETIONS, body(repetition_penalty=1e-40), 400, "repetition_penalty"),
    (COMPLETIONS, body(seed=2**63), 400, "seed"), (COMPLETIONS, body(seed=-2**63 - 1), 400, "seed"),
    (COMPLETIONS, body(max_tokens=10**300), 400, "max_tokens"), (COMPLETIONS, body(n=10**300), 400, "n: "),
    (COMPLETIONS, body(prompt=[10**300]), 400, "from 0 to 299"), (COMPLETIONS, body(logprobs=-1), 400, "logprobs"),
    (COMPLETIONS, body(stop="x" * 1025), 400, "at most 1,024 characters"),
    (COMPLETIONS, body(prompt="\ud800"), 400, "prompt: a text holds half of a surrogate pair"),
    (COMPLETIONS, b'{"model": "small", "prompt": "x", "stop": ["\xed\xa0\x80"]}', 400, "stop: a text holds half"),
    (COMPLETIONS, {"\udfff": 1}, 400, "body: a text holds half"),
    (CHAT, {**MESSAGES, "messages": [{"role": "user", "content": "a\udc00b"}]}, 400, "messages: a text holds half"),
    (CHAT, {**MESSAGES, "messages": [{"role": "user", "content": "x", "tool_calls": [{}]}]}, 400,
     "messages.0.tool_calls: is not supported"),
    (CHAT, {**MESSAGES, "max_tokens": 0}, 400, "max_tokens"),
    (CHAT, {**MESSAGES, "max_completion_tokens": 2**31}, 400, "max_completion_tokens"),
    (COMPLETIONS, body(prompt=[]), 400, "prompt"),
    (COMPLETIONS, body(prompt=[[]]), 400, "prompt is empty"), (COMPLETIONS, body(prompt=[5000]), 400, "from 0 to 299"),
    (COMPLETIONS, body(prompt=[-1]), 400, "from 0 to 299"), (COMPLETIONS, body(logprobs=21), 400, "logprobs"),
    (COMPLETIONS, body(max_tokens=0), 400, "only with echo"), (COMPLETIONS, body(best_of=3), 400, "best_of"),
    (COMPLETIONS, body(max_tokens=LENGTH), 400, "context is 1024 tokens"), (COMPLETIONS, body(n=129), 400, "n: "),
    (COMPLETIONS, body(suffix="x"), 400, "suffix"), (COMPLETIONS, body(presence_penalty=0.5), 400, "presence_penalty"),
    (COMPLETIONS, body(stop=["x"] * 17), 400, "at most 16"),
    (COMPLETIONS, body(logit_bias={"1": 2}), 400, "logit_bias"),
    (CHAT, {**MESSAGES, "messages": []}, 400, "messages"), (CHAT, {**MESSAGES, "tools": [{}]}, 400,
                                                       "tools: is not supported"),
    (CHAT, {**MESSAGES, "messages": [{"role": "tool", "content": ""}]}, 400, "must be one of system, user, assistant"),
    (CHAT, {**MESSAGES, "messages": [{"role": "assistant", "content": "x"}]}, 400, "the last message of a prompt"),
    (CHAT, {**MESSAGES, "top_logprobs": 3}, 400, "needs logprobs"),
    (CHAT, {**MESSAGES, "response_format": {"type": "json_object"}}, 400, "response_format"),
    (COMPLETIONS, body(prompt="x" * 20_001), 413, "larger than 20,000 bytes"),
    ("/v1/nothing", {}, 404, "no such path")])
def test_what_cannot_be_answered_is_said(running, path, content, status, message):
    answer = running.ask(path, content)
    assert answer[0] == status and message in told(answer)[1]
    assert running.ask("/health")[0] == 200


def test_a_dialogue_has_a_limited_number_of_messages(small):
    content = {**MESSAGES, "messages": [{"role": "user", "content": "x"}] * 2049}
    with pytest.raises(ProtocolError, match="messages: List should have at most 2048 items"):
        read_chat(small.served, json.dumps(content).encode())


def test_methods_types_and_hosts(running):
    assert running.ask(COMPLETIONS)[0] == 405 and running.ask("/health", {})[0] == 405
    assert running.ask(COMPLETIONS, body(), headers={"Content-Type": "text/plain"})[0] == 415
    assert running.ask(COMPLETIONS, body(), headers={"Host": "evil.example"})[0] == 403
    for host in ("localhost:80@evil.example", "localhost:80:evil.example", "evil.example:localhost",
                 "localhost evil.example", "[::1]evil.example", "localhost.evil.example", "", "localhost:99999999"):
        assert running.ask(COMPLETIONS, body(), headers={"Host": host})[0] == 403
    for host in (f"localhost:{running.port}", "LOCALHOST", "127.0.0.1", "[::1]:80"):
        assert running.ask("/v1/models", headers={"Host": host})[0] == 200


def send(running, content, *, seconds=8):
    """The first line of what comes back for raw bytes, after which nothing more is sent."""
    with socket.create_connection(("127.0.0.1", running.port), timeout=seconds) as connection:
        connection.sendall(content)
        return connection.recv(4096).partition(b"\r\n")[0].decode()


def test_slow_and_broken_clients(running):
    """A head that does not end, a body that does not come, one that is too long in pieces, no HTTP at all."""
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    assert "408" in send(running, b"POST /v1/comp")
    assert "408" in send(running, head + b"Content-Length: 10\r\n\r\n{")
    assert "413" in send(running, head + b"Transfer-Encoding: chunked\r\n\r\n" + b"2710\r\n" + b" " * 10_000 + b"\r\n"
                         + b"2711\r\n" + b" " * 10_001 + b"\r\n")
    assert "413" in send(running, head + b"Content-Length: 99999999\r\n\r\n")
    # Two lengths: a proxy may believe the one, and this server the other.
    assert "400" in send(running, head + b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n")
    assert "400" in send(running, b"\x16\x03\x01\x02\x00\r\n\r\n")
    assert running.ask(COMPLETIONS, body())[0] == 200


def test_a_key_is_needed_where_there_is_one(small):
    with serving(small, api_key=KEY, slots=1) as running:
        for headers in ({}, {"Authorization": "Bearer sk-wrong"}, {"Authorization": KEY}, {"Authorization": "Bearer "}):
            for path in ("/v1/models", "/metrics"):
                assert running.ask(path, headers=headers)[0] == 401
            assert running.ask(COMPLETIONS, body(), headers=headers)[0] == 401
        assert running.ask("/health")[0] == running.ask("/")[0] == 200
        right = {"Authorization": f"Bearer {KEY}", "Host": "model.example"}
        assert running.ask("/v1/models", headers=right)[0] == 200
        with openai.OpenAI(base_url=f"{running.url}/v1", api_key="wrong", max_retries=0) as client:
            with pytest.raises(openai.AuthenticationError, match="needs its API key"):
                client.models.list()


def test_a_full_queue_time_that_is_up_and_an_engine_that_fails(small, monkeypatch, caplog):
    """One slot, one may wait: 429. Longer than allowed: 408, and the slot is free. An error: 500."""
    long = body(prompt="the", max_tokens=900, temperature=0, stop=None)
    with serving(small, slots=1, steps=1) as running:  # compiles what is then timed
        assert running.ask(COMPLETIONS, body(max_tokens=3))[0] == 200
    with serving(small, slots=1, steps=1, max_queue=1, timeout=1.0) as running:
        answers = []
        step = running.worker.engine.step
        monkeypatch.setattr(running.worker.engine, "step", lambda: (time.sleep(0.02), step())[1])
        threads = [threading.Thread(target=lambda: answers.append(told(running.ask(COMPLETIONS, long))))
                   for _ in range(2)]
        for thread in threads:
            thread.start()
        while running.worker.in_flight < 2:
            time.sleep(0.01)
        status, headers, content = running.ask(COMPLETIONS, long)
        assert status == 429 and headers["retry-after"] == "1" and b"queue_full" in content
        assert told(running.ask(COMPLETIONS, body(n=3)))[0] == 400
        for thread in threads:
            thread.join()
        assert answers == [(408, "the answer took longer than 1 s")] * 2
        assert running.is_idle()
        status, _, content = running.ask(COMPLETIONS, {**long, "stream": True})
        assert status == 200 and b"took longer than 1 s" in content and content.endswith(b"data: [DONE]\n\n")
        assert running.is_idle()
        monkeypatch.setattr(running.worker.engine, "_decode", lambda: 1 / 0)
        status, message = told(running.ask(COMPLETIONS, long))
        assert status == 500 and "the log says why" in message and "ZeroDivisionError" in caplog.text
        monkeypatch.undo()
        assert running.worker.alive
        assert running.is_idle() and running.ask(COMPLETIONS, body(max_tokens=3))[0] == 200
        assert "ctllm_engine_failures_total 1" in running.ask("/metrics")[2].decode()


def test_one_request_that_fails_takes_no_other_along(small, monkeypatch):
    """The engine breaks on one text: of many at once only that one gets 500, and none a plain text."""
    with serving(small, slots=2, steps=1, max_queue=20) as running:
        engine = running.worker.engine
        read = engine._read

        def break_some(slot, drawn, *, fed):
            if slot.job.request.seed == 13 and slot.job.drawn:
                raise OverflowError("Python integer 2147483648 out of bounds for int32")
            return read(slot, drawn, fed=fed)

        monkeypatch.setattr(engine, "_read", break_some)
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda seed: running.ask(COMPLETIONS, body(seed=seed)), range(8, 18)))
        assert [status for status, _, _ in answers] == [500 if seed == 13 else 200 for seed in range(8, 18)]
        assert json.loads(answers[5][2])["error"]["type"] == "server_error"
        # A request that cannot even be lined up, and a failure in the server itself.
        monkeypatch.setattr(engine, "submit", lambda request: 1 / 0)
        assert told(running.ask(COMPLETIONS, body()))[0] == 500
        monkeypatch.undo()
        monkeypatch.setattr(running.worker, "submit", lambda requests, listen: 1 / 0)
        assert told(running.ask(COMPLETIONS, body())) == (500, "the server failed on this request; the log says why")
        monkeypatch.undo()
        # The engine cannot even be reset: the next request tries again, and is answered.
        monkeypatch.setattr(engine, "_decode", lambda: 1 / 0)
        monkeypatch.setattr(engine, "_make_cache", lambda: 1 / 0)
        assert told(running.ask(COMPLETIONS, body()))[0] == told(running.ask(COMPLETIONS, body()))[0] == 500
        monkeypatch.undo()
        running.ask(COMPLETIONS, body())
        assert running.ask(COMPLETIONS, body())[0] == 200


def test_metrics_are_prometheus_text(running):
    running.ask(COMPLETIONS, body())
    _, headers, content = running.ask("/metrics")
    assert headers["content-type"].startswith("text/plain; version=0.0.4")
    values = {}
    for line in content.decode().splitlines():
        if line.startswith("#"):
            assert re.fullmatch(r"# (HELP \w+ .+|TYPE \w+ (counter|gauge|histogram))", line)
        else:
            name, value = line.rsplit(" ", 1)
            values[name] = float(value)
    assert values["ctllm_slots"] == 4 and values["ctllm_running"] == values["ctllm_waiting"] == 0
    assert values['ctllm_http_answers_total{path="/v1/completions",status="200"}'] >= 1
    assert values['ctllm_answer_seconds_bucket{le="+Inf"}'] == values["ctllm_answer_seconds_count"] >= 1


def test_the_page_asks_nobody_else(running):
    _, headers, content = running.ask("/")
    assert "default-src 'none'" in headers["content-security-policy"] and "text/html" in headers["content-type"]
    assert not re.search(rb"(src|href)=.(https?:)?//", content)
