"""The trainer: `train(config)` is a whole run of a stage, without the command line."""

from typing import Any


def __getattr__(name: str) -> Any:
    if name == "train":
        from ctllm_jax.trainer.trainer import train

        return train
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
