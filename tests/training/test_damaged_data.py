"""A run over data of which a record is damaged goes on, says so, and is the same after a restart."""

import pytest

from ctllm_jax import cli
from ctllm_jax.config.statuses import WRONG_INPUT
from ctllm_jax.dataset.reader import Dataset
from ctllm_jax.report.run import read_run
from tests.dataset.test_damage import damage_record
from tests.runs import DEBUG, assert_same_bits, read_arrays
from tests.small_text import VOCABULARY, make_corpus

pytestmark = pytest.mark.usefixtures("planned_once")


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    """A dataset whose records 1 and 4 cannot be read."""
    folder = tmp_path_factory.mktemp("corpus")
    directory = make_corpus(folder).folder / "zh"
    for index in (1, 4):
        damage_record(directory, index)
    return directory


def words(run_dir, damaged, *overrides):
    # A row is a record: 40 rows a run see every record of the shard.
    records = Dataset(damaged).split("train").shards[0].shard.records
    return ["pretrain", DEBUG, f"run.dir={run_dir}", f"steps={-(-records // 8)}", f"model.vocab_size={VOCABULARY}",
            f"data={damaged}", "checkpoint.every=1", "sample.every=0", "mesh.data=8", "optimizer.schedule=constant",
            *overrides]


def test_the_run_goes_on_and_tells(tmp_path, damaged, capsys):
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    assert cli.main(words(whole, damaged)) == 0
    shown = capsys.readouterr().out
    run = read_run(whole)
    path = Dataset(damaged).split("train").shards[0].path
    events = [record for record in run.events if record["event"] == "damaged"]
    assert {(it["shard"], it["record"], it["replaced_by"]) for it in events} == {(str(path), 1, 2), (str(path), 4, 5)}
    assert f"record 1 of {path} cannot be read" in shown and "record 2 stands in for it" in shown
    assert not run.problems
    (parted / "config.yaml").parent.mkdir()
    (parted / "STOP").touch()  # obeyed about a second later, if the run is not over by then
    assert cli.main(words(parted, damaged)) == 0
    assert cli.main(words(parted, damaged, "data.workers=1")) == 0
    assert_same_bits(read_arrays(parted, run.end["step"]), read_arrays(whole, run.end["step"]))


def test_more_than_the_budget_stops_it_and_names_them(tmp_path, damaged, capsys):
    assert cli.main(words(tmp_path, damaged, "data.damaged_budget=1")) == WRONG_INPUT
    error = " ".join(capsys.readouterr().err.split())
    assert "cannot be read" in error and "2 damaged records in this run, more than data.damaged_budget=1" in error
    assert read_run(tmp_path).state == "failed"


def test_a_missing_shard_is_named_before_anything_is_compiled(tmp_path, damaged, capsys):
    path, command = Dataset(damaged).split("train").shards[0].path, words(tmp_path, damaged)
    hidden = path.rename(path.with_suffix(".hidden"))
    try:
        assert cli.main(command) == WRONG_INPUT
    finally:
        hidden.rename(path)
    assert "is missing" in capsys.readouterr().err and not (tmp_path / "metrics.jsonl").exists()
