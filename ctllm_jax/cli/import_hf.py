"""`launch.py import-hf DIR output=RUN`: a run directory from a Hugging Face model."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from ctllm_jax.config.errors import UserError
from ctllm_jax.config.huggingface import ImportConfig

if TYPE_CHECKING:
    from ctllm_jax.cli import Context

SCHEMA = ImportConfig
USAGE = """
usage: python launch.py import-hf DIR output=RUN [key=value …] [--dry-run]

DIR is a folder with config.json, safetensors and a tokenizer; LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM.
RUN is then a MODEL: weights in their own dtype, tokenizer, special ids, chat template. (DIR is one by itself, too:
every command that takes a MODEL takes it as it is.)
  python launch.py import-hf CT-LLM-Base output=runs/ct-llm-base
  python launch.py sft configs/quickstart/sft.yaml init=runs/ct-llm-base data=dialogues.jsonl
"""


def run(context: Context) -> int:
    """Convert the model, and print a summary and the next commands."""
    from rich.text import Text

    from ctllm_jax.cli.progress import stage_bars
    from ctllm_jax.huggingface.model import is_huggingface
    from ctllm_jax.huggingface.tokenizer import read_drawing

    if len(context.targets) != 1:
        raise UserError("import-hf needs one DIR: a Hugging Face folder")
    directory, config = Path(context.targets[0]), context.config
    output = Path(config.output)
    if not is_huggingface(directory):
        what = "is no directory" if not directory.is_dir() else (
            "is a run directory already" if (directory / "config.yaml").is_file() else "has no config.json")
        raise UserError(f"{directory} is no Hugging Face model: it {what}")
    from ctllm_jax.huggingface import model
    from ctllm_jax.model.parameters import count_parameters
    from ctllm_jax.training.conversion import check_new, import_model

    check_new(output)
    architecture = model.read_config(directory)
    told = f"{count_parameters(architecture):,} parameters, {architecture.vocab_size:,} ids in"
    if context.dry_run:
        model.open_weights(directory), model.read_meta(directory)
        context.console.print(Text(f"would import {directory} into {output}: {told} {architecture.padded_vocab_size:,}"
                                   " rows"))
        return 0
    with stage_bars(context.console) as progress:
        meta = import_model(directory, output, template=config.template, vocab_multiple=config.vocab_multiple,
                            progress=progress)
    from ctllm_jax.training.checkpoints.checkpoint import read_model_config

    rows = read_model_config(output).padded_vocab_size
    begins = "" if meta["prefix_id"] is None else f", and begins with id {meta['prefix_id']}"
    ends = "nothing that is known" if meta["eod_id"] is None else f"id {meta['eod_id']}"
    if len(meta["stop_ids"]) > 1:
        ends += f", a text also with id {', '.join(map(str, meta['stop_ids'][1:]))}"
    drawing = read_drawing(meta["generation"])
    for line in (f"{output}: {told} {rows:,} rows, read back bit for bit",
                 f"a document ends with {ends}{begins}; chat template: {'kept' if meta['template'] else 'none'}",
                 *([f"sampling: {', '.join(f'{name}={value}' for name, value in drawing.items())}"] if drawing else []),
                 f"next: python launch.py {'chat' if meta['template'] else 'generate'} {shlex.quote(str(output))}"):
        context.console.print(Text(line))
    return 0
