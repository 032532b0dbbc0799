"""The output of `pairs`: whatever interrupts it, each key is there once; and it is never mixed with another."""

import json
import os

import pytest

from ctllm_jax.config.errors import UserError
from ctllm_jax.inference.pair_file import PairFile

SETTINGS = {"chosen": {"kind": "data"}, "rejected": {"model": "m", "temperature": 0.8}, "seed": 0}


def row(key):
    return {"chosen": "好" * 5, "rejected": "坏", "provenance": {"key": key}}


def fill(path, keys, settings=SETTINGS):
    """Add what is not there; keys with an x give no pair."""
    with PairFile(path, settings) as file:
        for key in keys:
            if key not in file.done:
                file.drop(key, "f:1", "equal answers") if "x" in key else file.add(key, row(key))
        return file


KEYS = ["a", "bx", "c", "d", "ex", "f"]


@pytest.fixture
def whole(tmp_path):
    file = fill(tmp_path / "whole.jsonl", KEYS)
    return file.path.read_bytes(), file.state.read_bytes()


def test_a_file_says_what_is_in_it(tmp_path, whole):
    file = fill(tmp_path / "whole.jsonl", KEYS)
    assert (file.pairs, dict(file.dropped), file.done) == (4, {"equal answers": 2}, set(KEYS))
    assert [json.loads(line)["provenance"]["key"] for line in whole[0].splitlines()] == ["a", "c", "d", "f"]
    assert json.loads(whole[1].splitlines()[0])["settings"]["rejected"] == SETTINGS["rejected"]


def test_killed_after_any_byte_it_becomes_the_same(tmp_path, whole):
    """Both files end where a kill may leave them: rows and notes in the order in which they were appended."""
    header = whole[1].index(b"\n") + 1
    rows = notes = 0
    cuts = [(0, 0)]
    for key, line in zip(KEYS, merged(whole), strict=True):
        size = len(line) + 1
        for part in (1, size // 2, size - 1, size):
            cuts.append((rows, notes + part) if "x" in key else (rows + part, notes))
        rows, notes = (rows, notes + size) if "x" in key else (rows + size, notes)
    for number, (rows, notes) in enumerate(cuts):
        path = tmp_path / f"{number}.jsonl"
        path.write_bytes(whole[0][:rows])
        path.with_name(path.name + ".state").write_bytes(whole[1][:header + notes])
        file = fill(path, KEYS)
        assert (path.read_bytes(), file.state.read_bytes()) == whole
        assert (file.pairs, file.done) == (4, set(KEYS))


def merged(whole):
    rows, notes = whole[0].splitlines(), whole[1].splitlines()[1:]
    return [notes.pop(0) if "x" in key else rows.pop(0) for key in KEYS]


def test_killed_before_the_first_row_it_begins_anew(tmp_path, whole):
    for size in range(0, whole[1].index(b"\n") + 1, 7):
        path = tmp_path / f"{size}.jsonl"
        path.with_name(path.name + ".state").write_bytes(whole[1][:size])
        assert fill(path, KEYS).path.read_bytes() == whole[0]


def test_zeros_of_a_power_cut_are_cut_off(tmp_path, whole, caplog):
    path = tmp_path / "whole.jsonl"
    with open(path, "ab") as out:
        out.write(bytes(100))
    assert fill(path, KEYS).path.read_bytes() == whole[0]
    assert "whole.jsonl:5: the last line is not whole, and is cut off" in caplog.text


def test_other_settings_are_refused_with_each_difference(tmp_path, whole):
    other = {"chosen": {"kind": "data"}, "rejected": {"model": "m", "temperature": 0.7, "top_k": 5}, "seed": 0}
    with pytest.raises(UserError) as caught:
        fill(tmp_path / "whole.jsonl", KEYS, other)
    assert "rejected.temperature: 0.8 in the file, 0.7 now" in str(caught.value)
    assert "rejected.top_k: absent in the file, 5 now" in str(caught.value) and "seed" not in str(caught.value)
    assert (tmp_path / "whole.jsonl").read_bytes() == whole[0]


def test_what_is_not_ours_is_not_touched(tmp_path, whole):
    strange = tmp_path / "mine.jsonl"
    strange.write_text('{"prompt": "问"}\n')
    with pytest.raises(UserError, match=r"is there, but not mine.jsonl.state"):
        fill(strange, KEYS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.jsonl", "whole.jsonl", "whole.jsonl.state"]
    path = tmp_path / "whole.jsonl"
    path.write_bytes(b'{"prompt": 1}\n' + whole[0])
    with pytest.raises(UserError, match=r"whole.jsonl:1: a row without provenance.key"):
        fill(path, KEYS)
    path.write_bytes(whole[0].replace(b"}\n", b"\n", 1))
    with pytest.raises(UserError, match=r"whole.jsonl:1: not a row of this command"):
        fill(path, KEYS)
    (tmp_path / "whole.jsonl.state").write_text("{}\n")
    with pytest.raises(UserError, match="was not written by this command"):
        fill(path, KEYS)


def test_taken_away_it_begins_anew_with_other_settings(tmp_path, whole):
    (tmp_path / "whole.jsonl").unlink()
    file = fill(tmp_path / "whole.jsonl", ["a"], {"seed": 1})
    assert file.pairs == 1 and not file.dropped


def test_two_at_once_are_refused(tmp_path):
    with PairFile(tmp_path / "one.jsonl", SETTINGS), pytest.raises(UserError, match="another process is making it"):
        PairFile(tmp_path / "one.jsonl", SETTINGS)
    fill(tmp_path / "one.jsonl", KEYS)


def test_no_room_is_said_and_mended(tmp_path, whole, monkeypatch):
    """A disk that is full in the middle of a row."""
    with PairFile(tmp_path / "full.jsonl", SETTINGS) as file:
        class Full:
            name = str(file.path)

            def __init__(self, real):
                self.real, self.room = real, 30

            def write(self, data):
                if not self.room:
                    raise OSError(28, "No space left on device")
                taken = self.real.write(data[:self.room])
                self.room -= taken
                return taken

            def __getattr__(self, name):
                return getattr(self.real, name)

        file._rows = Full(file._rows)
        with pytest.raises(UserError, match="full.jsonl cannot be written: No space left on device"):
            file.add("a", row("a"))
    assert fill(tmp_path / "full.jsonl", KEYS).path.read_bytes() == whole[0]


def test_a_folder_that_cannot_be_made_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        PairFile(os.path.join(tmp_path, "file", "out.jsonl"), SETTINGS)
