"""`launch.py pretrain CONFIG [key=value …]`: wires evaluation, samples, checkpoints and the report into the loop."""

from __future__ import annotations

import os
import shlex
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ctllm_jax.cli.processes import join, run_in_processes
from ctllm_jax.config.errors import UserError
from ctllm_jax.config.pretrain import PretrainConfig, default_run_dir
from ctllm_jax.storage import open_path

if TYPE_CHECKING:
    from ctllm_jax.cli import Context
    from ctllm_jax.training.pretrain import Run

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


def run(context: Context) -> int:
    """Train, or with --dry-run say what that would take."""
    config = with_run_dir(context.config, context.targets[0])
    if context.dry_run:
        return dry_run(config, context.console)
    if (status := run_in_processes(context)) is not None:
        return status
    train(config, context.console, began=context.began)
    return 0


def with_run_dir(config: PretrainConfig, target: str) -> PretrainConfig:
    """The config with a run directory: its own, or runs/ and the config's name."""
    if config.run.dir:
        return config
    return config.model_copy(update={"run": config.run.model_copy(update={"dir": default_run_dir(target)})})


def dry_run(config: PretrainConfig, console: Any) -> int:
    """Print what a run will take; the data is opened where it can be."""
    from rich.markup import escape

    from ctllm_jax.data.pretrain import open_training_data
    from ctllm_jax.evaluation.in_loop import open_loop_tasks
    from ctllm_jax.preflight import plan
    from ctllm_jax.training.console import print_rows
    from ctllm_jax.training.joins import checked_start

    open_loop_tasks(config)
    warnings, epochs, tokens, data = [], None, None, None
    try:
        data = open_training_data(config.data, sequence_length=config.batch.sequence_length, rows=config.batch.rows,
                                  seed=config.seed, vocab_size=config.model.vocab_size)
        epochs, tokens = data.epochs(config.steps), data.tokens_per_source(config.steps)
    except UserError as error:
        warnings.append(f"epochs per source are not known: {error}")
    checked_start(config, data)
    import jax

    devices = jax.devices()
    kind = None if devices[0].platform == "cpu" else devices[0].device_kind
    rows, more = plan.describe(config, directory=open_path(config.run.dir), epochs=epochs, tokens_per_source=tokens,
                               device_kind=kind, devices=len(devices))
    print_rows(console, rows, title=f"plan of {config.run.dir} (nothing was started)")
    for warning in warnings + more:
        console.print(f"[yellow]warning:[/] {escape(warning)}")
    return 0


