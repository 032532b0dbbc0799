"""`sweep` as a user types it: interrupted, killed, gone on with; what every ratio was trained on; the comparison."""

import json
import os
import random
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from ctllm_jax.cli.sweep import Signals
from ctllm_jax.config.load import load
from ctllm_jax.config.sft import SFTConfig
from ctllm_jax.report.run import read_run
from ctllm_jax.training.checkpoints.checkpoint import list_checkpoints
from ctllm_jax.training.sft import open_stage
from tests.cli.conftest import call
from tests.runs import cached, start

RATIOS = ("1:1", "2:1", "4:1", "8:1")
NAMES = [f"ratio=zh_en={ratio.replace(':', '_')}" for ratio in RATIOS]
TOO_MANY = "ratio=zh_en=1_99"
WORDS = {"zh": ["今天", "天气", "不错", "我们", "去", "公园"], "en": ["the", " model", " reads", " text", " and"]}


@pytest.fixture(scope="module")
def command(text_run, tmp_path_factory):
    """Four ratios, and one that the data is too small for, from the run on text."""
    folder, draw = tmp_path_factory.mktemp("sweep"), random.Random(0)
    for group, words in WORDS.items():
        rows = [{"messages": [{"role": "user", "content": f"{index} " + "".join(draw.choices(words, k=5))},
                              {"role": "assistant", "content": "".join(draw.choices(words, k=6))}]}
                for index in range(48)]
        (folder / f"{group}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    ratios = ",".join(f"zh:en={ratio}" for ratio in (*RATIOS, "1:99"))
    return ["sweep", "sft", "quickstart/sft_ratio", f"init={text_run.directory}", f"vary.data.ratio={ratios}",
            *(f"data.sources.{group}.path={folder / f'{group}.jsonl'}" for group in WORDS), "batch.tokens=256",
            "batch.sequence_length=64", "data.epochs=6", "data.held_out=0.15", "evaluation.every=1000",
            "evaluation.rows_per_device=2", "sample.every=0", "log.every=1", "log.report=false", "checkpoint.every=2",
            f"run.dir={folder / 'runs'}"]


def directory_of(command):
    return Path(command[-1].partition("=")[2])


def wait_for_checkpoint(directory, process):
    """Until a run has a step on disk."""
    while not any(path.name.isdigit() for path in directory.glob("checkpoints/*")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)


@pytest.fixture(scope="module")
def swept(command, tmp_path_factory):
    """(what the first call printed, what the second did): in the first one, run 1 is killed and run 2 interrupted."""
    directory, variables = directory_of(command), cached(tmp_path_factory.mktemp("compiled"))
    with start(*command, **variables) as process:
        try:
            wait_for_checkpoint(directory / NAMES[0], process)
            child, = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            os.kill(int(child), signal.SIGKILL)
            wait_for_checkpoint(directory / NAMES[1], process)
            process.send_signal(signal.SIGINT)
            first = process.wait_for_text()
        finally:
            process.kill()
    return first, start(*command, **variables).wait_for_text(timeout=540)


def test_a_killed_run_does_not_stop_the_others_and_an_interrupt_does(swept):
    first, _ = swept
    assert first.returncode == 130, first.stdout
    assert f"run 1 of 5: {NAMES[0]}: failed (killed by SIGKILL)" in first.stdout
    assert f"run 2 of 5: {NAMES[1]}: interrupted" in first.stdout
    assert "run 3 of 5" not in first.stdout and "the same command goes on" in first.stdout


def test_the_same_command_goes_on_and_one_failure_is_told_by_the_status(swept, command):
    _, second = swept
    assert second.returncode == 1, second.stdout
    assert second.stdout.count("resuming at step") == 2 and second.stdout.count("from the weights of") == 2
    assert f"run 5 of 5: {TOO_MANY}: failed (exit status 2)" in second.stdout
    assert "needs" in second.stdout and "rows of group 'en'" in second.stdout
    assert all(read_run(directory_of(command) / name).state == "done" for name in NAMES)


def test_what_is_finished_is_passed_over(swept, command, monkeypatch):
    printed = call(*[word.replace(",zh:en=1:99", "") for word in command])
    assert printed.status == 0, printed.err
    assert printed.out.count("is finished, and passed over") == 4
    # A file that is another one now is left to the run to judge: it starts, and refuses.
    path = Path(command[5].partition("=")[2])
    content, times = path.read_bytes(), path.stat()
    path.write_bytes(content.splitlines(keepends=True)[0])
    try:
        printed = call(*[word.replace(",zh:en=1:99", "") for word in command], "--fail-fast")
        assert printed.status == 1 and "passed over" not in printed.out
        assert "failed (exit status 2)" in printed.out and "run 2 of 4" not in printed.out
    finally:
        path.write_bytes(content)
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def trained_dialogues(directory):
    """By language, the dialogues that the last checkpoint of a run says it was trained on."""
    config = load(SFTConfig, target=directory / "config.yaml")
    data = open_stage(config).data
    said = list_checkpoints(directory)[-1].meta["fingerprint"]["data"]["examples_sha256"]
    assert data.fingerprint["examples_sha256"] == said
    examples = data.examples
    spans = zip(examples.offsets[:-1], examples.offsets[1:], examples.sources, strict=True)
    found = [(int(source), examples.ids[first:last].tobytes()) for first, last, source in spans]
    return [{ids for source, ids in found if source == index} for index in range(2)], data


def test_the_ratios_are_nested_and_evaluated_on_the_same(swept, command):
    chinese, english, evaluated = [], [], set()
    for name, ratio in zip(NAMES, RATIOS, strict=True):
        (zh, en), data = trained_dialogues(directory_of(command) / name)
        chinese.append(zh)
        english.append(en)
        assert len(en) == len(zh) // int(ratio[0])
        run = read_run(directory_of(command) / name)
        assert run.start["data"]["groups"]["en"]["rows"] == len(en)
        held_out = [data.held_out(rows=1, split="", max_tokens=10**9)[name] for name in ("zh", "en")]
        evaluated.add(b"".join(np.sort([hash(batch.tokens.tobytes()) for batch in each]).tobytes()
                               for each in held_out))
        assert run.evaluation[-1]["sources"].keys() == {"zh", "en"}
    assert all(zh == chinese[0] for zh in chinese) and len(evaluated) == 1
    assert english[3] < english[2] < english[1] < english[0]


def test_the_comparison_is_a_table_and_a_page(swept, command):
    _, second = swept
    table = second.stdout[second.stdout.rindex("bpb zh"):]
    rows = {line.split()[0]: line for line in table.splitlines() if line.strip().startswith("ratio=")}
    assert list(rows) == [*NAMES, TOO_MANY] and "not the same" not in table and "not comparable" not in table
    columns = [[float(word.rstrip("*")) for word in rows[name].split()[-4:]] for name in NAMES]
    for place in range(4):
        best = min(range(4), key=lambda run: columns[run][place])
        assert rows[NAMES[best]].split()[-4 + place].endswith("*")
    run = read_run(directory_of(command) / NAMES[0])
    assert f"{run.evaluation[-1]['sources']['zh']['bits_per_byte']:.3f}" in rows[NAMES[0]]
    page = (directory_of(command) / "report.html").read_text()
    assert "4 runs compared" in page and "Bits per byte, held out · en" in page and "data.ratio" in page
    # The sweep's directory stands for its runs.
    other = directory_of(command).parent / "again.html"
    assert call("report", directory_of(command), f"output={other}").status == 0
    assert "4 runs compared" in other.read_text()


def test_a_plan_tells_every_run_and_starts_nothing(command, tmp_path):
    printed = call(*[word.replace(",zh:en=1:99", "") for word in command[:-1]], f"run.dir={tmp_path / 'runs'}",
                   "--dry-run")
    assert printed.status == 0 and not list(tmp_path.iterdir())
    rows = [line.split() for line in printed.out.splitlines() if line.strip().startswith("ratio=")]
    assert [row[0] for row in rows] == NAMES and {row[1] for row in rows} == {"starts"}
    english = [int(row[6].rstrip(",")) for row in rows]
    chinese = {int(row[4].rstrip(",")) for row in rows}
    assert len(chinese) == 1 and english == [chinese.copy().pop() // int(ratio[0]) for ratio in RATIOS]
    refused = call(*command[:-1], f"run.dir={tmp_path / 'runs'}", "--dry-run")
    assert refused.status == 2 and f"{TOO_MANY}: " in refused.err and "rows of group 'en'" in refused.err


def test_a_directory_that_is_a_run_is_refused(command, text_run):
    printed = call(*command[:-1], f"run.dir={text_run.directory}")
    assert printed.status == 2 and "is a run; a sweep needs a directory" in printed.err


def test_what_is_ignored_stays_ignored(monkeypatch):
    """As under nohup, whose runs are to outlive the terminal."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Signals():
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) not in (signal.SIG_IGN, signal.SIG_DFL)
    finally:
        signal.signal(signal.SIGHUP, before)
