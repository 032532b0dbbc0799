"""A corpus of two languages, and a run of three steps on it, made once by the command."""

import contextlib
import io
from pathlib import Path
from typing import NamedTuple

import pytest

from ctllm_jax.cli import main
from tests.small_text import VOCABULARY, make_corpus


class Printed(NamedTuple):
    status: int
    out: str
    err: str


def call(*words):
    """A command in this process: its exit status, and what it printed."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main([str(word) for word in words])
    return Printed(status, out.getvalue(), err.getvalue())


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    return make_corpus(tmp_path_factory.mktemp("corpus"))


def text_overrides(corpus):
    """The debug config on text: what every run on the corpus shares."""
    return [f"model.vocab_size={VOCABULARY}", "data.kind=mixture", f"data.sources.zh={corpus.folder / 'zh'}",
            f"data.sources.en={corpus.folder / 'en'}", "data.isolate_documents=false", "data.mask_eod=false", "steps=3",
            "optimizer.warmup_steps=1"]


class TextRun(NamedTuple):
    directory: Path
    command: list
    printed: Printed


@pytest.fixture(scope="session")
def text_run(corpus, tmp_path_factory):
    """A run of three steps with evaluation, samples, checkpoints at 2 and 3, and the report."""
    directory = tmp_path_factory.mktemp("runs") / "text"
    command = ["pretrain", "debug/pretrain", f"run.dir={directory}", *text_overrides(corpus), "model.init_std=0.2",
               "checkpoint.every=2", "evaluation.every=2", "evaluation.rows_per_device=1", "sample.every=2",
               "sample.prompts=['[/the] reads', 今天]", "sample.max_tokens=6", "log.report=true"]
    printed = call(*command)
    assert printed.status == 0, printed.err
    return TextRun(directory, command, printed)


@pytest.fixture(scope="session")
def tuned(text_run, tmp_path_factory):
    """A run of a few steps on dialogues, with checkpoints at the last two."""
    from tests.cli.test_sft import write_dialogues

    folder = tmp_path_factory.mktemp("tuned")
    printed = call("sft", "quickstart/sft", f"init={text_run.directory}", f"run.dir={folder / 'run'}",
                   f"data.sources.zh={write_dialogues(folder / 'zh.jsonl')}", "batch.tokens=512",
                   "batch.sequence_length=64", "data.epochs=1", "evaluation.every=0", "sample.every=0",
                   "checkpoint.every=1", "checkpoint.keep_last=2", "log.report=false",
                   *(f"data.template.plain_{role}={{content}}\n" for role in ("system", "user", "assistant")))
    assert printed.status == 0, printed.err
    return folder / "run"
