"""`dpo` as a user types it: from a run on text over dialogues to preferences."""

import json

import numpy as np
import pytest

from ctllm_jax.report.run import read_run
from ctllm_jax.training.checkpoints.checkpoint import list_checkpoints
from tests.cli.conftest import call
from tests.cli.test_sft import write_dialogues
from tests.runs import assert_same_bits, read_arrays


@pytest.fixture(scope="module")
def tuned(text_run, tmp_path_factory):
    """A run of one epoch on dialogues."""
    folder = tmp_path_factory.mktemp("tuned")
    printed = call("sft", "quickstart/sft", f"init={text_run.directory}", f"run.dir={folder / 'run'}",
                   f"data.sources.zh={write_dialogues(folder / 'zh.jsonl')}", "batch.tokens=512",
                   "batch.sequence_length=64", "data.epochs=1", "evaluation.every=0", "sample.every=0",
                   "log.report=false")
    assert printed.status == 0, printed.err
    return folder / "run"


def write_pairs(path, answers, count=24):
    """So many pairs, of which the first answers are preferred; and an empty, an equal and an overlong one."""
    rows = [{"prompt": f"今天{index}，", "chosen": answers[0], "rejected": answers[1]} for index in range(count)]
    rows += [{"prompt": "今天", "chosen": "", "rejected": "不错"}, {"prompt": "今天", "chosen": "好", "rejected": "好"},
             {"prompt": "今天天气不错" * 60, "chosen": "去公园。", "rejected": "不错。"}]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def command(tuned, tmp_path_factory):
    """Three epochs over pairs of two groups."""
    folder = tmp_path_factory.mktemp("dpo")
    paths = {name: write_pairs(folder / f"{name}.jsonl", answers) for name, answers in (
        ("zh", ["去公园散步。", "天气不错。"]), ("en", ["the model reads.", "text and text."]))}
    return ["dpo", "quickstart/dpo", f"init={tuned}", f"run.dir={folder / 'run'}",
            *(f"data.sources.{name}.path={path}" for name, path in paths.items()), "batch.tokens=1024",
            "batch.sequence_length=128", "optimizer.lr=1e-3", "optimizer.schedule=constant", "warmup_ratio=null",
            "data.epochs=3", "data.held_out=0.25", "evaluation.every=2", "evaluation.rows_per_device=2",
            "sample.every=0", "log.every=1", "checkpoint.every=2"]


@pytest.fixture(scope="module")
def trained(command):
    """(its directory, what the command printed)."""
    printed = call(*command)
    assert printed.status == 0, printed.err
    return command[3].partition("=")[2], printed


def elsewhere(command, directory, *overrides):
    return [*(word for word in command if not word.startswith("run.dir=")), f"run.dir={directory}", *overrides]


def test_a_run_learns_what_is_preferred(trained, tuned):
    directory, printed = trained
    run = read_run(directory)
    assert run.state == "done"
    first, last = run.train[0], run.train[-1]
    assert first["loss"] == pytest.approx(np.log(2), abs=1e-4) and first["rewards/accuracies"] < 0.9
    assert last["loss"] < first["loss"] and last["rewards/accuracies"] == 1 and last["rewards/margins"] > 0.1
    assert any("rewards/accuracies/zh" in record and "rewards/margins/en" in record for record in run.train)
    assert "accuracy 100.0%" in printed.out and "margin" in printed.out
    assert "left out of zh: 1 (an empty answer), 1 (equal answers), 1 (over-length prompt)" in printed.out
    assert f"next: python launch.py chat {directory}" in printed.out
    page = (run.directory / "report.html").read_text()
    assert "Reward accuracy" in page and "Reward margin" in page and "per pair" in page
    template = [list_checkpoints(folder)[-1].meta["template"] for folder in (run.directory, tuned)]
    assert template[0]["fingerprint"] == template[1]["fingerprint"]


