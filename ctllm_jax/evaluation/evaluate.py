"""Run lm-eval's tasks on a local model, and add the settings and intervals to its results."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from ctllm_jax.evaluation import results
from ctllm_jax.evaluation.harness import HarnessModel

PACKAGES = ("ctllm-jax", "lm-eval", "jax", "jaxlib", "flax", "numpy", "sentencepiece", "tokenizers")


def run_tasks(lm: HarnessModel, task_dict: Mapping[str, Any], *, limit: float | None = None, chat: bool = False,
              multiturn: bool = True, system: str | None = None, seed: int = 1234,
              bootstrap: int = 1000) -> dict[str, Any]:
    """Return lm-eval's results of these tasks, with `samples`, and our part under `results.OURS`.

    Args:
      task_dict: from `tasks.open_tasks`, or from lm-eval's `TaskManager.load`.
      limit: questions of each task; below 1 their share; None: all.
      chat: use the chat template that the model was trained with.
      multiturn: with `chat`, examples are earlier turns of a dialogue, not a part of the question.
      system: system prompt.
      seed: seed of Python's and numpy's generators for tasks that draw random numbers.
      bootstrap: number of draws for standard errors of metrics that are not means; 0: no standard errors at all.
    """
    import lm_eval

    random.seed(seed)
    np.random.seed(seed)
    began, date = time.perf_counter(), time.time()
    with quietly():
        found = lm_eval.evaluate(lm, task_dict=task_dict, limit=limit, bootstrap_iters=bootstrap, log_samples=True,
                                 apply_chat_template=chat, fewshot_as_multiturn=chat and multiturn,
                                 system_instruction=system)
    info = lm.get_model_info()
    found["config"] = {
        "model": "ctllm_jax", "model_args": {"pretrained": str(lm.model.run_dir), "step": lm.model.step}, **info,
        "batch_size": None, "batch_sizes": [], "device": describe_device(), "use_cache": None, "limit": limit,
        "bootstrap_iters": bootstrap, "gen_kwargs": None, "random_seed": seed, "numpy_seed": seed, "torch_seed": None,
        "fewshot_seed": seed}
    found |= {"date": date, "lm_eval_version": importlib.metadata.version("lm-eval"), "model_source": "ctllm_jax",
              "model_name": str(lm.model.run_dir), "system_instruction": system, "max_length": lm.max_length,
              "eot_token_id": lm.eot_token_id, "fewshot_as_multiturn": chat and multiturn,
              "chat_template": lm.chat_template(True) if chat else None,
              "total_evaluation_time_seconds": str(time.perf_counter() - began)}
    found[results.OURS] = describe(lm, chat=chat) | {
        "limit": limit, "seed": seed, "seconds": time.perf_counter() - began, "counts": dict(lm.scorer.counts),
        "intervals": results.intervals(found), "chance": results.chance(found)}
    return found


def describe(lm: HarnessModel, *, chat: bool) -> dict[str, Any]:
    """The settings that two evaluations must share for their figures to be comparable."""
    model = lm.model
    return {
        "wording": "lm-eval", "checkpoint": {"run": str(model.run_dir), "step": model.step},
        "tokenizer": {"file": model.tokenizer.path.name, "sha256": model.tokenizer.sha256,
                      "ids": model.tokenizer.vocab_size},
        "template": {"kind": model.template.kind, "fingerprint": model.template.fingerprint()} if chat else None,
        "prefix": {"id": lm.prefix_token_id, "source": lm.prefix_source,
                   "before_every_context": model.prefix_id is not None and not chat},
        "dtype": str(np.dtype(model.decoder.dtype)), "max_length": lm.max_length,
        "mesh": None if model.mesh is None else dict(model.mesh.shape), "device": describe_device(),
        "versions": versions()}


def versions() -> dict[str, str]:
    """Versions of Python, and of the installed packages that figures may depend on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def describe_device() -> str:
    """`8 x TPU v5 lite`."""
    import jax

    return f"{jax.device_count()} x {jax.devices()[0].device_kind}"


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Without lm-eval's progress bar for each of CMMLU's 67 tasks, and without forks of a process that has threads."""
    from lm_eval.api import task

    def plain(items: Sequence[Any], **options: Any) -> Sequence[Any]:
        return items

    bar, forks = task.tqdm, os.environ.get("DISABLE_MULTIPROC")
    task.tqdm, os.environ["DISABLE_MULTIPROC"] = plain, "1"
    try:
        yield
    finally:
        task.tqdm = bar
        if forks is None:
            del os.environ["DISABLE_MULTIPROC"]
        else:
            os.environ["DISABLE_MULTIPROC"] = forks
