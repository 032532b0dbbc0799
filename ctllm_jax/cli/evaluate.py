"""`launch.py evaluate MODEL tasks=…`: lm-eval's tasks on a model, in this process."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ctllm_jax.cli.evaluate_checkpoints import origin
from ctllm_jax.cli.outputs import check_writable
from ctllm_jax.config.errors import UserError
from ctllm_jax.config.evaluate import EvaluateConfig
from ctllm_jax.config.evaluate_data import FetchConfig, ListConfig, choose_names

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.table import Table

    from ctllm_jax.cli import Context
    from ctllm_jax.inference.model import Model

SCHEMA = EvaluateConfig
BITS_TASK = "bits_per_byte"
DATA_ACTIONS = {"list": ListConfig, "fetch": FetchConfig}
USAGE = """
usage: python launch.py evaluate MODEL tasks=NAME,… | suite=FILE [key=value …] [--dry-run | --print-config]
       python launch.py evaluate list [tasks=NAME,… | suite=FILE] [data=DIR]
       python launch.py evaluate fetch tasks=NAME,… | suite=FILE [data=DIR]

lm-eval's own tasks, worded as it words them, without PyTorch or transformers. A MODEL is a run directory (its newest
checkpoint), RUN@STEP, or a Hugging Face folder. Results go to RUN/evaluation/STEP/ in lm-eval's layout; the same
command continues where it stopped, and repeats no answered question:
  python launch.py evaluate runs/ct_llm tasks=cmmlu,ceval-valid,mmlu num_fewshot=5 data=data/evaluation
  python launch.py evaluate runs/ct_llm@500000 tasks=hellaswag limit=1000 dtype=bfloat16
  python launch.py evaluate runs/chat tasks=gsm8k apply_chat_template=true samples=true
  python launch.py evaluate models/qwen tasks=mmlu output=results/qwen
  python launch.py evaluate runs/ct_llm suite=configs/eval/quick.yaml

Over training, checkpoint by checkpoint (tables and report show the course); and bits per byte of held-out text:
  python launch.py evaluate runs/ct_llm checkpoints=milestones suite=configs/eval/paper.yaml
  python launch.py evaluate runs/ct_llm checkpoints=all tasks=cmmlu,bits_per_byte num_fewshot=5
  python launch.py evaluate runs/ct_llm tasks=bits_per_byte held_out.sources.zh=zh.jsonl held_out.sources.en=en/

list shows which questions lie in data/evaluation, and for the others which file to put there, or the command that
fetches them; fetch takes them from the hub (HF_ENDPOINT, HF_HOME and HF_TOKEN as usual):
  python launch.py evaluate list suite=configs/eval/paper.yaml
  python launch.py evaluate fetch tasks=hellaswag,gsm8k
