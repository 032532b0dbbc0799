"""`launch.py plan CONFIG budget=… topology=…`: the run that a budget of time or tokens buys."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ctllm_jax.config.plan import PlanConfig

if TYPE_CHECKING:
    from ctllm_jax.cli import Context

SCHEMA = PlanConfig
TAKES_CONFIG = True
EXAMPLE = "configs/small/1b.yaml"
USAGE = """
usage: python launch.py plan CONFIG budget=TIME|TOKENS topology=NAME [key=value …]

Sets steps, warm-up and the schedule of CONFIG to what the budget buys on that hardware, and says where FLOPs, hours and
room go. Nothing is started; the last line is the command that would start it:
  python launch.py plan configs/small/1b.yaml budget=36h topology=h100:8
  python launch.py plan configs/ct_llm_2b/pretrain.yaml budget=40B topology=v5p-256 mfu=0.5 price=4.2
"""
_OWN = ("budget", "topology", "mfu", "price", "output")


def run(context: Context) -> int:
    """Print the plan, and write it where asked."""
    from rich.text import Text

    from ctllm_jax.cluster.topology import parse_topology
    from ctllm_jax.preflight.budget import fit
    from ctllm_jax.training.console import print_rows

    config, console, target = context.config, context.console, context.targets[0]
    topology = parse_topology(config.topology)
    plan = fit(config, topology)
    rows = [("hardware", topology.describe()),
            ("run", f"{plan.steps:,} steps of {config.batch.tokens:,} tokens = {plan.tokens:,} tokens"),
            ("time", f"{plan.seconds / 3600:,.1f} h at {config.mfu:.0%} MFU, "
                     f"{plan.seconds / plan.steps:,.2f} s a step, {plan.tokens / plan.seconds:,.0f} tokens/s"),
            ("keys", "  ".join(f"{name}={value}" for name, value in plan.overrides.items())), *plan.drivers]
    print_rows(console, rows, title=f"plan of {config.budget} on {config.topology}")
    given = [word for word in context.overrides if word.partition("=")[0] not in _OWN
             and word.partition("=")[0] not in plan.overrides]
    if config.output and context.dry_run:
        console.print(Text(f"would write {config.output}"))
        return 0
    if config.output:
        write(Path(config.output), target, plan, config)
        command = f"python launch.py pretrain {shlex.quote(config.output)} {shlex.join(given)}"
    else:
        keys = [f"{name}={value}" for name, value in plan.overrides.items()]
        command = f"python launch.py pretrain {shlex.join([target, *keys, *given])}"
    console.print(Text(f"next: {command.strip()}"))
    return 0


def write(path: Path, target: str, plan: Any, config: PlanConfig) -> None:
    """A config that extends the target by the keys of the plan."""
    import os

    import yaml

    from ctllm_jax.config.load import find_config

    tree: dict[str, Any] = {"extends": os.path.relpath(find_config(target), path.resolve().parent)}
    for name, value in plan.overrides.items():
        node = tree
        *sections, leaf = name.split(".")
        for section in sections:
            node = node.setdefault(section, {})
        node[leaf] = value
    head = (f"# {plan.tokens:,} tokens: {config.budget} on {config.topology} at {config.mfu:.0%} MFU, "
            f"{plan.seconds / 3600:,.1f} h.\n#   python launch.py pretrain {path}\n")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(head + yaml.safe_dump(tree, sort_keys=False, allow_unicode=True), encoding="utf-8")
