"""`launch.py dpo CONFIG [key=value …]`: a model that answers learns which answers are preferred."""

from ctllm_jax.cli.training import run
from ctllm_jax.config.dpo import DPOConfig

__all__ = ["EXAMPLE", "SCHEMA", "TAKES_CONFIG", "TRAINS", "USAGE", "run"]

SCHEMA = DPOConfig
TAKES_CONFIG = True
TRAINS = True
EXAMPLE = "configs/quickstart/dpo.yaml"
USAGE = """
usage: python launch.py dpo CONFIG init=MODEL data=FILE [key=value …] [--dry-run | --print-config]

Pairs (TRL, ShareGPT ranking, Alpaca with two outputs, UltraFeedback, HH; JSONL, JSON, Parquet) are packed into rows,
both answers of a pair in one. MODEL was tuned by sft; its architecture, tokenizer and template are taken over, and it
is the reference: its log-probabilities are computed once and kept beside the pairs, for all runs that need the same.
The same command goes on where the run stopped:
  python launch.py dpo configs/quickstart/dpo.yaml init=runs/chat data=pairs.jsonl run.dir=runs/preferred
  python launch.py dpo configs/ct_llm_2b/dpo.yaml init=runs/ct_llm_2b-sft_2_1 --dry-run
"""
