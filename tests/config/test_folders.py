"""Every file below a folder once, whatever links lead where; what is linked and what is left out is named."""

import logging
import os
from pathlib import Path

import pytest

from ctllm_jax.config.errors import UserError
from ctllm_jax.config.folders import files_below
from ctllm_jax.config.prepare import PrepareConfig, SourceInput
from ctllm_jax.data.conversations import _files
from ctllm_jax.dataset.text import find_files
from data_prep.readers import plan_files


@pytest.fixture
def linked(tmp_path):
    """A folder with links to folders outside and inside, to itself, twice to one folder, to a file, and to nothing."""
    root, outside = tmp_path / "in", tmp_path / "outside"
    for folder in (root / "real", root / ".hidden", outside / "deep"):
        folder.mkdir(parents=True)
    for path in (root / "a.jsonl", root / "real" / "r.jsonl", root / ".hidden" / "h.jsonl", outside / "o.jsonl",
                 outside / "deep" / "d.jsonl"):
        path.write_text(f'{{"text": "{path.stem}"}}\n')
    for name, target in (("link", outside), ("again", outside), ("again/deep/up", root), ("inside", "real"),
                         ("loop", "loop"), ("file.jsonl", outside / "deep" / "d.jsonl"), ("gone", "nowhere")):
        os.symlink(target, root / name)
    return root


def relative(files, root):
    return [Path(file).relative_to(root).as_posix() for file in files]


def test_each_folder_is_read_once(linked, caplog):
    found = relative(files_below(linked), linked)
    assert found == ["a.jsonl", "again/deep/d.jsonl", "again/o.jsonl", "file.jsonl", "real/r.jsonl"]
    assert "linked folders are read too: again -> " in caplog.text
    assert "because their folder is read already: again/deep/up -> " in caplog.text
    assert "inside -> real, link -> " in caplog.text
    assert "because they lead nowhere: gone -> nowhere, loop -> loop" in caplog.text


def test_links_are_left_out_where_they_are_not_trusted(linked, caplog):
    assert relative(files_below(linked, links="skip"), linked) == ["a.jsonl", "real/r.jsonl"]
    assert "links=skip says so: again -> " in caplog.text and "file.jsonl -> " in caplog.text


def test_the_place_of_a_folder_does_not_depend_on_links_to_it(tmp_path):
    (tmp_path / "z").mkdir()
    (tmp_path / "z" / "a.txt").touch()
    os.symlink("z", tmp_path / "a")
    assert relative(files_below(tmp_path), tmp_path) == ["z/a.txt"]


def test_every_reader_of_folders_follows(linked):
    expected = ["a", "d", "o", "r"]
    source = SourceInput(input=[str(linked)])
    for links, texts in (("follow", expected), ("skip", ["a", "r"])):
        config = PrepareConfig(input=source.input, output="unused", links=links)
        units = plan_files("web", source, config)
        assert sorted(unit["sample"]["text"] for unit in units) == texts
        # The file that two names lead to is read once, under one of them.
        assert len(find_files(source.input, links=links)) == len(texts)
    assert sorted(file.stem for file in _files(linked)) == ["a", "d", "file", "o", "r"]


def test_the_output_is_not_read_through_a_link(tmp_path):
    (tmp_path / "work" / "out" / "clean").mkdir(parents=True)
    (tmp_path / "work" / "out" / "clean" / "made.jsonl").write_text('{"text": "made"}\n')
    (tmp_path / "work" / "own.jsonl").write_text('{"text": "own"}\n')
    (tmp_path / "in").mkdir()
    os.symlink(tmp_path / "work", tmp_path / "in" / "work")
    source = SourceInput(input=[str(tmp_path / "in")])
    config = PrepareConfig(input=source.input, output=str(tmp_path / "work" / "out"))
    assert [unit["sample"]["text"] for unit in plan_files("web", source, config)] == ["own"]


def test_a_folder_that_cannot_be_listed_stops(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UserError, match="cannot be listed: Permission denied"):
        files_below(tmp_path)


def test_a_file_url_is_a_path(linked, caplog):
    with caplog.at_level(logging.ERROR):
        source = SourceInput(input=[f"file://{linked}"])
        units = plan_files("web", source, PrepareConfig(input=source.input, output="unused"))
    assert len(units) == 4
