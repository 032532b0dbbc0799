"""What the environment says of other processes, and what is said of an environment that makes no sense."""

import pytest

from ctllm_jax.cli import main
from ctllm_jax.cluster import distributed
from ctllm_jax.config.errors import UserError

NAMES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


@pytest.fixture
def given(monkeypatch):
    """Sets the three variables (None: not at all), and records what jax would be told."""
    import jax

    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *arguments, **options: calls.append((arguments, options)))

    def give(*values):
        for name, value in zip(NAMES, values, strict=True):
            monkeypatch.delenv(name, raising=False)
            if value is not None:
                monkeypatch.setenv(name, value)
        return calls

    return give


def test_nothing_set_is_one_process(given):
    calls = given(None, None, None)
    assert distributed.initialize() == 1 and not calls


def test_one_process_of_one_needs_no_others(given):
    calls = given("host:1234", "1", "0")
    assert distributed.initialize() == 1 and not calls


def test_all_three(given):
    calls = given("host:1234", "4", "3")
    assert distributed.initialize() == 4
    assert calls[0][0][:3] == ("host:1234", 4, 3)


@pytest.mark.parametrize(("values", "missing"), [
    (("host:1234", None, None), "JAX_NUM_PROCESSES, JAX_PROCESS_ID"), (("host:1234", "2", None), "not JAX_PROCESS_ID"),
    ((None, "2", "0"), "not JAX_COORDINATOR_ADDRESS"), (("", "2", "0"), "not JAX_COORDINATOR_ADDRESS")])
def test_only_some_of_the_three(given, values, missing):
    calls = given(*values)
    with pytest.raises(UserError, match=missing):
        distributed.initialize()
    assert not calls


@pytest.mark.parametrize(("count", "index"), [("2", "2"), ("2", "-1"), ("0", "0"), ("two", "0"), ("2", "1.0")])
def test_numbers_that_make_no_sense(given, count, index):
    calls = given("host:1234", count, index)
    with pytest.raises(UserError, match=f"JAX_PROCESS_ID={index} of JAX_NUM_PROCESSES={count}: needs 0 <= id < number"):
        distributed.initialize()
    assert not calls


def test_a_user_reads_a_line_and_no_traceback(given, tmp_path, capsys):
    given("host:1234", "2", "5")
    assert main(["pretrain", "debug/pretrain", f"run.dir={tmp_path / 'run'}"]) == 2
    assert "error: JAX_PROCESS_ID=5 of JAX_NUM_PROCESSES=2" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
