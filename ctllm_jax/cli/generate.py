"""`launch.py generate MODEL prompt=…`: text from a trained model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ctllm_jax.config.errors import UserError
from ctllm_jax.config.generate import GenerateConfig

if TYPE_CHECKING:
    from ctllm_jax.cli import Context

SCHEMA = GenerateConfig
USAGE = """
usage: python launch.py generate MODEL [prompt=TEXT] [key=value …]

MODEL is a run directory (its newest checkpoint), or RUN@STEP:
  python launch.py generate runs/quickstart prompt=今天天气 temperature=0.7
  python launch.py generate runs/quickstart@500 prompt=@story.txt num_samples=4 top_k=50
  echo 从前 | python launch.py generate runs/quickstart prompt=-
"""


def run(context: Context) -> int:
    """Print the prompt and what the model writes behind it, one text after the other."""
    if len(context.targets) != 1:
        raise UserError("generate needs one MODEL: a run directory, or RUN@STEP")
    config = context.config
    from ctllm_jax.inference.model import load_model

    model = load_model(context.targets[0])
    room = model.decoder.config.context_length
    # A pipe ends with a newline that nobody meant.
    prompt = config.prompt.removesuffix("\n") if "prompt=-" in context.overrides else config.prompt
    if len(model.tokenizer.encode(prompt)) + config.max_tokens > room:
        context.console.print(f"[yellow]warning:[/] prompt and max_tokens={config.max_tokens} are longer than the"
                              f" {room} tokens that the model was trained on")
    texts = model.complete([prompt] * config.num_samples, max_tokens=config.max_tokens, seed=config.seed,
                           temperature=config.temperature, top_k=config.top_k, top_p=config.top_p)
    for index, text in enumerate(texts):
        if index:
            context.console.rule()
        context.console.out(prompt, style="bold", end="", highlight=False)
        context.console.out(text, highlight=False)
    return 0