def train(config: PretrainConfig, console: Any, *, next_command: bool = True, name: str = "pretrain", data: Any = None,
          meta: dict[str, Any] | None = None, objective: Any = None, signals: Any = None,
          began: float | None = None, tasks: dict[str, Any] | None = None) -> dict[str, Any]:
    """A whole run; returns its last evaluation per source (empty without one).

    `name`, `data`, `meta` and `objective` are another stage's: its name, its batches, what its checkpoints say of
    themselves, and its loss. `signals` are those of a stage that had to be told of them before, and owns the run
    directory; `began` is when the run did, by `time.perf_counter`; None: now. `tasks` are those of `open_loop_tasks`,
    if they are open.

    Raises:
      Stopped: the run was ended before its last step, and is kept; its code is the exit status.
      Diverged: steps stay bad after every rollback.
    """
    began = time.perf_counter() if began is None else began
    join(config, command=name)
    from ctllm_jax.evaluation.in_loop import open_loop_tasks
    from ctllm_jax.training.supervision.lock import own
    from ctllm_jax.training.supervision.signals import Signals

    tasks = tasks or open_loop_tasks(config)
    if signals is None:
        with Signals() as signals, own(config.run, what=name):
            return train(config, console, next_command=next_command, name=name, data=data, meta=meta,
                         objective=objective, signals=signals, began=began, tasks=tasks)
    import jax
    from rich.markup import escape

    from ctllm_jax.cli.journal import Journal
    from ctllm_jax.training.console import TrainingConsole, print_rows
    from ctllm_jax.training.guard import count_skipped
    from ctllm_jax.training.metrics import MetricsWriter
    from ctllm_jax.training.pretrain import prepare_run
    from ctllm_jax.training.records import describe_run, make_record
    from ctllm_jax.training.supervision.goodput import Ledger
    from ctllm_jax.training.supervision.recovery import Diverged
    from ctllm_jax.training.supervision.requests import Requests
    from ctllm_jax.training.supervision.signals import Stopped
    from ctllm_jax.training.supervision.watchdog import Watchdog

    if config.processes not in (1, jax.process_count()):
        raise UserError(f"processes={config.processes}: pretrain, sft and dpo start processes; this runs in"
                        f" {jax.process_count()}")
    directory = open_path(config.run.dir)
    first = jax.process_index() == 0
    stage = (lambda text: console.print(f"[dim]{escape(text)} …[/]")) if first else (lambda text: None)
    ledger, journal = Ledger(began=began), Journal()
    with Watchdog(config.watchdog, heartbeat_seconds=config.distributed.heartbeat_seconds, directory=directory,
                  ledger=ledger, tell=journal.end) as watchdog:
        run = prepare_run(config, directory=directory, stage=stage, data=data, meta=meta, objective=objective,
                          ledger=ledger)
        start = describe_run(run)
        if first:
            print_rows(console, banner_rows(run, start), title=f"{name} {directory}")
            print_treatments(run, console)
        results: dict[str, Any] = {}
        with (MetricsWriter(directory, tensorboard=config.log.tensorboard, wandb_project=config.log.wandb_project,
                            config=start["config"], steps=config.steps) as writer,
              TrainingConsole(console if first else None, total_steps=config.steps) as shown):
            writer.event("start", **start)
            journal.open(writer, shown, ledger=ledger, make=make_record(run), step=run.start,
                         skipped=count_skipped(run.state), damage=getattr(run.data, "damage", None))
            requests = Requests(directory, signals, tell=journal.request)
            signals.begin(shown.message)

            def listen() -> None:
                run.checkpointer.listen(shown.message, record=lambda text: writer.event("warning", message=text))

            def rolled_back(rollback: Any) -> None:
                journal.rolled_back(rollback)
                listen()  # after a rollback it is another one

            listen()
            try:
                reached = run.train(
                    record=journal.train, stop_due=requests.stop_due, ledger=ledger, dispatched=watchdog.dispatched,
                    rolled_back=rolled_back,
                    hooks=make_hooks(run, writer, shown, results, requests, tasks=tasks, journal=journal,
                                     beat=watchdog.beat))
            except (KeyboardInterrupt, Stopped):
                journal.end(signals.reason or "interrupted")
                raise
            except Diverged as diverged:
                journal.end("diverged", diverged.message)
                raise
            except BaseException as error:
                if isinstance(error, UserError):
                    watchdog.leave(error.status)
                watchdog.await_verdict(error)
                with suppress(OSError):  # of a full disk, say, which may be the error itself
                    journal.end("failed")
                raise
            finally:
                requests.close(journal.step)
            journal.end("done" if reached == config.steps else requests.reason, step=reached)
    if first:
        print_goodput(directory, console)
    if reached < config.steps:
        if first:
            console.print(f"stopped at step {reached:,} of {config.steps:,}, which is kept: the same command goes on")
        raise Stopped(requests.reason)
    if first:
        finish(run, console, next_command=next_command)
    return results


def make_hooks(run: Run, writer: Any, shown: Any, results: dict[str, Any], requests: Any, *,
               tasks: dict[str, Any] | None, journal: Any, beat: Any) -> list[Any]:
    """Checkpoints, held-out evaluation and samples, each at its own interval and at the last step, and what is asked
    for while the run goes. `beat` is called as a sign of life."""
    from ctllm_jax.training.loop import Hook, every

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
    from functools import partial

    import jax

    from ctllm_jax import sharding
    from ctllm_jax.evaluation.bits_per_byte import evaluate_sources, make_evaluation_step
    from ctllm_jax.evaluation.preferences import evaluate_pairs
    from ctllm_jax.training.pretrain import make_loss_fn, place_batch

    config = run.config
    rows = config.evaluation.rows_per_device * sharding.axis_size(run.mesh, sharding.BATCH_AXES)
    sources = run.data.held_out(rows=rows, split=config.evaluation.split, max_tokens=config.evaluation.max_tokens)
    if not sources:
        return None
    decoder = run.decoder.clone(remat="none")
    if run.objective is None:
        loss_fn = make_loss_fn(config, decoder, mesh=run.mesh, token_bytes=run.data.token_bytes, z_loss=0.0,
                               padded=config.isolated)
    else:
        loss_fn = run.objective.make_loss_fn(config, decoder, run.mesh)
    step = make_evaluation_step(loss_fn, out_sharding=sharding.replicated(run.mesh))
    local = sharding.local_rows(run.mesh, rows)
    place_global = partial(place_batch, sharding=sharding.batch_sharding(run.mesh), rows=rows)

    def place(batch: Any) -> Any:
        beat()
        return place_global(jax.tree.map(lambda x: x[local], batch))

    if run.objective is not None:
        return lambda params: evaluate_pairs(step, params, sources, place=place, describe=run.objective.describe)
    return lambda params: {"sources": evaluate_sources(step, params, sources, place=place)}


