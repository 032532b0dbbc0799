"""Run directories with the numbers of a small Chinese run, made up but of the right shape."""

import json
import math
import random
from pathlib import Path

import pytest

BEGAN = 1_795_000_000.0
TOKENS_PER_STEP = 16_384
POEMS = ["今天天气很好,我们一起去公园散步,看见湖边的柳树已经发芽。", "今天的的的是了不在有一。一,人的",
         "今天上午,市政府召开会议,研究部署下一阶段工作。"]


def config_of(**changes):
    """A resolved config; dotted names in `changes` are given with two underscores for the dot."""
    config = {
        "run": {"dir": "runs/quickstart"},
        "seed": 42,
        "steps": 2000,
        "model": {"hidden_size": 256, "num_layers": 6, "vocab_size": 8000, "tie_embeddings": True},
        "batch": {"tokens": TOKENS_PER_STEP, "sequence_length": 512},
        "optimizer": {"lr": 1e-3, "schedule": "cosine", "warmup_steps": 100},
        "data": {"sources": {"zh": {"path": "data/news", "weight": 1.0}}},
    }
    for name, value in changes.items():
        section, _, key = name.rpartition("__")
        (config[section] if section else config)[key] = value
    return config


class RunWriter:
    """Writes one run directory as the trainer would, a line at a time."""

    def __init__(self, directory: Path, *, steps: int = 2000, seed: int = 0, sources=("zh",), every: int = 10,
                 **changes):
        self.directory, self.steps, self.sources, self.every = directory, steps, sources, every
        self.random = random.Random(seed)
        self.floor = 2.9 + 0.12 * seed
        self.now = BEGAN + seed * 86_400
        self.config = config_of(steps=steps, **changes)
        directory.mkdir(parents=True)
        (directory / "config.yaml").write_text("steps: 2000\nmodel:\n  hidden_size: 256\n", encoding="utf-8")
        (directory / "environment.json").write_text(json.dumps({
            "python": "3.11.7", "jax": "0.10.2", "devices": {"kind": "cpu", "count": 2},
            "implementations": {"attention": "xla", "swiglu": "xla"}}), encoding="utf-8")

    def line(self, event: str, **fields) -> None:
        """Append one record."""
        with open(self.directory / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps({"event": event, "time": round(self.now, 3), **fields}) + "\n")

    def start(self, step: int = 0, how: str = "scratch") -> None:
        """A start line, its stages, and at step 0 the baselines."""
        self.line("start", how=how, step=step, parameters=11_534_848, devices="2 x cpu",
                  mesh={"data": 2, "fsdp": 1, "tensor": 1}, tokens_per_step=TOKENS_PER_STEP, steps=self.steps,
                  implementations={"attention": "xla", "swiglu": "xla"}, config=self.config,
                  tokens_per_source={source: self.steps * TOKENS_PER_STEP for source in self.sources},
                  epochs={source: 1.32 for source in self.sources})
        for name, seconds in (("data", 1.3), ("parameters", 2.1), ("compile", 41.7)):
            self.now += seconds
            self.line("stage", name=name, seconds=seconds)
        if step == 0:
            for name, bits in (("xz -9e", 2.93), ("3-gram", 2.41)):
                self.line("baseline", name=name,
                          sources={source: {"bits_per_byte": bits + 0.2 * index}
                                   for index, source in enumerate(self.sources)})

    def loss_at(self, step: int) -> float:
        """A curve that falls as curves do, with noise."""
        return self.floor + 6.1 * (1 + step / 25) ** -0.62 + self.random.gauss(0, 0.05)

    def train(self, first: int, last: int) -> None:
        """Training records for the steps after `first` up to `last`, with evaluations, samples and checkpoints."""
        for step in range(first + self.every, last + 1, self.every):
            self.now += 0.9 * self.every
            share = min(1.0, step / 100) * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * step / self.steps)))
            spike = 6.0 if self.random.random() < 0.01 else 1.0
            loss = self.loss_at(step)
            self.line("train", step=step, tokens=step * TOKENS_PER_STEP, loss=loss, bits_per_byte=loss / 1.79,
                      grad_norm=spike * (0.6 + 4 / (1 + step / 40)) * self.random.lognormvariate(0, 0.12),
                      lr=1e-3 * share, eta_seconds=(self.steps - step) * 0.9,
                      tokens_per_second=18_200 + self.random.gauss(0, 350), mfu_causal=0.382, mfu_full=0.431,
                      step_seconds=0.9, data_wait=abs(self.random.gauss(0.004, 0.003)))
            if step % max(self.every, self.steps // 10) == 0:
                self.evaluate(step)
                self.sample(step)
                self.now += 1.2
                self.line("checkpoint", step=step, seconds=1.2)

    def evaluate(self, step: int) -> None:
        """An evaluation record."""
        self.line("evaluation", step=step, tokens=step * TOKENS_PER_STEP, sources={
            source: {"loss": (loss := self.loss_at(step) + 0.05 + 0.3 * index), "bits_per_byte": loss / 1.79,
                     "tokens": 1_000_000, "bytes": 3_220_000} for index, source in enumerate(self.sources)})

    def sample(self, step: int, **fields) -> None:
        """Two samples, or the given one."""
        if fields:
            self.line("sample", step=step, **fields)
            return
        for prompt, text in (("今天", POEMS[step % 3]), ("中国", "中国人民银行决定,\n从下月起下调存款准备金率。" * 2)):
            self.line("sample", step=step, prompt=prompt, text=text)

    def end(self, step: int, reason: str = "done") -> None:
        """An end line."""
        self.line("end", step=step, reason=reason)


@pytest.fixture
def writer(tmp_path):
    """Makes run directories by name."""
    return lambda name="run", **settings: RunWriter(tmp_path / name, **settings)


@pytest.fixture
def finished(writer):
    """A whole run of 2,000 steps, resumed once with 60 steps trained twice."""
    run = writer("quickstart")
    run.start()
    run.train(0, 1060)
    run.now += 600
    run.start(1000, "resume")
    run.line("warning", message="4 CPUs now, 2 at the checkpoint: not bit for bit")
    run.train(1000, 2000)
    run.end(2000)
    return run.directory
