"""`launch.py pretrain`: one run, from its data to its checkpoints."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from ctllm_jax.config.base import Section, key, section
from ctllm_jax.config.data import DataConfig
from ctllm_jax.config.generate import HIGHEST_TEMPERATURE, MOST_TOP_K
from ctllm_jax.config.lora import LoraConfig
from ctllm_jax.config.model import ComputeConfig, MeshConfig, ModelConfig
from ctllm_jax.config.reliability import BadStepsConfig, DistributedConfig, WatchdogConfig


class RunConfig(Section):
    """The directory of a run. A bare value is its path."""

    shorthand = "dir"

    dir: str = key("", "run directory; an existing run there is resumed. Empty: runs/ and the config's name", changeable=True)
    stale_after: float = key(60.0, "seconds without a heartbeat after which a run of another machine counts as dead", gt=0, changeable=True)


def default_run_dir(target: str) -> str:
    """The run directory of a config that names none: runs/ and the config's name."""
    name = target.removesuffix(".yaml").removeprefix("./").removeprefix("configs/").replace("/", "-").strip("-.")
    return f"runs/{name}"


class BatchConfig(Section):
    """The global batch, which does not depend on the number of devices."""

    tokens: int = key(..., "tokens of one optimizer step, over all devices", ge=1)
    sequence_length: int = key(4096, "tokens of a row (S)", ge=2)
    rows_per_device: int | None = key(None, "largest number of rows that a device computes at once; the rest is accumulated. null: no accumulation", ge=1, changeable=True)

    @model_validator(mode="after")
    def _check(self):
        if self.tokens % self.sequence_length:
            raise ValueError(f"tokens={self.tokens} must be a multiple of sequence_length={self.sequence_length}")
        return self

    @property
    def rows(self) -> int:
        """Rows of the global batch (B)."""
        return self.tokens // self.sequence_length


class ParameterRule(Section):
    """Exceptions for parameters whose path matches a pattern. The first matching rule counts."""

    pattern: str = key(..., "regular expression, searched in a parameter's path, such as blocks/gate")
    lr_multiplier: float = key(1.0, "factor on the learning rate; 0 freezes", ge=0)
    weight_decay: bool | None = key(None, "whether weight decay applies; null: only to parameters of two or more dims")


class OptimizerConfig(Section):
    """AdamW and its schedule."""

    lr: float = key(..., "peak learning rate", gt=0)
    schedule: Literal["cosine", "wsd", "constant"] = key("cosine", "after warm-up: cosine to min_lr; wsd: constant, then a linear decay to min_lr over decay_steps; constant")
    warmup_steps: int = key(0, "steps of linear warm-up from 0", ge=0)
    decay_steps: int | None = key(None, "wsd: number of decay steps at the end; null: a tenth of the run", ge=1)
    min_lr: float = key(0.0, "learning rate at the end of cosine and wsd", ge=0)
    b1: float = key(0.9, "decay of the first moment", ge=0, lt=1)
    b2: float = key(0.95, "decay of the second moment", ge=0, lt=1)
    eps: float = key(1e-8, "added to the root of the second moment", gt=0)
    weight_decay: float = key(0.1, "decoupled weight decay, times the learning rate", ge=0)
    clip_norm: float | None = key(1.0, "gradients are scaled down to this global norm; null: never", gt=0)
    rules: list[ParameterRule] = key([], "exceptions by parameter path; printed with the parameters that each one matches")

    @model_validator(mode="after")
    def _check(self):
        if self.schedule != "constant" and self.min_lr > self.lr:
            raise ValueError(f"min_lr={self.min_lr} is above lr={self.lr}")
        if self.decay_steps is not None and self.schedule != "wsd":
            raise ValueError(f"decay_steps is only read with schedule=wsd; schedule={self.schedule}")
        return self


class LossConfig(Section):
    """The loss of pretraining: cross-entropy and additional terms."""

    z_loss: float = key(0.0, "weight of the squared log-normaliser (PaLM uses 1e-4)", ge=0)


class LoopTasksConfig(Section):
    """Multiple-choice benchmarks by log-probability, evaluated during training (extra: eval)."""

    every: int = key(0, "steps between evaluations, and once at the end; 0: never", ge=0, changeable=True)
    names: list[str] = key([], "tasks, subjects and groups of lm-eval, such as cmmlu,mmlu_stem; evaluate list shows all", changeable=True)
    limit: int | None = key(20, "number of first questions of each task or subject; null: all", ge=1, changeable=True)
    num_fewshot: int | None = key(None, "examples before each question; null: each task's own number", ge=0, changeable=True)
    data: str | None = key(None, "folder of the official question files; null: data/evaluation", changeable=True)
    batch: int = key(8192, "number of tokens in one forward pass", ge=1, changeable=True)
    apply_chat_template: bool = key(False, "use the chat template of sft or dpo", changeable=True)

    @model_validator(mode="after")
    def _check(self):
        if bool(self.every) != bool(self.names):
            raise ValueError(f"every={self.every} and names={','.join(self.names) or '[]'}: it takes both, or neither")
        return self


class EvaluationConfig(Section):
    """Held-out loss and bits per byte, per source, and benchmarks, inside the training loop."""

    every: int = key(0, "steps between evaluations; 0: never, not even at the end", ge=0, changeable=True)
    split: str = key("validation", "split of each training source that is held out", changeable=True)
    max_tokens: int = key(1_000_000, "approximate number of evaluated tokens of each source: the first ones of text, whose documents are shuffled; a random sample of dialogues and pairs", ge=1, changeable=True)
    rows_per_device: int = key(8, "rows of an evaluation batch on each device", ge=1, changeable=True)
    tasks: LoopTasksConfig = section(LoopTasksConfig, "benchmarks in the loop", changeable=True)