def make_benchmarks_hook(run: Run, tasks: dict[str, Any], writer: Any, shown: Any, *, beat: Any) -> Any:
    """Benchmarks of `open_loop_tasks`, at their interval and at the last step."""
    from ctllm_jax.evaluation.in_loop import make_benchmarks
    from ctllm_jax.training.loop import Hook, every

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
    from ctllm_jax.data.chat import Message
    from ctllm_jax.data.tokenizer import load_tokenizer
    from ctllm_jax.inference.generate import generate
    from ctllm_jax.inference.model import decode_completion, encode_prompts
    from ctllm_jax.training.pretrain import make_decoder

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


def banner_rows(run: Run, start: dict[str, Any]) -> list[tuple[str, str]]:
    """What stands at the head of a run."""
    from ctllm_jax import sharding
    from ctllm_jax.cluster import compilation_cache, distributed, xla_flags

    launch = distributed.detect(os.environ).describe()
    config = run.config
    adapted = "" if config.lora is None else ", which stay as they are"
    how = {"resume": f"resuming at step {run.start:,}", "init": f"from the weights of {config.init}{adapted}",
           "scratch": "from scratch"}[run.how]
    mesh = sharding.describe_mesh(start["mesh"])
    flops = start["flops_per_token"]
    tokens, room = run.data.tokens_at(config.steps), config.tokens_at(config.steps)
    padding = f" and {room - tokens:,} of padding" if tokens < room else ""
    rows = [("start", how), ("devices", f"{start['devices']}, mesh {mesh}; {launch}"),
            ("ops", ", ".join(f"{op}: {name}" for op, name in start["implementations"].items())),
            ("compiler", f"{xla_flags.describe_flags(os.environ)}; programs "
                         f"{compilation_cache.describe_directory(os.environ)}"),
            ("model", f"{start['parameters']:,} parameters, {flops['causal'] / 1e6:,.1f} MFLOPs a token causal,"
                      f" {flops['full'] / 1e6:,.1f} full"),
            ("batch", f"{'at most ' * bool(padding)}{config.batch.tokens:,} tokens a step = {config.batch.rows} rows of"
                      f" {config.batch.sequence_length:,}: {run.micro_rows} rows a device at once,"
                      f" {run.accumulation} accumulated"),
            ("run", f"{config.steps:,} steps, {tokens:,} tokens{padding};"
                    f" compiled in {run.compile_seconds:.1f} s")]
    if config.lora is not None:
        share = start["trained_parameters"] / start["parameters"]
        scale = f"{config.lora.alpha:g} / {'sqrt(' * config.lora.rslora}{config.lora.rank}{')' * config.lora.rslora}"
        rows.insert(5, ("lora", f"{start['trained_parameters']:,} parameters trained, {share:.2%} of the frozen ones:"
                                f" rank {config.lora.rank}, scale {scale} = {config.lora.scale:g}"))
    for source, tokens in start["tokens_per_source"].items():
        rows.append((f"source {source}", f"{tokens:,} tokens, {start['epochs'][source]:.2f} epochs"))
    return rows


def print_treatments(run: Run, console: Any) -> None:
    """The table of what the optimizer's rules hit."""
    from ctllm_jax.training.console import print_rows
    from ctllm_jax.training.optimizer import describe_rules

    rows = [(f"lr {lr}, decay {decay}", f"{paths}  [{rule}]")
            for paths, lr, decay, rule in describe_rules(run.config.optimizer, run.state.params)]
    print_rows(console, rows, title="optimizer")


def print_goodput(directory: Path, console: Any) -> None:
    """Where the time went, over all attempts, in one line."""
    from rich.text import Text

    from ctllm_jax.report.goodput import goodput_line
    from ctllm_jax.report.run import read_run

    if line := goodput_line(read_run(directory)):
        console.print(Text(line), soft_wrap=True)


def finish(run: Run, console: Any, *, next_command: bool) -> None:
    """The report, and what to type next."""
    from rich.text import Text

    if run.config.log.report:
        from ctllm_jax.evaluation.curves import benchmark_charts
        from ctllm_jax.report.page import write_report

        page = write_report([run.directory], run.directory / "report.html",
                            benchmarks=benchmark_charts([run.directory]))
        console.print(Text(f"report: {page}"))
    if next_command and run.data.tokenizer_path is not None:
        prompt, directory = run.config.sample.prompts[0], shlex.quote(str(run.directory))
        # The shell reads Chinese as it is; quotes only where it would not.
        shown = prompt if prompt.isalnum() else shlex.quote(prompt)
        talks = getattr(run.data, "template", None) is not None
        command = f"chat {directory}" if talks else f"generate {directory} prompt={shown}"
        console.print(Text(f"next: python launch.py {command}"))
