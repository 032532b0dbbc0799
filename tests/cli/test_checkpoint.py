"""`checkpoint ls`."""

import re
import shutil

from tests.cli.conftest import call


def cells(printed):
    """The rows of the table, cell by cell."""
    assert printed.status == 0, printed.err
    return [[cell.strip() for cell in line.strip("│").split("│")] for line in printed.out.splitlines() if "MiB" in line]


def test_every_checkpoint_by_the_name_that_loads_it(text_run):
    rows = cells(call("checkpoint", "ls", text_run.directory))
    assert [row[:3] for row in rows] == [[f"{text_run.directory}@2", "resumable", "1,024"],
                                         [f"{text_run.directory}@3", "resumable", "1,536"]]
    for row in rows:
        assert re.fullmatch(r"0\.[5-9] MiB", row[3]) and re.fullmatch(r"\d{4}(-\d\d){2} [\d:]{8}", row[4])


def test_several_runs_and_one_without(text_run, tmp_path):
    (tmp_path / "config.yaml").touch()
    printed = call("checkpoint", "ls", text_run.directory, tmp_path)
    assert len(cells(printed)) == 2 and f"{tmp_path}: no checkpoint yet" in printed.out


def test_a_milestone_is_called_one(text_run, tmp_path):
    directory = tmp_path / "run"
    shutil.copytree(text_run.directory, directory)
    (directory / "milestones").mkdir()
    (directory / "checkpoints/2").rename(directory / "milestones/2")
    rows = cells(call("checkpoint", "ls", directory))
    assert [row[:2] for row in rows] == [[f"{directory}@2", "milestone"], [f"{directory}@3", "resumable"]]


def test_no_run_directory(tmp_path):
    printed = call("checkpoint", "ls", tmp_path)
    assert printed.status == 2 and f"{tmp_path} is no run directory" in printed.err