class SampleConfig(Section):
    """Text that the model writes during training."""

    every: int = key(0, "steps between samples; 0: never, not even at the end", ge=0, changeable=True)
    prompts: list[str] = key(["今天", "中国"], "prompts of the samples", changeable=True, prose=True)
    max_tokens: int = key(64, "tokens of a sample", ge=1, changeable=True)
    temperature: float = key(0.8, "0: always the likeliest token", ge=0, le=HIGHEST_TEMPERATURE, changeable=True)
    top_k: int | None = key(None, "sample from this many likeliest tokens", ge=1, le=MOST_TOP_K, changeable=True)
    top_p: float = key(0.95, "sample from the likeliest tokens that together have this probability", gt=0, le=1, changeable=True)


class CheckpointConfig(Section):
    """Checkpoints. A resumable step includes the optimizer state; a milestone has only weights."""

    every: int = key(1000, "steps between resumable checkpoints; the last step always has one", ge=1, changeable=True)
    keep_last: int = key(3, "newest resumable checkpoints kept", ge=1, changeable=True)
    keep_every: int | None = key(None, "also keep each resumable checkpoint whose step is a multiple of this", ge=1, changeable=True)
    milestones: list[float] = key([], "billions of trained tokens at which the weights are saved permanently", changeable=True)
    milestone_optimizer: bool = key(False, "also save the optimizer's state with milestones", changeable=True)
    verify: Literal["full", "size", "off"] = key("full", "how the step that a run resumes from is compared with its manifest: full (size and checksum of every file), size, off", changeable=True)
    tolerate_failures: int = key(0, "number of consecutive saves that may fail, with a warning; one more ends the run", ge=0, changeable=True)


class LogConfig(Section):
    """Output of metrics. metrics.jsonl is always written."""

    every: int = key(10, "steps between metrics", ge=1, changeable=True)
    tensorboard: bool = key(False, "also write TensorBoard events (extra: tb)", changeable=True)
    wandb_project: str | None = key(None, "also log to this project of Weights & Biases (extra: wandb)", changeable=True)
    report: bool = key(True, "write report.html at the end", changeable=True)


class PretrainConfig(Section):
    """A pretraining run."""

    run: RunConfig = section(RunConfig, "where the run lives", changeable=True)
    seed: int = key(42, "seed of the weights, the data order and the samples", ge=0, lt=2**32)
    steps: int = key(..., "optimizer steps", ge=1, changeable=True)
    processes: int = key(1, "processes on this machine, each with a GPU or a part of the CPU devices; on a cluster its launcher starts them, and this stays 1", ge=1, changeable=True)
    init: str | None = key(None, "MODEL whose weights the run starts from: a run directory, RUN@STEP, or a Hugging Face folder; null: random", changeable=True)
    allow_mismatch: bool = key(False, "start from an init whose architecture, tokenizer or template differs from what is trained here, and print the differences; false: refuse it", changeable=True)
    model: ModelConfig = key(..., "the architecture")
    compute: ComputeConfig = section(ComputeConfig, "how the model is computed")
    mesh: MeshConfig = section(MeshConfig, "devices along each axis")
    batch: BatchConfig = key(..., "the global batch")
    data: DataConfig = key(..., "the training data")
    loss: LossConfig = section(LossConfig, "the loss")
    optimizer: OptimizerConfig = key(..., "optimizer and schedule")
    lora: LoraConfig | None = key(None, "train low-rank adapters in addition to the frozen weights of init; null: train all weights")
    evaluation: EvaluationConfig = section(EvaluationConfig, "held-out loss in the loop")
    sample: SampleConfig = section(SampleConfig, "samples in the loop")
    checkpoint: CheckpointConfig = section(CheckpointConfig, "what is kept")
    bad_steps: BadStepsConfig = section(BadStepsConfig, "steps whose update is skipped, and what follows", changeable=True)
    watchdog: WatchdogConfig = section(WatchdogConfig, "what ends a run that hangs", changeable=True)
    distributed: DistributedConfig = section(DistributedConfig, "several processes", changeable=True)
    log: LogConfig = section(LogConfig, "what is shown")

    @model_validator(mode="after")
    def _check_lora(self):
        if self.lora is not None and self.init is None:
            raise ValueError("lora needs init: the MODEL whose weights stay as they are")
        return self

    @model_validator(mode="after")
    def _check_row(self):
        if self.model is not None:
            limit, keys = self.row_limit(self.model.context_length)
            if self.batch.sequence_length > limit:
                raise ValueError(f"batch.sequence_length={self.batch.sequence_length} is above {keys}")
        return self

    @model_validator(mode="after")
    def _check_warmup(self):
        if self.steps is not None and self.optimizer.warmup_steps >= self.steps and self.optimizer.schedule != "constant":
            raise ValueError(f"optimizer.warmup_steps={self.optimizer.warmup_steps} leaves no step of {self.steps} for schedule={self.optimizer.schedule}: lower optimizer.warmup_steps, or raise steps")
        return self

    def row_limit(self, context: int) -> tuple[int, str]:
        """The longest row that a model of this context can use, and the keys that it follows from."""
        return context, f"model.context_length={context}"

    @property
    def isolated(self) -> bool:
        """Whether attention and positions stop at the ends of documents."""
        return self.data.isolate_documents

    def tokens_at(self, step: int) -> int:
        """Tokens of `step` full batches, padding included; those trained, see `BatchSource.tokens_at`."""
        return step * self.batch.tokens
