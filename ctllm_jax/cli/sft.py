"""`launch.py sft CONFIG [key=value …]`: a pretrained model learns to answer."""

from ctllm_jax.cli.training import run
from ctllm_jax.config.sft import SFTConfig

__all__ = ["EXAMPLE", "SCHEMA", "TAKES_CONFIG", "TRAINS", "USAGE", "run"]

SCHEMA = SFTConfig
TAKES_CONFIG = True
TRAINS = True
EXAMPLE = "configs/quickstart/sft.yaml"
USAGE = """
usage: python launch.py sft CONFIG init=MODEL data=FILE [key=value …] [--dry-run | --print-config]

Dialogues (ShareGPT, Alpaca, messages, prompt/completion; JSONL, JSON, Parquet) are packed into rows, each a segment of
its own; only answers are learned. MODEL is a run directory, or RUN@STEP; its architecture and tokenizer are taken over.
The same command goes on where the run stopped:
  python launch.py sft configs/quickstart/sft.yaml init=runs/quickstart data=dialogues.jsonl run.dir=runs/chat
  python launch.py sft configs/ct_llm_2b/sft_2_1.yaml init=runs/ct_llm_2b --dry-run
"""
