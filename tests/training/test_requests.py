"""The thread that looks for STOP, SAVE and PROFILE on an object store survives what the store's clients raise."""

import errno
import logging
import os
import threading
from pathlib import Path

import pytest

from ctllm_jax.storage import StoreError, told
from ctllm_jax.training.supervision import requests
from ctllm_jax.training.supervision.requests import SAVE, STOP, Requests
from ctllm_jax.training.supervision.signals import Signals

DIRECTORY = Path("gs://bucket/run")


@pytest.fixture
def answers(monkeypatch):
    """What `list_names` gives or raises, one look after the other; the last of them for good."""
    given, looked = [], threading.Semaphore(0)

    def list_names(directory):
        answer = given.pop(0) if len(given) > 1 else given[0]
        looked.release()
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(requests, "list_names", list_names)
    monkeypatch.setattr(requests, "is_remote", lambda path: True)
    monkeypatch.setattr(requests, "_REMOTE_SECONDS", 0.001)

    def wait(count):
        for _ in range(count):
            assert looked.acquire(timeout=60)

    return given, wait


@pytest.mark.parametrize("error", [RuntimeError("Session is closed"), StoreError("no answer", lasting=False),
                                   KeyError("items"), ValueError("not JSON")])
def test_no_error_ends_the_thread(answers, caplog, error):
    given, wait = answers
    given += [error, error, error, [STOP, "config.yaml"], error, [SAVE]]
    asked = Requests(DIRECTORY, Signals(), tell=lambda step, what: None)
    wait(8)
    assert asked._seen.names == {SAVE}
    asked.close(0)
    assert not asked._seen._thread.is_alive()
    said = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(said) == 2 and str(error) in said[0] and "tried again" in said[0], said  # once for errors in a row


def test_a_closed_session_is_an_error_of_the_store():
    with pytest.raises(StoreError, match="the connection to the store was closed") as caught, told(DIRECTORY):
        raise RuntimeError("Session is closed")
    assert not caught.value.lasting


def test_a_directory_that_cannot_be_looked_at_for_a_moment(tmp_path, monkeypatch, caplog):
    """On a file server; a step in between is no reason to end the run."""
    asked, failing = Requests(tmp_path, Signals(), tell=lambda step, what: None), True
    monkeypatch.setattr(requests, "_SECONDS", 0.0)

    def exists(path):
        if failing:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))
        return path.name == STOP

    monkeypatch.setattr(Path, "exists", exists)
    assert not asked.stop_due(1) and not asked.stop_due(2)
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path / STOP} cannot be looked for (Stale file handle); this is tried again"]
    failing = False
    assert asked.stop_due(3) and asked.reason == "stopped"
    asked.close(3)