def test_held_out_pairs_are_evaluated_in_the_loop(trained):
    directory, printed = trained
    run = read_run(directory)
    first, last = run.evaluation[0], run.evaluation[-1]
    assert first["step"] == 2 and last["step"] == run.step and first["pairs"] == last["pairs"] > 0
    told = run.start["data"]["sources"]
    assert {name: each["pairs"] for name, each in last["sources"].items()} == {
        name: each["held_out"] for name, each in told.items()}
    assert sum(each["held_out"] for each in told.values()) == last["pairs"] == run.start["data"]["held_out"]
    assert last["loss"] < first["loss"] and last["rewards/margins"] > 0.1 and last["rewards/accuracies"] == 1
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen"):
        for group in ("zh", "en"):
            assert last[f"{name}/{group}"] == last["sources"][group][name]
        assert last[name] * last["pairs"] == pytest.approx(
            sum(each[name] * each["pairs"] for each in last["sources"].values()), rel=1e-5)
    assert "held out | all: loss" in printed.out and "pairs held out" in printed.out
    page = (run.directory / "report.html").read_text()
    assert "Held-out pairs" in page and "held-out accuracy" in page and "held out · zh" in page


def test_another_share_held_out_is_refused(trained, command):
    printed = call(*command, "data.held_out=0.5")
    assert printed.status == 2 and "data.held_out" in printed.err and "cannot be resumed" in printed.err


def test_the_same_command_goes_on_bit_for_bit(trained, command, tmp_path):
    directory, _ = trained
    steps = read_run(directory).step
    part = elsewhere(command, tmp_path / "run")
    stopped, resumed = call(*part, "steps=3"), call(*part)
    assert stopped.status == resumed.status == 0, stopped.err + resumed.err
    assert "taking the reference" in stopped.out and "taking the reference" in resumed.out  # beside the pairs
    assert "resuming" in resumed.out
    assert_same_bits(read_arrays(tmp_path / "run", steps), read_arrays(directory, steps))


def test_another_reference_is_refused(trained, command, text_run):
    directory, _ = trained
    printed = call(*(word for word in command if not word.startswith("init=")), f"init={text_run.directory}",
                   "data.template=plain")
    assert printed.status == 2 and "cannot be resumed" in printed.err and "data.reference.run_sha256" in printed.err
    assert "computing" not in printed.out and directory in printed.err


@pytest.mark.parametrize(("overrides", "message"), [
    (["data.template.kind=plain", "data.template.plain_user={content}→"], "a model keeps the one it has learned"),
    (["init=nowhere"], "nowhere"),
    (["loss.kind=hinge", "loss.label_smoothing=0.1"], "has no label_smoothing"),
    (["data.sources.zh.path=missing.jsonl"], "missing.jsonl"),
    (["batch.sequence_length=16", "batch.tokens=128"], "no pair is left"),
    (["steps=3", "warmup_ratio=0.99", "optimizer.schedule=cosine", "optimizer.warmup_steps=3"], "leaves no step"),
])
def test_what_does_not_fit_is_said_in_a_line(command, overrides, message, tmp_path):
    printed = call(*elsewhere(command, tmp_path / "run", *overrides))
    assert printed.status == 2 and message in printed.err and "Traceback" not in printed.err


def test_a_base_model_has_no_template(command, text_run, tmp_path):
    printed = call(*elsewhere(command, tmp_path / "run", f"init={text_run.directory}"))
    assert printed.status == 2 and "was not taught to answer" in printed.err


def test_a_plan_starts_nothing(command, tmp_path):
    printed = call(*elsewhere(command, tmp_path / "run", "--dry-run"))
    assert printed.status == 0 and "nothing was started" in printed.out and not list(tmp_path.iterdir())


def test_a_loss_without_a_reference_computes_none(command, tmp_path):
    printed = call(*elsewhere(command, tmp_path / "run", "loss.kind=simpo", "steps=2"))
    assert printed.status == 0, printed.err
    assert "reference" not in printed.out and not list((tmp_path / "run").glob("reference*"))
