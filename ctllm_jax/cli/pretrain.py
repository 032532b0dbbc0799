"""`launch.py pretrain CONFIG [key=value …]`: a model from scratch, or from the weights of another."""

from ctllm_jax.cli.training import run
from ctllm_jax.config.pretrain import PretrainConfig

__all__ = ["EXAMPLE", "SCHEMA", "TAKES_CONFIG", "TRAINS", "USAGE", "run"]

SCHEMA = PretrainConfig
TAKES_CONFIG = True
TRAINS = True
EXAMPLE = "configs/quickstart/pretrain.yaml"
USAGE = """
usage: python launch.py pretrain CONFIG [key=value …] [--dry-run | --print-config]

CONFIG is a file, or the name of one that comes with the package. The same command again goes on where the run stopped:
  python launch.py pretrain configs/quickstart/pretrain.yaml optimizer.lr=2e-3 run.dir=runs/try
  python launch.py pretrain configs/small/150m.yaml data=DIR --dry-run
  python launch.py pretrain configs/ct_llm_2b/pretrain.yaml data=synthetic steps=30 optimizer.warmup_steps=3
"""