"""


def configure(action: str | None, words: Sequence[str], overrides: Sequence[str]) -> Any:
    """The keys of an evaluation, or of `list` and `fetch`; called before `run`."""
    from ctllm_jax.config.load import load

    return load(DATA_ACTIONS.get(words[0], SCHEMA) if words else SCHEMA, overrides=overrides)


def to_yaml(config: Any) -> str:
    """The output of --print-config."""
    from ctllm_jax.config.load import to_yaml as one

    return one(config)


def run(context: Context) -> int:
    """Run the evaluation, write and show the results; or run `list` or `fetch`."""
    if context.targets and context.targets[0] in DATA_ACTIONS:
        from ctllm_jax.cli import evaluate_data

        context.action, *context.targets = context.targets
        return evaluate_data.run_list(context) if context.action == "list" else evaluate_data.run_fetch(context)
    if len(context.targets) != 1:
        raise UserError("evaluate needs one MODEL: a run directory, RUN@STEP, or a Hugging Face folder")
    config, name = context.config, context.targets[0]
    _check(name, config)
    from ctllm_jax.evaluation.tasks import open_tasks

    names, suite = choose_names(config.tasks, config.suite)
    shots = suite.shots if suite and config.num_fewshot is None else config.num_fewshot
    asked = [task for task in names if task != BITS_TASK]
    opened = open_tasks(asked, data=config.data and Path(config.data), num_fewshot=shots, seed=config.seed)
    if context.dry_run:
        return _describe_tasks(context, opened["tasks"])
    from ctllm_jax.cli.evaluate_checkpoints import choose_checkpoints, is_measured

    models = choose_checkpoints(name, config.checkpoints) if config.checkpoints else [name]
    held_out = None
    if BITS_TASK in names:
        from ctllm_jax.evaluation.held_out import open_held_out
        from ctllm_jax.training.checkpoints.checkpoint import find_checkpoint, read_model_config

        run_dir, _ = find_checkpoint(models[0])
        held_out = open_held_out(name, config.held_out, run_dir=run_dir,
                                 context_length=read_model_config(run_dir).context_length)
    for model in models:
        if config.checkpoints and is_measured(model, _files(model, config, asked, suite), _identity(config, names)):
            context.console.print(f"{model} has these results already", markup=False, soft_wrap=True)
        else:
            _evaluate(context, model, names, suite, opened, held_out)
    return 0


def _evaluate(context: Context, name: str, names: list[str], suite: Any, opened: dict[str, Any],
              held_out: Any) -> None:
    """Evaluate one MODEL; programs compiled for one checkpoint are reused for the next."""
    from rich.markup import escape

    from ctllm_jax.cli.progress import count_bar
    from ctllm_jax.evaluation import results
    from ctllm_jax.evaluation.answer_store import AnswerStore
    from ctllm_jax.evaluation.evaluate import run_tasks
    from ctllm_jax.evaluation.harness import HarnessModel, identify
    from ctllm_jax.inference.model import load_model, with_template

    config, console = context.config, context.console
    model = load_model(name, dtype=config.dtype, mesh=config.mesh)
    if config.template is not None:
        model = with_template(model, config.template, name=name)
    chat = config.apply_chat_template == "true" or config.apply_chat_template == "auto" and model.template is not None
    folder = Path(config.output) if config.output else results.result_folder(model.run_dir, model.step)
    identity = identify(model, max_length=config.max_length, seed=config.seed)
    asked = [task for task in names if task != BITS_TASK]
    said = {"command": context.command_line, "tasks": names, "asked": _identity(config, names)}
    with AnswerStore(folder / results.ANSWERS, identity) as store:
        lm = HarnessModel(
            model, batch_tokens=config.batch, max_length=config.max_length, store=store, seed=config.seed,
            bar=lambda noun, **counts: count_bar(console, noun, **counts))
        console.print(_headline(model, lm, chat=chat))
        if held_out is not None:
            measure_bits(context, name, lm, folder, said, held_out)
        if not asked:
            return
        for task in opened["tasks"].values():
            task.set_fewshot_seed(seed=config.seed)  # The examples of each checkpoint are those of the first.
        result = run_tasks(lm, opened, limit=_number(config.limit), chat=chat, multiturn=config.multiturn,
                           system=config.system, seed=config.seed, bootstrap=config.bootstrap)
    result[results.OURS]["checkpoint"] |= origin(name)
    result[results.OURS] |= said
    file = _stem(config, asked, suite, chat=chat)
    samples = result.pop("samples")
    if config.samples:
        readable = {task: [{**row, "arguments": [[lm.readable(part) if isinstance(part, str) else part for part in each]
                                                 for each in row["arguments"]]} for row in rows]
                    for task, rows in samples.items()}
        results.write_samples(folder / f"{file}.samples.jsonl", readable)
    results.write_result(folder / f"{file}.json", result)
    table = make_table(result, asked)
    # In full width, because names of tasks differ at their ends.
    width = console.measure(table, options=console.options.update(max_width=500)).maximum
    console.width = max(console.width, width)
    console.print(table)
    console.print(f"results: {escape(str(folder / file))}.json")


def measure_bits(context: Context, name: str, lm: Any, folder: Path, said: dict[str, Any], held_out: Any) -> None:
    """Bits per byte of held-out text, into a file of their own."""
    import time

    from rich.markup import escape

    from ctllm_jax.evaluation import results
    from ctllm_jax.evaluation.evaluate import describe
    from ctllm_jax.evaluation.held_out import measure_held_out, to_result

    config, model = context.config, lm.model
    figures = measure_held_out(model, held_out, config.held_out, prefix_id=lm.prefix_token_id,
                               max_length=config.max_length, batch_tokens=config.batch)
    described = describe(lm, chat=False)
    described["checkpoint"] |= origin(name)
    result = to_result(figures, {**described, **said}, date=time.time())
    path = folder / f"{BITS_TASK}.json"
    results.write_result(path, result)
    for source, each in figures.items():
        error = f" ± {results.Z_95 * each['error']:.4f}" if each.get("error") else ""
        context.console.print(f"bits per byte of {escape(source)}: {each['bits_per_byte']:.4f}{error}, over "
                              f"{each['bytes']:,} bytes in {each['tokens']:,} tokens", highlight=False)
    context.console.print(f"results: {escape(str(path))}")


def _stem(config: EvaluateConfig, asked: list[str], suite: Any, *, chat: bool) -> str:
    from ctllm_jax.evaluation import results

    return results.result_name([Path(config.suite).stem] if suite else asked, num_fewshot=config.num_fewshot,
                               limit=config.limit, chat=chat)


def _identity(config: EvaluateConfig, names: list[str]) -> dict[str, Any]:
    """All settings of a command that affect its results, except the model and the files of questions."""
    left_out = {"checkpoints", "output", "batch", "mesh", "samples", "bootstrap", "data", "tasks", "suite"}
    return {**config.model_dump(mode="json", exclude=left_out), "tasks": names}


def _files(name: str, config: EvaluateConfig, asked: list[str], suite: Any) -> list[list[Path]]:
    """The files that the command writes of a step, of each one either of some: a template may be used or not."""
    from ctllm_jax.evaluation import results

    directory, _, step = name.rpartition("@")
    folder = Path(config.output) if config.output else results.result_folder(Path(directory), int(step))
    stems = [_stem(config, asked, suite, chat=chat) for chat in (False, True)
             if config.apply_chat_template in ("auto", str(chat).lower())] if asked else []
    files = [[folder / f"{stem}.json" for stem in stems]] if stems else []
    if config.samples and stems:
        files.append([folder / f"{stem}.samples.jsonl" for stem in stems])
    return files + ([[folder / f"{BITS_TASK}.json"]] if BITS_TASK in config.tasks else [])


def _check(name: str, config: EvaluateConfig) -> None:
    """Check MODEL and keys before heavy imports. Raises UserError."""
    base = name.rpartition("@")[0] if name.rpartition("@")[2].isdigit() else name
    directory = Path(base or name)
    if not directory.is_dir():
        raise UserError(f"no model {name}: {directory} is no directory (a MODEL is a run directory, RUN@STEP, or a "
                        "Hugging Face folder)")
    if config.checkpoints and (not (directory / "config.yaml").is_file() or directory != Path(name)):
        raise UserError(f"checkpoints={','.join(config.checkpoints)} are those of a run directory, which {name} is not")
    if config.checkpoints and config.output is not None:
        raise UserError("output holds the results of one checkpoint: leave it out, and those of each step lie in "
                        "RUN/evaluation/STEP")
    if config.output is None and (directory / "config.json").is_file() and not (directory / "config.yaml").is_file():
        raise UserError(f"{name} is a Hugging Face folder, and results do not belong in it: give output=FOLDER")
    if config.output is None:
        check_writable(directory / "evaluation", f"{directory / 'evaluation'} (results, unless output=FOLDER is given)")
    if config.template is not None and config.apply_chat_template == "false":
        raise UserError("template is given, and apply_chat_template=false would not use it: add "
                        "apply_chat_template=true")


def _number(limit: float | None) -> float | int | None:
    return int(limit) if limit is not None and limit >= 1 else limit


def _headline(model: Model, lm: Any, *, chat: bool) -> str:
    from rich.markup import escape

    how = f"template {model.template.kind}" if chat else "no template"
    text = (f"{escape(str(model.run_dir))}, step {model.step:,}: {model.decoder.dtype.name}, {lm.max_length:,} tokens "
            f"at once, {how}, documents behind id {lm.prefix_token_id} ({lm.prefix_source})")
    if chat:
        return text
    return text + ("" if model.prefix_id is None else ", and every context too")


def _describe_tasks(context: Context, tasks: dict[str, Any]) -> int:
    """The questions that would be asked."""
    config, total = context.config, 0
    for name, task in tasks.items():
        count = len(task.eval_docs)
        if config.limit is not None:
            count = min(count, int(config.limit) if config.limit >= 1 else -(-count * config.limit // 1))
        total += int(count)
        context.console.print(f"{name}: {int(count):,} questions, {task.get_config('num_fewshot')} examples",
                              highlight=False)
    context.console.print(f"{len(tasks):,} tasks, {total:,} questions", highlight=False)
    return 0


def make_table(result: dict[str, Any], asked: Sequence[str]) -> Table:
    """The requested tasks and groups with their metrics and intervals; the tasks of a group are in the file."""
    from rich import box
    from rich.table import Table

    from ctllm_jax.evaluation import results

    ours = result[results.OURS]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading, justify in (("task", "left"), ("examples", "right"), ("questions", "right"), ("metric", "left"),
                             ("value", "right"), ("95 %", "left"), ("chance", "right")):
        table.add_column(heading, justify=justify, no_wrap=True)
    for name, depth in _rows(result, asked):
        entry = result["results"][name]
        first = True
        for metric, value in results.metrics_of(entry).items():
            kind, _, chosen = metric.partition(",")
            interval = ours["intervals"].get(name, {}).get(metric)
            level = ours["chance"].get(name) if results.is_of_choices(metric) else None
            table.add_row(
                "  " * depth + name if first else "", str(result["n-shot"].get(name, "")) if first else "",
                f"{entry['sample_len']:,}" if first else "", kind + ("" if chosen == "none" else f" ({chosen})"),
                f"{value:.4f}", "" if interval is None else f"{interval['low']:.4f} – {interval['high']:.4f}",
                "" if level is None else f"{level:.4f}")
            first = False
        if first and entry.get("sample_len"):
            table.add_row("  " * depth + name, "", f"{entry['sample_len']:,}", "", "", "", "")
    return table


def _rows(result: dict[str, Any], names: Sequence[str], depth: int = 0) -> list[tuple[str, int]]:
    """(name, depth): names that have results, each followed by the groups in it."""
    children = result.get("group_subtasks", {})
    rows = []
    for name in names:
        if name in result["results"]:
            rows.append((name, depth))
        inside = [child for child in children.get(name, ()) if child in children]
        if name not in result["results"]:
            inside = list(children.get(name, ()))
        rows += _rows(result, inside, depth + 1)
    return rows
