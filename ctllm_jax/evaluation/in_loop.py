"""Benchmarks during training: multiple choice by log-probability, on the mesh, on every process.

Evaluation does not change the training state: a run is bit for bit the same with and without it. Tasks draw their own
random numbers, and the states of Python's and numpy's generators are restored.
"""

from __future__ import annotations

import contextlib
import importlib.util
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ctllm_jax.config.errors import UserError
from ctllm_jax.config.pretrain import LoopTasksConfig, PretrainConfig

if TYPE_CHECKING:
    from ctllm_jax.training.run import Run

SEED = 1234
"""Seed of sampled examples: the default of lm-eval and of `evaluate`."""
_CHOOSING = ("multiple_choice", "loglikelihood")
_FIELD = "evaluation.tasks"


def open_loop_tasks(config: PretrainConfig) -> dict[str, Any] | None:
    """The tasks of a run, opened before its model is compiled; None if it has none.

    Raises:
      UserError: lm-eval is not installed, a name is unknown, questions are missing, a task generates text, or the run
        has no text.
    """
    wanted = config.evaluation.tasks
    if not wanted.every:
        return None
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError(f"{_FIELD} needs lm-eval: pip install 'ctllm-jax[eval]'")
    if getattr(config.data, "kind", None) == "synthetic":
        raise UserError(f"{_FIELD}.names={','.join(wanted.names)}: data=synthetic has no tokenizer to ask with")
    if wanted.apply_chat_template and type(config) is PretrainConfig:
        raise UserError(f"{_FIELD}.apply_chat_template=true: pretraining teaches no template")
    from ctllm_jax.evaluation.tasks import open_tasks

    try:
        opened = open_tasks(wanted.names, data=wanted.data and Path(wanted.data), num_fewshot=wanted.num_fewshot,
                            seed=SEED)
    except UserError as error:
        raise UserError(f"{_FIELD}: {error}") from None
    for name, task in opened["tasks"].items():
        if task.OUTPUT_TYPE not in _CHOOSING:
            raise UserError(f"{_FIELD}.names: the answers of {name} are written, which takes long in a loop; python "
                            "launch.py evaluate asks it of checkpoints")
    return opened


def make_benchmarks(run: Run, opened: dict[str, Any], *,
                    beat: Callable[[], None] = lambda: None) -> Callable[[Any, int], dict[str, dict[str, Any]]]:
    """`(params, step) -> task -> figure`, in the form of `figures.to_event`.

    Args:
      opened: of `open_loop_tasks`.
      beat: called for each answer, as a heartbeat.
    """
    import lm_eval

    from ctllm_jax.data.tokenizer import load_tokenizer
    from ctllm_jax.evaluation import results
    from ctllm_jax.evaluation.evaluate import quietly
    from ctllm_jax.evaluation.figures import to_event
    from ctllm_jax.evaluation.harness import HarnessModel
    from ctllm_jax.inference.model import Model
    from ctllm_jax.training.run import make_decoder

    wanted: LoopTasksConfig = run.config.evaluation.tasks
    tokenizer, decoder = load_tokenizer(run.data.tokenizer_path), make_decoder(run.config).clone(remat="none")
    template = getattr(run.data, "template", None)

    @contextlib.contextmanager
    def bar(noun: str, *, total: int, done: int) -> Iterator[Callable[[], None]]:
        yield beat

    def ask(params: Any, step: int) -> dict[str, dict[str, Any]]:
        model = Model(decoder, params, tokenizer, run.prefix_id, run.data.eod_id, run.directory, step, template,
                      run.mesh if run.mesh.size > 1 else None)
        lm = HarnessModel(model, batch_tokens=wanted.batch, bar=bar)
        for task in opened["tasks"].values():
            task.set_fewshot_seed(seed=SEED)
        with _own_generators(), quietly():
            found = lm_eval.evaluate(lm, task_dict=opened, limit=wanted.limit, bootstrap_iters=0, log_samples=True,
                                     apply_chat_template=wanted.apply_chat_template,
                                     fewshot_as_multiturn=wanted.apply_chat_template)
        found[results.OURS] = {
            "intervals": results.intervals(found), "chance": results.chance(found), "max_length": lm.max_length,
            "template": wanted.apply_chat_template, "wording": "lm-eval"}
        return to_event(found, wanted.names)

    return ask


@contextlib.contextmanager
def _own_generators() -> Iterator[None]:
    """Restore the states of Python's and numpy's random generators afterwards."""
    before = random.getstate(), np.random.get_state()
    random.seed(SEED)
    np.random.seed(SEED)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
