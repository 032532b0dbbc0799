"""What happens between the steps of a run: checkpoints, evaluation, benchmarks and samples."""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import jax

from ctllm_jax import sharding
from ctllm_jax.data.chat import Message
from ctllm_jax.data.tokenizer import load_tokenizer
from ctllm_jax.evaluation.bits_per_byte import evaluate_sources, make_evaluation_step
from ctllm_jax.evaluation.in_loop import make_benchmarks
from ctllm_jax.evaluation.preferences import evaluate_pairs
from ctllm_jax.inference.generate import generate
from ctllm_jax.inference.model import decode_completion, encode_prompts
from ctllm_jax.training.loop import Hook, every
from ctllm_jax.training.run import Run, make_decoder, place_batch


def make_hooks(run: Run, writer: Any, shown: Any, results: dict[str, Any], requests: Any, *,
               tasks: dict[str, Any] | None, journal: Any, beat: Any) -> list[Any]:
    """Checkpoints, held-out evaluation and samples, each at its own interval and at the last step, and what is asked
    for while the run goes. `beat` is called as a sign of life."""
    config, last = run.config, run.config.steps

    def save(step: int, state: Any) -> None:
        began = time.perf_counter()
        if not displaces(step) and run.checkpointer.save(state, step=step, last=is_wanted(step)):
            writer.event("checkpoint", step=step, seconds=time.perf_counter() - began)
        journal.goodput()

    def displaces(step: int) -> bool:  # asked twice: a step may be judged between the question and the hook
        # Skipped steps leave the weights as they were; what may be gone back to must not be displaced by them.
        return bool(run.recovery.watches and run.recovery.in_a_row) and not (
            is_wanted(step) or run.checkpointer.is_milestone(step))

    def is_due(step: int) -> bool:
        return not displaces(step) and run.checkpointer.is_due(step, last=is_wanted(step))

    def is_wanted(step: int) -> bool:
        return step == last or requests.save_due(step)

    begin_trace, end_trace = requests.trace_hooks()
    hooks = [end_trace, Hook(save, is_due, "checkpoint")]
    evaluate = make_evaluation(run, beat=beat) if config.evaluation.every else None
    if evaluate is not None:
        def evaluation_hook(step: int, state: Any) -> None:
            values = {"step": step, "tokens": run.data.tokens_at(step), **evaluate(run.weights(state))}
            results.update(values["sources"])
            writer.event("evaluation", **values)
            shown.evaluation(values)

        hooks.append(Hook(evaluation_hook, every(config.evaluation.every, last=last), "evaluation"))
    if tasks is not None:
        hooks.append(make_benchmarks_hook(run, tasks, writer, shown, beat=beat))
    if config.sample.every and run.data.tokenizer_path is not None:
        sample = make_sampler(run)

        def sample_hook(step: int, state: Any) -> None:
            for prompt, text in sample(run.weights(state), step):
                values = {"step": step, "tokens": run.data.tokens_at(step), "prompt": prompt, "text": text}
                writer.event("sample", **values)
                shown.sample(values)

        hooks.append(Hook(sample_hook, every(config.sample.every, last=last), "sample"))
    return [*hooks, begin_trace]


def make_evaluation(run: Run, *, beat: Any) -> Any:
    """`params -> {"sources": {source: figures}, …}` on what is held out of each; None where nothing is.

    `beat` is called for each batch."""
    config = run.config
    rows = config.evaluation.rows_per_device * sharding.axis_size(run.mesh, sharding.BATCH_AXES)
    sources = run.data.held_out(rows=rows, split=config.evaluation.split, max_tokens=config.evaluation.max_tokens)
    if not sources:
        return None
    decoder = run.decoder.clone(remat="none")
    make_loss_fn = run.objective.make_evaluation_fn or run.objective.make_loss_fn
    step = make_evaluation_step(make_loss_fn(config, decoder, run.mesh), out_sharding=sharding.replicated(run.mesh))
    local = sharding.local_rows(run.mesh, rows)
    place_global = partial(place_batch, sharding=sharding.batch_sharding(run.mesh), rows=rows)

    def place(batch: Any) -> Any:
        beat()
        return place_global(jax.tree.map(lambda x: x[local], batch))

    if run.objective.num_segments:
        return lambda params: evaluate_pairs(step, params, sources, place=place, describe=run.objective.describe)
    return lambda params: {"sources": evaluate_sources(step, params, sources, place=place)}


def make_benchmarks_hook(run: Run, tasks: dict[str, Any], writer: Any, shown: Any, *, beat: Any) -> Any:
    """Benchmarks of `open_loop_tasks`, at their interval and at the last step."""
    config, ask = run.config, make_benchmarks(run, tasks, beat=beat)

    def benchmarks_hook(step: int, state: Any) -> None:
        began = time.perf_counter()
        found = ask(run.weights(state), step)
        values = {"step": step, "tokens": run.data.tokens_at(step), "seconds": time.perf_counter() - began,
                  "tasks": found}
        writer.event("benchmarks", **values)
        shown.benchmarks(values)

    return Hook(benchmarks_hook, every(config.evaluation.tasks.every, last=config.steps), "evaluation")


def make_sampler(run: Run) -> Any:
    """`(params, step) -> [(prompt, text)]` with the prompts of the config."""
    config = run.config.sample
    tokenizer = load_tokenizer(run.data.tokenizer_path)
    template = getattr(run.data, "template", None)
    if template is None:
        prompts = encode_prompts(tokenizer, config.prompts, prefix_id=run.prefix_id, stop_id=run.data.eod_id)
        stop_ids = [] if run.data.eod_id is None else [run.data.eod_id]
    else:
        prompts = [template.prompt_ids([Message("user", prompt)]) for prompt in config.prompts]
        stop_ids = template.stop_ids
    stop_ids = [*stop_ids, *run.checkpointer.meta.get("stop_ids", ())]
    decoder = make_decoder(run.config).clone(remat="none")

    def sample(params: Any, step: int) -> list[tuple[str, str]]:
        new = generate(decoder, params, prompts, max_tokens=config.max_tokens, seed=run.config.seed + step,
                       temperature=config.temperature, top_k=config.top_k, top_p=config.top_p, stop_ids=stop_ids,
                       mesh=run.mesh, split=False)
        texts = [decode_completion(tokenizer, prompt, ids) for prompt, ids in zip(prompts, new, strict=True)]
        return list(zip(config.prompts, texts, strict=True))

    return sample
