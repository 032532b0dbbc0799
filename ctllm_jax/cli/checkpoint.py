"""`launch.py checkpoint ls RUN`: what a run has kept."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ctllm_jax.config.base import Section
from ctllm_jax.config.errors import UserError

if TYPE_CHECKING:
    from ctllm_jax.cli import Context


class CheckpointListConfig(Section):
    """`ls` has no keys."""


ACTIONS = {"ls": CheckpointListConfig}
USAGE = """
usage: python launch.py checkpoint ls RUN

Every finished checkpoint of a run: resumable ones hold the optimizer too, milestones weights alone.
Each is a MODEL by the name RUN@STEP.
"""


def run(context: Context) -> int:
    """Print a table of the checkpoints of each run."""
    if not context.targets:
        raise UserError("checkpoint ls needs a run directory")
    from datetime import datetime

    from rich.table import Table

    from ctllm_jax.training.checkpoint import list_checkpoints

    # As wide as the names are: one that is cut cannot be given to another command.
    context.console.width = 1000
    for target in context.targets:
        kept = list_checkpoints(Path(target))
        if not kept:
            context.console.print(f"{target}: no checkpoint yet")
            continue
        table = Table("model", "kind", "tokens", "size", "written", title=target, title_justify="left")
        for checkpoint in kept:
            written = datetime.fromtimestamp(checkpoint.path.stat().st_mtime).isoformat(" ", "seconds")
            kind = checkpoint.kind + (", adapters" if checkpoint.meta.get("lora") else "")
            table.add_row(f"{target}@{checkpoint.step}", kind, f"{checkpoint.meta['tokens']:,}",
                          f"{checkpoint.size / 2**20:,.1f} MiB", written)
        context.console.print(table, soft_wrap=True)
    return 0
