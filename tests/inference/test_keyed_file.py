"""Rows are there once after a kill, and nobody else writes between them."""

import json

import pytest

from ctllm_jax.config.errors import UserError
from ctllm_jax.inference.keyed_file import KeyedFile


def test_rows_come_back_and_a_torn_last_one_is_cut_off(tmp_path):
    path = tmp_path / "new" / "rows.jsonl"
    with KeyedFile(path) as file:
        file.add("a", {"text": "今天\n天气"})
        file.add("b", {"text": "二"})
    whole = path.read_bytes()
    ends = [place for place, byte in enumerate(whole) if byte == ord("\n")]
    for end in range(len(whole)):
        path.write_bytes(whole[:end])
        lines = sum(end >= place for place in ends)  # a last row without its line end is whole
        with KeyedFile(path) as file:
            assert list(file.rows) == ["a", "b"][:lines]
            file.add("c", {})
        assert [json.loads(line)["key"] for line in path.read_text("utf-8").splitlines()] == [*"ab"[:lines], "c"]


def test_a_key_that_is_written_again_has_its_last_row(tmp_path):
    with KeyedFile(tmp_path / "rows.jsonl") as file:
        file.add("a", {"result": None})
        file.add("a", {"result": 7})
    with KeyedFile(tmp_path / "rows.jsonl") as file:
        assert file.rows == {"a": {"key": "a", "result": 7}}


@pytest.mark.parametrize(("content", "complaint"), [
    (b'{"key": "a"}\n{"text": 1}\n', ":2: a row without a key"),
    (b'{"key": "a"}\nnot\n{"key": "b"}\n', ":2: not a row"),
])
def test_a_file_of_others_is_left_alone(content, complaint, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError, match=complaint):
        KeyedFile(path)
    assert path.read_bytes() == content


def test_one_process_at_a_time(tmp_path):
    with KeyedFile(tmp_path / "rows.jsonl"), pytest.raises(UserError, match="another process"):
        KeyedFile(tmp_path / "rows.jsonl")
