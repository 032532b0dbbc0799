"""What is not done on an object store is refused by name, before jax is imported; what is, works."""

import json

import pytest

from ctllm_jax import cli
from ctllm_jax.cli.object_stores import ALLOWED
from tests.object_store import BUCKET

PRETRAIN = ("pretrain", "debug/pretrain", "run.dir=gs://bucket/run")


@pytest.mark.parametrize(("words", "told"), [
    ([*PRETRAIN, "log.tensorboard=true", "log.wandb_project=p"],
     ["log.tensorboard=true: its files are appended to", "log.wandb_project=p: it needs a run directory on a disk"]),
    ([*PRETRAIN, "data=gs://b/text", "data.cache_dir=gs://b/cache", "data.tokenizer=gs://b/t.model"],
     ["pretrain needs a disk of this machine for:\n  data.tokenizer=gs://b/t.model\n  data.cache_dir=gs://b/cache\n"]),
    (["prepare", "output=gs://b/out", "input=[gs://b/in]"], ["output=gs://b/out\ncopy it there"]),
    (["sft", "quickstart/sft", "init=runs/x", "data=gs://b/d.jsonl"], ["data.sources.data.path=gs://b/d.jsonl"]),
    (["dpo", "quickstart/dpo", "init=runs/x", "data=d.jsonl", "run.dir=gs://b/r"], ["run.dir=gs://b/r"]),
    (["lora", "merge", "gs://b/r", "output=gs://b/o"], ["gs://b/r\n  output=gs://b/o"]),
    (["data", "verify", "gs://b/corpus"], ["data needs a disk of this machine for:\n  gs://b/corpus"]),
    (["export-hf", "gs://b/r", "output=gs://b/o"], ["for:\n  output=gs://b/o"]),
    (["pretrain", "debug/pretrain", "run.dir=gs://b"], ["gs://b: needs gs://BUCKET/NAME"]),
    (["sweep", "pretrain", "debug/pretrain", "run.dir=gs://b/s"], ["sweep needs a disk of this machine for:\n  run.dir=gs://b/s"])])
def test_refused(words, told, capsys):
    assert cli.main(words) == 2
    said = capsys.readouterr().err
    assert all(each in said for each in told), said


def test_commands_are_those_that_there_are():
    assert ALLOWED.keys() <= cli.COMMANDS.keys()


def test_report_and_checkpoints_of_a_run_there(store, capsys):
    lines = [{"event": "start", "time": 1.0, "step": 0}, {"event": "train", "time": 2.0, "step": 1, "loss": 2.0},
             {"event": "train", "time": 3.0, "step": 2, "loss": 1.5}, {"event": "end", "time": 4.0, "step": 2}]
    for part, records in ((1, lines[:2]), (2, lines[2:])):
        store.write(f"read/metrics-{part:05}.jsonl", "".join(json.dumps(record) + "\n" for record in records).encode())
    store.write("read/config.yaml", b"steps: 2\n")
    assert cli.main(["report", f"gs://{BUCKET}/read"]) == 0
    assert "report: gs://bucket/read/report.html" in capsys.readouterr().out
    page = store.read("read/report.html").decode()
    assert "1.5" in page and "left out" not in page
    for words in (["ls"], ["verify"], ["prune"]):
        assert cli.main(["checkpoint", *words, f"gs://{BUCKET}/read"]) == 0
    assert "no checkpoint yet" in capsys.readouterr().out
    assert cli.main(["checkpoint", "ls", f"gs://{BUCKET}/nothing"]) == 2
    assert "gs://bucket/nothing is no run directory" in capsys.readouterr().err
