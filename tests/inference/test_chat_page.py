"""The page of the server in a headless Chromium: a person who talks to the model."""

import time

import pytest

from tests.browser import CHROMIUM, Browser
from tests.inference.serving import make_small, serving

pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed")]
QUIET = "!document.querySelector('.busy')"


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return make_small(tmp_path_factory.mktemp("small"))


@pytest.fixture
def browser(tmp_path):
    with Browser(tmp_path / "profile") as browser:
        yield browser


def open_page(browser, running):
    browser.open(running.url)
    browser.wait("document.getElementById('name')?.textContent === 'small'")


def say(browser, text):
    browser.run("document.getElementById('text').focus()")
    browser.type(text)
    browser.press("Enter", 13)


def complaints(browser):
    """What a console would show."""
    return [message for message in browser.messages if message.get("method") == "Runtime.exceptionThrown" or
            message.get("method") == "Log.entryAdded" and message["params"]["entry"]["level"] in ("error", "warning")]


def test_a_conversation(small, browser, tmp_path):
    with serving(small) as running:
        open_page(browser, running)
        browser.run("document.getElementById('max_tokens').value = 40; document.getElementById('seed').value = 3")
        for number, text in enumerate(["今天<b>天气</b>", "the model"], 1):
            say(browser, text)
            browser.wait(f"document.querySelectorAll('.assistant').length === {number} && {QUIET}")
        turns = browser.run("[...document.querySelectorAll('.turn p')].map(each => each.textContent)")
        assert turns[::2] == ["今天<b>天气</b>", "the model"] and all(turns[1::2])
        assert browser.run("document.querySelectorAll('.turn b').length") == 0
        assert running.worker.engine.counts["finished"] == 2
        # The second question came behind the first and its answer.
        ids = small.served.template.prompt_ids
        from ctllm_jax.data.chat import Message

        first = ids([Message("user", turns[0])])
        assert running.worker.engine.counts["prefill_tokens"] + running.worker.engine.counts["reused_tokens"] > (
            2 * len(first))
        browser.run("document.getElementById('reset').click()")
        assert browser.run("document.querySelectorAll('.turn').length") == 0
        labels = "[...document.querySelectorAll('button')].map(each => each.textContent)"
        before = browser.run(labels)
        browser.run("document.getElementById('language').click()")
        assert set(before) ^ set(browser.run(labels)) >= {"发送", "Send", "设置", "Settings"}
        browser.picture(tmp_path / "page.png")
        assert (tmp_path / "page.png").stat().st_size > 5000
    asked = {message["params"]["request"]["url"] for message in browser.messages
             if message.get("method") == "Network.requestWillBeSent"}
    assert all(url.startswith((running.url, "data:", "about:")) for url in asked)
    assert complaints(browser) == []


def test_an_answer_is_stopped_and_its_slot_is_free(small, browser):
    with serving(small, slots=1, steps=1) as running:
        open_page(browser, running)
        step = running.worker.engine.step
        running.worker.engine.step = lambda: (time.sleep(0.02), step())[1]
        say(browser, "今天")
        browser.wait("document.querySelector('.assistant p')?.textContent.length > 3")
        browser.run("document.getElementById('send').click()")
        browser.wait(QUIET)
        assert running.is_idle(5) and running.worker.engine.counts["cancelled"] == 1
        assert browser.run("document.querySelector('.note').textContent") in ("已停止", "stopped")


def test_a_key_is_asked_for(small, browser):
    with serving(small, api_key="sk-page") as running:
        browser.open(running.url)
        browser.wait("document.querySelector('.note.bad')?.textContent.includes('API key')")
        browser.run("""(() => { const key = document.getElementById('key'); key.value = 'sk-page';
                       key.dispatchEvent(new Event('change')); })()""")
        browser.wait("document.getElementById('name').textContent === 'small'")
        say(browser, "今天")
        browser.wait(f"document.querySelectorAll('.assistant').length === 1 && {QUIET}")
        assert browser.run("document.querySelector('.assistant p').textContent")
