"""What a run prints at its start and at its end."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from ctllm_jax import sharding
from ctllm_jax.cluster import compilation_cache, distributed, xla_flags
from ctllm_jax.evaluation.curves import benchmark_charts
from ctllm_jax.report.goodput import goodput_line
from ctllm_jax.report.page import write_report
from ctllm_jax.report.run import read_run
from ctllm_jax.training.console import print_rows
from ctllm_jax.training.optimizer import describe_rules
from ctllm_jax.training.run import Run


def banner_rows(run: Run, start: dict[str, Any]) -> list[tuple[str, str]]:
    """What stands at the head of a run."""
    launch = distributed.detect(os.environ).describe()
    config = run.config
    adapted = "" if config.lora is None else ", which stay as they are"
    how = {"resume": f"resuming at step {run.start:,}", "init": f"from the weights of {config.init}{adapted}",
           "scratch": "from scratch"}[run.how]
    mesh = sharding.describe_mesh(start["mesh"])
    flops = start["flops_per_token"]
    tokens, room = run.data.tokens_at(config.steps), config.tokens_at(config.steps)
    padding = f" and {room - tokens:,} of padding" if tokens < room else ""
    rows = [("start", how), ("devices", f"{start['devices']}, mesh {mesh}; {launch}"),
            ("ops", ", ".join(f"{op}: {name}" for op, name in start["implementations"].items())),
            ("compiler", f"{xla_flags.describe_flags(os.environ)}; programs "
                         f"{compilation_cache.describe_directory(os.environ)}"),
            ("model", f"{start['parameters']:,} parameters, {flops['causal'] / 1e6:,.1f} MFLOPs a token causal,"
                      f" {flops['full'] / 1e6:,.1f} full"),
            ("batch", f"{'at most ' * bool(padding)}{config.batch.tokens:,} tokens a step = {config.batch.rows} rows of"
                      f" {config.batch.sequence_length:,}: {run.micro_rows} rows a device at once,"
                      f" {run.accumulation} accumulated"),
            ("run", f"{config.steps:,} steps, {tokens:,} tokens{padding};"
                    f" compiled in {run.compile_seconds:.1f} s")]
    if config.lora is not None:
        share = start["trained_parameters"] / start["parameters"]
        scale = f"{config.lora.alpha:g} / {'sqrt(' * config.lora.rslora}{config.lora.rank}{')' * config.lora.rslora}"
        rows.insert(5, ("lora", f"{start['trained_parameters']:,} parameters trained, {share:.2%} of the frozen ones:"
                                f" rank {config.lora.rank}, scale {scale} = {config.lora.scale:g}"))
    for source, tokens in start["tokens_per_source"].items():
        rows.append((f"source {source}", f"{tokens:,} tokens, {start['epochs'][source]:.2f} epochs"))
    return rows


def print_parameter_groups(run: Run, console: Console) -> None:
    """The table of what the optimizer's rules hit."""
    rows = [(f"lr {lr}, decay {decay}", f"{paths}  [{rule}]")
            for paths, lr, decay, rule in describe_rules(run.config.optimizer, run.state.params)]
    print_rows(console, rows, title="optimizer")


def print_goodput(directory: Path, console: Console) -> None:
    """Where the time went, over all attempts, in one line."""
    if line := goodput_line(read_run(directory)):
        console.print(Text(line), soft_wrap=True)


def finish(run: Run, console: Console, *, next_command: bool) -> None:
    """The report, and what to type next."""
    if run.config.log.report:
        page = write_report([run.directory], run.directory / "report.html",
                            benchmarks=benchmark_charts([run.directory]))
        console.print(Text(f"report: {page}"))
    if next_command and run.data.tokenizer_path is not None:
        prompt, directory = run.config.sample.prompts[0], shlex.quote(str(run.directory))
        # The shell reads Chinese as it is; quotes only where it would not.
        shown = prompt if prompt.isalnum() else shlex.quote(prompt)
        talks = getattr(run.data, "template", None) is not None
        command = f"chat {directory}" if talks else f"generate {directory} prompt={shown}"
        console.print(Text(f"next: python launch.py {command}"))
