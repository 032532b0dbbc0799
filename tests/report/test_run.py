"""Reading a run directory: restarts, torn lines, absent files."""

import json
from pathlib import Path

import pytest

from ctllm_jax.config.errors import UserError
from ctllm_jax.report.run import differences, final_loss, labels, read_run


def test_a_restart_supersedes_what_lies_beyond_its_step(finished):
    run = read_run(finished)
    steps = [record["step"] for record in run.train]
    assert steps == list(range(10, 2001, 10))
    assert [record["step"] for record in run.evaluation] == list(range(200, 2001, 200))
    assert run.superseded == 6
    assert run.state == "done" and len(run.starts) == 2


def test_the_pause_between_attempts_is_no_training_time(finished):
    run = read_run(finished)
    assert run.last_time - run.starts[0]["time"] == pytest.approx(run.seconds + 600)


def test_a_resumed_step_that_is_told_twice_counts_once(writer):
    made = writer(sources=("zh",))
    made.start()
    for step in (0, 100):
        made.evaluate(step)
        made.sample(step)
    made.start(100, "resume")
    made.evaluate(100)
    made.sample(100, prompt="今天", text="后来")
    run = read_run(made.directory)
    assert [record["step"] for record in run.evaluation] == [0, 100]
    assert [(record["step"], record["prompt"]) for record in run.sample] == [(0, "今天"), (0, "中国"), (100, "今天")]


def test_a_scratch_restart_drops_everything_trained_before(writer):
    made = writer()
    made.start()
    made.train(0, 100)
    made.start()
    made.train(0, 50)
    assert [record["step"] for record in read_run(made.directory).train] == [10, 20, 30, 40, 50]


def test_an_end_before_a_restart_is_not_the_end(writer):
    made = writer()
    made.start()
    made.train(0, 100)
    made.end(100, "interrupted")
    assert read_run(made.directory).state == "interrupted"
    made.start(100, "resume")
    assert read_run(made.directory).state == "unfinished"


@pytest.mark.parametrize("cut", [1, 20, 60])
def test_a_half_written_last_line_loses_only_itself(writer, cut):
    made = writer()
    made.start()
    made.train(0, 100)
    path = made.directory / "metrics.jsonl"
    text = path.read_bytes()
    path.write_bytes(text[:-cut])
    run = read_run(made.directory)
    assert len(run.train) == (10 if cut == 1 else 9)
    assert len(run.problems) == (0 if cut == 1 else 1)
    assert all("half-written last line" in problem for problem in run.problems)


@pytest.mark.parametrize("line, said", [
    (b"{not json}", "not JSON"),
    (b"\xff\xfe\x00", "not JSON"),
    (b"[1, 2]", "not a JSON object"),
    (b"[" * 100_000, "not JSON"),
    (b'{"event": "train", "time": 1.0, "loss": 2.0}', "no step"),
    (b'{"event": "train", "time": 1.0, "step": "7"}', "no step"),
    (b'{"event": "train", "time": 1.0, "step": NaN}', "no step"),
    (b'{"event": "train", "step": 7}', "no time"),
    (b'{"event": "evaluation", "time": 1.0, "step": 500}', "no sources"),
    (b'{"event": "evaluation", "time": 1.0, "step": 500, "sources": [1]}', "no sources"),
    (b'{"event": "trian", "time": 1.0, "step": 7}', "unknown event 'trian'"),
    (b'{"event": "train", "time": 1.0, "step": 3, "loss": 1.0}', "step 3 after step 100"),
])
def test_a_bad_line_is_named_and_loses_nothing_else(writer, line, said):
    made = writer()
    made.start()
    made.train(0, 100)
    with open(made.directory / "metrics.jsonl", "ab") as file:
        file.write(line + b"\n")
    number = len((made.directory / "metrics.jsonl").read_bytes().splitlines())
    made.train(100, 200)
    run = read_run(made.directory)
    assert [record["step"] for record in run.train] == list(range(10, 201, 10))
    (problem,) = run.problems
    assert problem.startswith(f"metrics.jsonl, line {number}: {said}")


def test_many_bad_lines_are_counted_not_listed(writer):
    made = writer()
    (made.directory / "metrics.jsonl").write_text("{\n" * 1000, encoding="utf-8")
    run = read_run(made.directory)
    assert len(run.problems) == 21 and "980 more" in run.problems[-1]


def test_an_empty_run_and_its_absent_files(tmp_path):
    (tmp_path / "config.yaml").write_text("steps: 1\n", encoding="utf-8")
    run = read_run(tmp_path)
    assert run.state == "empty" and run.train == [] and run.environment == {} and run.config_text == "steps: 1\n"
    (tmp_path / "metrics.jsonl").write_bytes(b"")
    (tmp_path / "environment.json").write_text("{oops", encoding="utf-8")
    run = read_run(tmp_path)
    assert run.state == "empty" and run.problems == ["environment.json: not JSON; left out"]


def test_what_is_no_run_directory_is_told_with_its_path(tmp_path):
    with pytest.raises(UserError, match="nowhere: no such directory"):
        read_run(tmp_path / "nowhere")
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(UserError, match="file: a file"):
        read_run(tmp_path / "file")
    with pytest.raises(UserError, match="neither metrics.jsonl nor config.yaml"):
        read_run(tmp_path)


def test_differences_are_only_of_keys_that_differ(writer):
    runs = []
    for name, changes in (("a", {}), ("b", {"optimizer__lr": 3e-3, "run__dir": "runs/b", "loss": {"z_loss": 1e-4}})):
        made = writer(name, **changes)
        made.start()
        runs.append(read_run(made.directory))
    assert differences(runs) == [("loss.z_loss", [None, "0.0001"]), ("optimizer.lr", ["0.001", "0.003"])]
    runs.append(read_run(writer("without-metrics").directory))
    assert [key for key, _ in differences(runs)] == ["loss.z_loss", "optimizer.lr"]


def test_labels_are_as_short_as_tells_runs_apart():
    assert labels([Path("/x/a/run"), Path("/x/b/run")]) == ["a/run", "b/run"]
    assert labels([Path("/x/a/one"), Path("/x/b/two")]) == ["one", "two"]


def test_tokens_follow_from_the_step_where_a_record_has_none(writer):
    made = writer()
    made.start()
    made.line("train", step=10, loss=2.0)
    run = read_run(made.directory)
    assert run.tokens_at(run.train[0]) == 10 * run.start["tokens_per_step"]
    assert json.loads(json.dumps(run.start))["steps"] == 2000


@pytest.mark.parametrize(("losses", "expected"), [
    ([], None), ([3.0], (3.0, 1, 1, 1)), ([9.0] * 19 + [1.0], (5.0, 19, 20, 2)),
    ([9.0] * 600 + [2.0] * 25 + [4.0] * 25, (3.0, 601, 650, 50)), ([1.0] * 39 + [None], (None, 37, 40, 4))])
def test_the_final_loss_is_a_mean_over_a_window_that_is_told(writer, losses, expected):
    made = writer()
    made.start()
    for step, loss in enumerate(losses, 1):
        made.line("train", step=step, loss=loss)
    assert final_loss(read_run(made.directory)) == expected
