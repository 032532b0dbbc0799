"""`launch.py export-hf MODEL output=DIR`: a Hugging Face model, or adapters for PEFT."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from ctllm_jax.config.errors import UserError
from ctllm_jax.config.huggingface import ExportConfig
from ctllm_jax.storage import open_path

if TYPE_CHECKING:
    from ctllm_jax.cli import Context

SCHEMA = ExportConfig
USAGE = """
usage: python launch.py export-hf MODEL output=DIR [key=value …] [--dry-run]

DIR gets safetensors, config.json, generation_config.json, the tokenizer and its chat template, as transformers (4 and
5), vLLM and others load them. What is written is read back and compared, and the tokenizer is tried, before DIR exists.
  python launch.py export-hf runs/chat output=chat-hf dtype=bfloat16
  python launch.py export-hf runs/chat-lora output=chat-hf
  python launch.py export-hf runs/chat-lora output=chat-peft adapters=true base_model=m-a-p/CT-LLM-Base
"""


def run(context: Context) -> int:
    """Write the export, and print its summary."""
    from rich.text import Text

    from ctllm_jax.cli.progress import stage_bars

    if len(context.targets) != 1:
        raise UserError("export-hf needs one MODEL: a run directory, RUN@STEP, or a Hugging Face folder")
    config, output = context.config, Path(context.config.output)
    from ctllm_jax.training.checkpoints.checkpoint import find_checkpoint
    from ctllm_jax.training.conversion import check_new, export_adapters, export_model
    from ctllm_jax.training.joins import check_base_model
    from ctllm_jax.training.tuning import open_text

    _, kept = find_checkpoint(context.targets[0])
    check_new(output)
    if config.adapters and kept.meta.get("lora") is None:
        raise UserError(f"adapters=true: {context.targets[0]} has no adapters, it is a whole model")
    base_model = config.base_model or (kept.meta["init"]["path"] if config.adapters else None)
    if config.base_model is not None:
        check_base_model(kept, base_model, base=config.base, allow=config.allow_mismatch)
    if context.dry_run:
        what = "the adapters" if config.adapters else "the model"
        context.console.print(Text(f"would export {what} of {kept.run_dir} at step {kept.step} to {output}"))
        return 0
    if config.adapters:
        count = export_adapters(kept, output, base_model=base_model)
        context.console.print(Text(f"{output}: the adapters of {kept.run_dir} at step {kept.step}, for the base model"
                                   f" {base_model}; {count} tensors read back bit for bit"))
        if (open_path(base_model) / "config.yaml").is_file():
            context.console.print(Text(f"note: PEFT cannot read a run directory: export {base_model} with export-hf,"
                                       " and give that folder as base_model"))
        return 0
    tokenizer, template = open_text(kept)
    with stage_bars(context.console) as progress:
        made = export_model(kept, output, tokenizer=tokenizer, template=template, dtype=config.dtype,
                            cut=config.padding == "cut", shard_bytes=int(config.shard_gb * 1e9), base=config.base,
                            progress=progress)
    shown = shlex.quote(str(output))
    files = f"{made.files} file{'s' * (made.files != 1)}"
    lines = [f"{output}: {made.tensors} tensors, {made.nbytes / 1e9:,.2f} GB of {made.dtype} in {files}, read back bit"
             f" for bit; {made.rows:,} rows for {made.ids:,} ids",
             "tokenizer: the same ids for every probe; chat template: " + ("written" if template else "none"),
             *(f"note: {note}" for note in made.notes),
             f"next: transformers.AutoModelForCausalLM.from_pretrained({str(output)!r}), or vllm serve {shown}"]
    for line in lines:
        context.console.print(Text(line))
    return 0
