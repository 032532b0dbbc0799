"""`launch.py doctor [CONFIG] [key=value …]`: what would stop a run here, each with its fix."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ctllm_jax.cli.outputs import check_writable
from ctllm_jax.config.doctor import DoctorConfig
from ctllm_jax.config.errors import UserError
from ctllm_jax.config.load import load
from ctllm_jax.config.load import to_yaml as section_to_yaml
from ctllm_jax.config.pretrain import PretrainConfig, default_run_dir
from ctllm_jax.config.stages import STAGES

if TYPE_CHECKING:
    from ctllm_jax.cli import Context

SCHEMA = DoctorConfig
USAGE = """
usage: python launch.py doctor [CONFIG] [stage=pretrain|sft|dpo] [key=value …] [output=FILE]

Looks at this machine, and with CONFIG at what the run needs of it: versions, driver, processes and their network,
XLA's flags, devices, the implementation of every op, memory, dataset, tokenizer, room for two checkpoints, clock. A
line each: ok, warn or fail, with the fix. Nothing is started, no check can hang. Exit status 1 where something fails.
Keys other than the doctor's own are those of the stage:
  python launch.py doctor
  python launch.py doctor configs/small/150m.yaml data=DIR run.dir=runs/150m
"""
_COLORS = {"ok": "green", "warn": "yellow", "fail": "bold red"}


class Doctor(NamedTuple):
    """What is asked: the doctor's own keys, and the run, where there is one."""

    own: DoctorConfig
    config: PretrainConfig | None


def configure(action: str | None, words: Sequence[str], overrides: Sequence[str]) -> Doctor:
    """Keys sorted into the doctor's and the run's, all checked; called before `run`."""
    own = [word for word in overrides if word.partition("=")[0] in DoctorConfig.model_fields]
    theirs = [word for word in overrides if word not in own]
    doctor = load(DoctorConfig, overrides=own)
    if len(words) > 1:
        raise UserError(f"doctor takes one config; {' '.join(words[1:])} is left over (a key is written key=value)")
    if not words:
        if theirs:
            raise UserError(f"{theirs[0]}: a key of a run, and no CONFIG is given, such as configs/small/150m.yaml")
        return Doctor(doctor, None)
    config = load(STAGES[doctor.stage].schema, target=words[0], overrides=theirs)
    if not config.run.dir:
        config = config.model_copy(update={"run": config.run.model_copy(update={"dir": default_run_dir(words[0])})})
    return Doctor(doctor, config)


def to_yaml(doctor: Doctor) -> str:
    """The doctor's keys, and the run's config."""
    run = "" if doctor.config is None else f"--- # {doctor.own.stage}\n{section_to_yaml(doctor.config)}"
    return f"--- # doctor\n{section_to_yaml(doctor.own)}{run}"


def run(context: Context) -> int:
    """Examine, print, write; the exit status: 1 where something fails."""
    from ctllm_jax.cluster import compilation_cache, xla_flags
    from ctllm_jax.preflight.doctor import examine
    from ctllm_jax.preflight.findings import FAIL, Subject, as_json, worst

    own, config = context.config
    if own.output:
        check_writable(own.output, f"output={own.output}", kind="file")
    environment = dict(os.environ)
    xla_flags.set_flags(environment, "auto" if config is None else config.compute.xla_flags)
    if config is not None:
        compilation_cache.set_directory(environment, config.compute.compilation_cache, run_dir=config.run.dir)
    findings = []
    with context.console.status("") as status:
        for each in examine(Subject(config, own.stage, environment), seconds=own.timeout,
                            tell=lambda name: status.update(f"{name} …")):
            findings.append(each)
    show(findings, context.console)
    if own.output:
        Path(own.output).parent.mkdir(parents=True, exist_ok=True)
        Path(own.output).write_text(json.dumps({"command": context.command_line, "status": worst(findings),
                                                "findings": as_json(findings)}, indent=1, ensure_ascii=False),
                                    encoding="utf-8")
        context.console.print(f"written: {own.output}", markup=False)
    return 1 if worst(findings) == FAIL else 0


def show(findings: list[Any], console: Any) -> None:
    """A table for a person; on a pipe a line each, the fix below."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    if console.is_terminal:
        table = Table("", "", box=box.SIMPLE, show_header=False, pad_edge=False, padding=(0, 1, 0, 0))
        table.add_column(overflow="fold")
        for each in findings:
            text = Text(each.text)
            if each.fix:
                text.append(f"\nfix: {each.fix}", style="bold")
            table.add_row(Text(each.status, style=_COLORS[each.status]), Text(each.check, style="dim"), text)
        console.print(table)
    else:
        for each in findings:
            console.print(Text(f"{each.status:<4}  {each.check:<11}  {each.text}"))
            if each.fix:
                console.print(Text(f"{'':<19}fix: {each.fix}"))
    counts = {status: sum(each.status == status for each in findings) for status in _COLORS}
    console.print(", ".join(f"{count} {status}" for status, count in counts.items() if count))
