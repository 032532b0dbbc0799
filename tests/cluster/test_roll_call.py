"""Processes that wait for each other: who is missing is named, and a stranger on the port changes nothing."""

import json
import socket
import threading

import pytest

from ctllm_jax.cluster import roll_call
from ctllm_jax.cluster.roll_call import Missing, call_roll, name_numbers
from ctllm_jax.config.errors import UserError
from ctllm_jax.config.statuses import REQUEUE, WRONG_INPUT
from tests.training.test_processes import free_port


@pytest.fixture
def call(monkeypatch):
    """`(*processes as (index, count, seconds)) -> what each raised`, each process a thread."""
    monkeypatch.setattr(roll_call, "_PAUSE", 0.02)
    address = f"127.0.0.1:{free_port()}"

    def call_all(*processes):
        results = [None] * len(processes)

        def take_part(place, index, count, seconds):
            try:
                call_roll(address, index=index, count=count, seconds=seconds)
            except UserError as error:
                results[place] = error

        threads = [threading.Thread(target=take_part, args=(place, *process))
                   for place, process in enumerate(processes)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
            assert not thread.is_alive()
        return results

    call_all.address = ("127.0.0.1", int(address.rpartition(":")[2]))
    return call_all


def test_all_arrive(call):
    assert call(*((index, 4, 60.0) for index in (2, 0, 3, 1))) == [None] * 4


def test_those_who_did_not_arrive_are_named_to_all(call):
    errors = call((0, 5, 0.5), (3, 5, 60.0))
    for error in errors:
        assert isinstance(error, Missing) and error.status == REQUEUE
        assert "processes 1-2, 4 of 5 did not arrive within 0.5 s" in str(error)


def test_process_0_did_not_arrive(call):
    error, = call((7, 9, 0.2))
    assert isinstance(error, Missing) and "process 7 of 9 waited 0.2 s for process 0 at 127.0.0.1:" in str(error)
    assert "cannot be reached there (Connection refused)" in str(error)


@pytest.mark.parametrize(("other", "message"), [
    ((1, 3, 60.0), "two processes are number 1: on "),
    ((2, 4, 60.0), "the processes disagree on how many they are: 3")])
def test_numbers_that_contradict_each_other(call, other, message):
    errors = call((0, 3, 60.0), (1, 3, 60.0), other)
    assert all(error.status == WRONG_INPUT and message in str(error) for error in errors)


@pytest.mark.parametrize("said", [b"PRI * HTTP/2.0\r\n\r\n", b"[1, 2]\n", b'{"index": "1"}\n', b"x" * 9000, b"", None])
def test_a_stranger_on_the_port_is_no_process(call, said):
    """None: it hangs up at once; the empty text: it says nothing and stays."""
    def intrude():
        while True:
            try:
                stranger = socket.create_connection(call.address, timeout=30)
                break
            except ConnectionRefusedError:
                pass
        if said is not None:
            stranger.sendall(said)
        strangers.append(stranger)
        if said is None:
            stranger.close()

    strangers = []
    thread = threading.Thread(target=intrude)
    thread.start()
    first = threading.Thread(target=lambda: results.extend(call((0, 2, 60.0))))
    results = []
    first.start()
    thread.join(30)
    assert call((1, 2, 60.0)) == [None]
    first.join(30)
    assert results == [None]
    for stranger in strangers:
        stranger.close()


def test_a_process_that_ends_while_it_waits_is_missing_again(call):
    results = []
    first = threading.Thread(target=lambda: results.extend(call((0, 3, 0.5))))
    first.start()
    while True:
        try:
            with socket.create_connection(call.address, timeout=30) as peer:
                peer.sendall(json.dumps({"index": 1, "count": 3}).encode() + b"\n")
            break
        except ConnectionRefusedError:
            assert first.is_alive()
    first.join(30)
    assert "processes 1-2 of 3 did not arrive" in str(results[0])


def test_a_port_in_use_is_named(call, monkeypatch):
    monkeypatch.setattr(roll_call, "_PORT_SECONDS", 0.0)
    with socket.create_server(call.address):
        error, = call((0, 2, 1.0))
    assert f"cannot listen at port {call.address[1]} (Address already in use" in str(error)


@pytest.mark.parametrize(("numbers", "text"), [
    ([3], "process 3"), ([0, 1, 2, 5], "processes 0-2, 5"),
    (list(range(0, 60, 2)), "processes 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22 and 18 more")])
def test_numbers_in_words(numbers, text):
    assert name_numbers(numbers) == text
