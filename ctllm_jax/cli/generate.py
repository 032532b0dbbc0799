"""`launch.py generate MODEL prompt=…`: text from a trained model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ctllm_jax.config.errors import UserError
from ctllm_jax.config.generate import GenerateConfig

if TYPE_CHECKING:
    from ctllm_jax.cli import Context
    from ctllm_jax.inference.model import Model

SCHEMA = GenerateConfig
USAGE = """
usage: python launch.py generate MODEL [prompt=TEXT] [key=value …]

MODEL is a run directory (its newest checkpoint), or RUN@STEP:
  python launch.py generate runs/quickstart prompt=今天天气 temperature=0.7
  python launch.py generate runs/quickstart@500 prompt=@story.txt num_samples=4 top_k=50
  echo 从前 | python launch.py generate runs/quickstart prompt=-
A file of prompts, JSON lines with prompt or messages, to a file of texts; the same command continues where it stopped:
  python launch.py generate runs/chat prompts=questions.jsonl output=answers.jsonl num_samples=2
"""


def run(context: Context) -> int:
    """Print the prompt and the model's continuations, one after the other; or write them to a file."""
    if len(context.targets) != 1:
        raise UserError("generate needs one MODEL: a run directory, or RUN@STEP")
    config = context.config
    if config.prompts is not None and not Path(config.prompts).is_file():
        raise UserError(f"prompts={config.prompts} is no file")
    from ctllm_jax.inference.model import load_model

    model = load_model(context.targets[0], dtype=config.dtype)
    context.config = config = model.drawn_as(config)
    if config.prompts is not None:
        return _write_file(context, model)
    room = model.decoder.config.context_length
    # A pipe ends with a newline that nobody meant.
    prompt = config.prompt.removesuffix("\n") if "prompt=-" in context.overrides else config.prompt
    if len(model.tokenizer.encode(prompt)) + config.max_tokens > room:
        context.console.print(f"[yellow]warning:[/] prompt and max_tokens={config.max_tokens} are longer than the"
                              f" {room} tokens that the model was trained on")
    texts = model.complete([prompt] * config.num_samples, max_tokens=config.max_tokens, seed=config.seed,
                           temperature=config.temperature, top_k=config.top_k, top_p=config.top_p, min_p=config.min_p,
                           repetition_penalty=config.repetition_penalty, stop=tuple(config.stop))
    for index, text in enumerate(texts):
        if index:
            context.console.rule()
        context.console.out(prompt, style="bold", end="", highlight=False)
        context.console.out(text, highlight=False)
    return 0


def _write_file(context: Context, model: Model) -> int:
    """`prompts` to `output`, with a bar."""
    from rich.markup import escape

    from ctllm_jax.cli.progress import count_bar
    from ctllm_jax.inference.pair_file import PairFile
    from ctllm_jax.inference.serving.completions import complete_file, read_items, settings_of

    config, console = context.config, context.console
    items = read_items(config.prompts, model, num_samples=config.num_samples)
    with PairFile(config.output, settings_of(config, model)) as file:
        done = sum(item.key in file.done for item in items)
        if done:
            console.print(f"going on: {done:,} of {len(items):,} texts are there")
        with count_bar(console, "texts", total=len(items), done=done) as advance:
            new = complete_file(config, model, items, file=file, advance=advance)
    console.print(f"{escape(str(file.path))}: {file.pairs:,} texts, {new:,} of them new")
    return 0
