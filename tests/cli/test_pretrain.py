"""`pretrain` as a user types it: the plan, the config, a whole run on text, and every wrong input in a line."""

import json
import os
import shutil
import signal
import time

import pytest

from ctllm_jax.config.data import BuildConfig
from ctllm_jax.config.errors import UserError
from ctllm_jax.config.load import config_root, load
from ctllm_jax.config.pretrain import PretrainConfig
from ctllm_jax.data.tokenizer import load_tokenizer
from ctllm_jax.dataset.build import build_from_files
from ctllm_jax.report.run import read_run
from ctllm_jax.training.checkpoints.checkpoint import find_checkpoint
from ctllm_jax.training.tuning import open_text
from tests.cli.conftest import call, text_overrides
from tests.cli.test_sft import write_other_tokenizer
from tests.runs import assert_same_bits, read_arrays, start
from tests.small_text import RECORD

CONFIGS = sorted(str(path.relative_to(config_root()).with_suffix("")) for path in config_root().rglob("*.yaml")
                 if path.parent.name not in ("data", "eval") and not path.stem.startswith(("sft", "dpo")))


@pytest.mark.parametrize("name", CONFIGS)
def test_a_dry_run_needs_no_data_and_leaves_nothing(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    printed = call("pretrain", name, "--dry-run")
    assert printed.status == 0, printed.err
    config = load(PretrainConfig, target=name)
    for line in (f"{config.steps:,} of {config.batch.tokens:,} tokens", f"{config.tokens_at(config.steps):,} (",
                 "(nothing was started)", "memory on each of 8", "checkpoints", "hours at 40% MFU"):
        assert line in printed.out
    known = config.data.kind == "synthetic"
    assert ("source synthetic" in printed.out) == known
    assert ("epochs per source are not known: data.sources." in printed.out) == (not known)
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_tells_the_epochs_of_data_that_is_there(corpus, tmp_path):
    printed = call("pretrain", "debug/pretrain", *text_overrides(corpus), f"run.dir={tmp_path / 'run'}", "steps=300",
                   "--dry-run")
    assert printed.status == 0 and "source zh" in printed.out and "not known" not in printed.out
    assert "warning: source zh is seen" in printed.out and not (tmp_path / "run").exists()


def test_a_path_is_no_markup(tmp_path):
    printed = call("pretrain", "small/150m", f"run.dir={tmp_path}/[bold]", "data.sources.zh.path=[/zh]", "--dry-run")
    assert f"free at {tmp_path}/[bold]" in printed.out and "data.sources.zh.path=[/zh] does not exist" in printed.out


def test_quickstart_has_a_plan_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    printed = call("quickstart", "--dry-run")
    assert printed.status == 0 and "plan of runs/quickstart (nothing was started)" in printed.out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", CONFIGS)
def test_the_printed_config_is_a_config(name, tmp_path):
    changed = ["optimizer.b2=0.875", "sample.prompts=[今天, 'no', '[/x]']", "run.dir=runs/a b"]
    printed = call("pretrain", name, *changed, "--print-config")
    assert printed.status == 0
    (tmp_path / "again.yaml").write_text(printed.out, encoding="utf-8")
    assert load(PretrainConfig, target=tmp_path / "again.yaml") == load(PretrainConfig, target=name, overrides=changed)


def test_a_run_on_text_leaves_all_that_it_should(text_run):
    directory = text_run.directory
    assert {path.name for path in directory.iterdir()} == {
        "config.yaml", "environment.json", "metrics.jsonl", "status.json", "report.html", "tokenizer.model",
        "checkpoints"}
    assert sorted(path.name for path in (directory / "checkpoints").iterdir()) == ["2", "3"]
    config = load(PretrainConfig, target=directory / "config.yaml")
    assert config.steps == 3 and config.sample.prompts == ["[/the] reads", "今天"]
    environment = json.loads((directory / "environment.json").read_text())
    assert {"jax", "jaxlib", "numpy"} <= set(environment["versions"]) and environment["cpu_count"] >= 1
    assert environment["implementations"].keys() == {"attention", "swiglu"}


def test_metrics_of_a_run_on_text(text_run):
    run = read_run(text_run.directory)
    assert run.state == "done" and not run.problems and run.start["how"] == "scratch"
    assert [record["step"] for record in run.train] == [1, 2, 3]
    for record in run.train:
        # Bits of a token over bytes of a token: this tokenizer's pieces have one to six.
        assert record["loss"] / 0.6931 / 6 < record["bits_per_byte"] < record["loss"] / 0.6931
        assert record["tokens"] == 512 * record["step"] and record["grad_norm"] > 0 and record["eta_seconds"] >= 0
    assert [record["step"] for record in run.evaluation] == [2, 3] and run.sources == ["zh", "en"]
    for record in run.evaluation:
        assert all(values["tokens"] > 100 and 0 < values["bits_per_byte"] < 20 for values in record["sources"].values())
    assert [(record["step"], record["prompt"]) for record in run.sample] == [
        (step, prompt) for step in (2, 3) for prompt in ("[/the] reads", "今天")]
    assert sum(run.start["tokens_per_source"].values()) == 3 * 512
    assert [event["step"] for event in run.events if event["event"] == "checkpoint"] == [2, 3]


def test_what_a_run_prints(text_run):
    out = text_run.printed.out
    for line in ("start", "from scratch", "8 x cpu, mesh data 8 x fsdp 1 x tensor 1", "attention: xla, swiglu: xla",
                 "1 rows a device at once, 1 accumulated", "source zh", "step 3 | held out | zh: loss",
                 "lr x 1, decay none", f"report: {text_run.directory / 'report.html'}"):
        assert line in out, line
    assert f"next: python launch.py generate {text_run.directory} prompt='[/the] reads'" in out


def test_the_same_command_again_has_nothing_to_do(text_run, tmp_path):
    directory = tmp_path / "again"
    shutil.copytree(text_run.directory, directory)
    printed = call(*text_run.command, f"run.dir={directory}")
    assert printed.status == 0 and "resuming at step 3" in printed.out
    run = read_run(directory)
    assert [record["step"] for record in run.train] == [1, 2, 3]
    assert run.start["how"] == "resume" and run.state == "done"


def test_a_run_on_text_goes_on_with_the_same_bits(text_run, tmp_path):
    """From step 2, without the step after it: the mixture, its order and its threads begin anew."""
    directory = tmp_path / "again"
    shutil.copytree(text_run.directory, directory)
    shutil.rmtree(directory / "checkpoints/3")
    printed = call(*text_run.command, f"run.dir={directory}")
    assert printed.status == 0 and "resuming at step 2" in printed.out
    assert_same_bits(read_arrays(directory, 3), read_arrays(text_run.directory, 3))
    ours, other = read_run(directory), read_run(text_run.directory)
    assert [record["loss"] for record in ours.train] == [record["loss"] for record in other.train]
    assert ours.evaluation[-1]["sources"] == other.evaluation[-1]["sources"]
    assert [record["text"] for record in ours.sample] == [record["text"] for record in other.sample]


@pytest.mark.parametrize(("overrides", "message"), [
    (["batch.tokens=640", "mesh.data=8"], "a batch of 10 rows cannot be split over 8 devices (mesh.replica x"),
    (["mesh.data=3"], "mesh data 3 x fsdp 1 x tensor 1 does not cover 8 devices exactly"),
    (["mesh.tensor=4"], "parameter blocks/key: its kv_heads of 2 cannot be split over mesh axis tensor of 4"),
    (["data=nowhere"], "data.sources.data.path=nowhere does not exist"),
    (["compute.attention=pallas"], "attention: implementation='pallas' cannot run on cpu"),
    (["optimizer.rules=[{pattern: nothing}]"], "optimizer.rules: pattern 'nothing' decides for no parameter"),
    (["init=nowhere"], "no model nowhere: nowhere is no directory"),
    (["batch.tokens=500"], "must be a multiple of sequence_length=64")])
def test_a_wrong_input_is_a_line(overrides, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    printed = call("pretrain", "debug/pretrain", "run.dir=run", *overrides)
    assert printed.status == 2 and message in printed.err and printed.err.startswith("error: ")
    assert not (tmp_path / "run/metrics.jsonl").exists()


@pytest.mark.parametrize(("overrides", "message"), [
    (["model.vocab_size=300"], "model.vocab_size=300 must be at least 330"),
    (["batch.sequence_length=48", "batch.tokens=480"], "neither divides nor multiplies record_tokens=64"),
    (["data.sources.zh.split=test"], "has no split 'test' with data; its splits: train, validation"),
    (["evaluation.every=1", "evaluation.split=dev"], "has no split 'dev' with data")])
def test_data_that_does_not_fit_is_a_line(corpus, overrides, message, tmp_path):
    printed = call("pretrain", "debug/pretrain", f"run.dir={tmp_path / 'run'}", *text_overrides(corpus), *overrides)
    assert printed.status == 2 and message in printed.err
    assert "Traceback" not in printed.err


def test_two_sources_of_two_tokenizers(corpus, tmp_path):
    from tests.small_text import make_corpus

    other = tmp_path / "other"
    other.mkdir()
    other = make_corpus(other)
    (other.folder / "en/tokenizer.model").write_bytes(b"not the same")
    printed = call("pretrain", "debug/pretrain", f"run.dir={tmp_path / 'run'}", *text_overrides(corpus),
                   f"data.sources.en={other.folder / 'en'}")
    assert printed.status == 2 and str(other.folder / "en/tokenizer.model") in printed.err


@pytest.fixture(scope="module")
def other_data(corpus, tmp_path_factory):
    """The Chinese part of the corpus, prepared with a tokenizer of as many ids for other text."""
    folder = tmp_path_factory.mktemp("other")
    write_other_tokenizer(folder / "other.model")
    config = BuildConfig(input=[str(corpus.folder / "zh.jsonl")], output=str(folder / "zh"), name="zh",
                         tokenizer=str(folder / "other.model"), record_tokens=RECORD, validation_fraction=0.1)
    build_from_files(config, load_tokenizer(folder / "other.model"))
    return folder / "zh"


@pytest.mark.parametrize(("overrides", "message"), [
    (["model.rope_theta=2e4"], "model.rope_theta: 10000.0 there, 20000.0 here"),
    (["model.norm_eps=1e-6", "model.sliding_window=8", "--dry-run"], "model.sliding_window: None there, 8 here"),
    (["data.sources.zh={other}", "data.sources.en={other}"], "ids differ between"),
    (["data.sources.zh={other}", "data.sources.en={other}", "--dry-run"], "ids differ between")])
def test_weights_are_not_taken_for_another_function(text_run, corpus, other_data, tmp_path, caplog, overrides, message):
    overrides = [word.replace("{other}", str(other_data)) for word in overrides]
    words = ["pretrain", "debug/pretrain", *text_overrides(corpus), f"init={text_run.directory}",
             f"run.dir={tmp_path / 'run'}", *overrides]
    refused = call(*words)
    assert refused.status == 2 and message in refused.err and "allow_mismatch=true" in refused.err, refused.err
    assert not (tmp_path / "run" / "checkpoints").exists()
    if "--dry-run" in words:
        allowed = call(*words, "allow_mismatch=true")
        assert allowed.status == 0 and message in caplog.text, allowed.err


def test_a_run_whose_files_were_changed_is_refused(text_run, other_data, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(text_run.directory, run)
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("rope_theta: 10000.0", "rope_theta: 50000.0"))
    with pytest.raises(UserError, match="model.rope_theta: 10000.0 in the checkpoint, 50000.0 in config.yaml"):
        find_checkpoint(str(run))
    (run / "config.yaml").write_text(text)
    shutil.copyfile(other_data / "tokenizer.model", run / "tokenizer.model")
    with pytest.raises(UserError, match="is not the tokenizer that .* was trained with"):
        open_text(find_checkpoint(str(run))[1])


def wait_for(condition, process, *, seconds=180):
    """Until `condition()`; fails if the process ends before, or time is up."""
    until = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None and time.monotonic() < until, process.communicate()[0]
        time.sleep(0.05)


def test_ctrl_c_keeps_the_step_it_stops_at(tmp_path):
    """And the same command goes on from there."""
    command = ["pretrain", "debug/pretrain", f"run.dir={tmp_path}", "steps=100000", "checkpoint.every=100000"]
    process = start(*command)
    wait_for(lambda: (tmp_path / "metrics.jsonl").exists() and len(read_run(tmp_path).train) > 5, process)
    os.kill(process.pid, signal.SIGINT)
    done = process.wait_for_text()
    assert done.returncode == 130 and "which is kept: the same command goes on" in done.stdout, done.stdout
    run = read_run(tmp_path)
    assert run.state == "interrupted" and run.end["step"] == run.train[-1]["step"] == run.step
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [str(run.step)]
    assert json.loads((tmp_path / "status.json").read_text())["state"] == "interrupted"
    assert "Traceback" not in done.stdout
