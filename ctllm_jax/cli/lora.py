"""`launch.py lora merge RUN`: adapters and their base as one."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from ctllm_jax.config.errors import UserError
from ctllm_jax.config.lora import LoraMergeConfig

if TYPE_CHECKING:
    from ctllm_jax.cli import Context
    from ctllm_jax.training.checkpoints.checkpoint import Kept

ACTIONS = {"merge": LoraMergeConfig}
USAGE = """
usage: python launch.py lora merge RUN output=DIR [base=MODEL]

RUN is the directory of a run with adapters (sft or dpo with lora.rank=…), or RUN@STEP. It is a MODEL as it is, while
its base lies where it was. `merge` writes a run directory that needs no base:
  python launch.py lora merge runs/chat output=runs/chat-merged
(For PEFT: export-hf RUN output=DIR adapters=true.)
"""


def run(context: Context) -> int:
    """Run the action, and print the next commands."""
    from rich.text import Text

    if len(context.targets) != 1:
        raise UserError(f"lora {context.action} needs one RUN: the directory of a run with adapters, or RUN@STEP")
    model, output = context.targets[0], Path(context.config.output)
    from ctllm_jax.training.checkpoints.checkpoint import find_checkpoint

    _, kept = find_checkpoint(model)
    if kept.meta.get("lora") is None:
        raise UserError(f"{model} has no adapters: it is a whole model already")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"output={output} is there already: name a new directory")
    if context.dry_run:
        context.console.print(Text(f"would merge the adapters of {kept.run_dir} at step {kept.step} into"
                                   f" {output}"))
        return 0
    for line in merge(kept, output, context.config):
        context.console.print(Text(line))
    return 0


def merge(kept: Kept, output: Path, config: LoraMergeConfig) -> list[str]:
    """A run directory with one checkpoint: base and adapters as one."""
    from ctllm_jax.training.checkpoints.checkpoint import load_whole
    from ctllm_jax.training.lora import write_merged

    params = load_whole(kept, base=config.base)
    write_merged(kept, params, output)
    talks = kept.meta.get("template") is not None
    return [f"{output}@{kept.step}: the weights of {kept.run_dir} and of its base as one",
            f"next: python launch.py {'chat' if talks else 'generate'} {shlex.quote(str(output))}"]
