"""lm-eval's tasks with questions on this machine.

Stock tasks are unchanged, prompt for prompt; only the source of their rows is ours. Nothing uses the network.
"""

from __future__ import annotations

import difflib
import importlib.util
import json
import logging
import re
import shlex
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ctllm_jax.config.errors import UserError
from ctllm_jax.evaluation.registry import BENCHMARKS, Benchmark, find_benchmark
from ctllm_jax.evaluation.sources import Source, find_source, name_files

if TYPE_CHECKING:
    from lm_eval.api.group import Group
    from lm_eval.api.task import Task
    from lm_eval.tasks import TaskManager

DEFAULT_DATA = Path("data/evaluation")
DEFAULT_CACHE = Path("data_cache/evaluation")
DEFINITIONS = Path(__file__).resolve().parent / "definitions"


@dataclass(frozen=True)
class Leaf:
    """A single task and its dataset."""

    name: str
    dataset: str
    configuration: str | None
    split: str
    """The split whose questions are asked."""


def open_tasks(names: Sequence[str], *, data: Path | None = None,
               num_fewshot: int | Mapping[str, int | None] | None = None, cache: Path | None = None,
               seed: int = 1234) -> dict[str, Any]:
    """Tasks and groups for `lm_eval.evaluate(lm, task_dict=…)`.

    Args:
      names: tasks, subjects (`mmlu_anatomy`) and groups (`mmlu`, `cmmlu_china_specific`), each of `BENCHMARKS`.
      data: directory of official files and dataset folders; None: `data/evaluation`.
      num_fewshot: examples before each question, for all or by name (of a task or of a group above it); None keeps
        the task's own number, 0 if it has none. A task that fixes 0 keeps it, as in lm-eval.
      cache: directory where official files are kept once converted; None: `data_cache/evaluation`.
      seed: seed of sampled examples; by default lm-eval's.

    Raises:
      UserError: names are unknown or datasets are missing; all are listed, with what to do.
    """
    data, cache = Path(data or DEFAULT_DATA), Path(cache or DEFAULT_CACHE)
    catalog = Catalog()
    problems = [problem for name in names if (problem := catalog.unknown(name))]
    if problems:
        raise UserError("; ".join(problems))
    wanted = _shots(names, num_fewshot, catalog)
    sources: dict[str, Source] = {}
    missing: dict[str, tuple[str, bool]] = {}
    for name in names:
        for leaf in catalog.leaves(name):
            source = find_source(leaf.dataset, leaf.configuration, data=data, cache=cache)
            if source is None:
                missing.setdefault(name, name_files(leaf.dataset))
            else:
                sources[leaf.name] = source
    if missing:
        lines = [f"{data} lacks the questions of", *(f"  {name}: {files}" for name, (files, _) in missing.items())]
        if fetchable := [name for name, (_, on_hub) in missing.items() if on_hub]:
            lines.append(describe_fetch(f"tasks={','.join(fetchable)}", data=data))
        raise UserError("\n".join(lines))
    import datasets

    datasets.disable_progress_bars()  # tasks such as HellaSwag map their rows again on each access
    tasks = {name: catalog.open(name, source) for name, source in sources.items()}
    groups: dict[str, Group] = {}
    for name in names:
        catalog.add_groups(name, tasks, groups)
    short = {}
    for name, task in tasks.items():
        _set_fewshot(task, wanted.get(name))
        task.set_fewshot_seed(seed=seed)
        if (there := _available_examples(task)) < task.get_config("num_fewshot"):
            short[name] = there
    if short:
        named = [f"{name} has {there}" for name, there in list(short.items())[:5]]
        rest = f", and {len(short) - 5} more tasks have too few" if len(short) > 5 else ""
        raise UserError(f"num_fewshot asks for more examples than there are: {', '.join(named)}{rest}; give at most "
                        f"{min(short.values())}, or evaluate these tasks by themselves")
    return {"tasks": tasks, "groups": groups, "group_map": {name: group.child_names for name, group in groups.items()}}


def describe_fetch(wanted: str, *, data: Path) -> str:
    """The command that fetches `tasks=…` or `suite=…`, in a sentence."""
    where = "" if data == DEFAULT_DATA else f" data={shlex.quote(str(data))}"
    return (f"put them there as they were downloaded, or fetch what the hub has: python launch.py evaluate fetch "
            f"{wanted}{where}")


def _shots(names: Sequence[str], given: int | Mapping[str, int | None] | None, catalog: Catalog) -> dict[str, int]:
    """Number of examples of each task; a task requested by two names must have one number."""
    shots: dict[str, int] = {}
    for name in names:
        number = given.get(name) if isinstance(given, Mapping) else given
        for leaf in catalog.leaves(name) if number is not None else ():
            if shots.setdefault(leaf.name, number) != number:
                raise UserError(f"{leaf.name} is asked for with {shots[leaf.name]} and, in {name}, with {number} "
                                "examples: evaluate them one after the other")
    return shots


def _set_fewshot(task: Task, wanted: int | None) -> None:
    own = task.get_config("num_fewshot")
    if own is None or (wanted is not None and own != 0):
        task.set_config(key="num_fewshot", value=wanted or 0)


def _available_examples(task: Task) -> int:
    """The examples that lm-eval's sampler can draw for each question of a task."""
    if not task.get_config("num_fewshot"):
        return 0
    pool = task.sampler.fewshot_docs()
    if task.fewshot_cfg.split != task.config.test_split:
        return len(pool)
    # Examples and questions share a split, so a question and its duplicates cannot be its own examples.
    copies = Counter(json.dumps(row, sort_keys=True, default=str) for row in pool)
    return len(pool) - max(copies.values(), default=0)


@dataclass
class Catalog:
    """lm-eval's definitions of the benchmarks, read folder by folder on demand."""

    managers: dict[Path, TaskManager] = field(default_factory=dict)

    def unknown(self, name: str) -> str | None:
        """The reason why a name cannot be opened, or None."""
        if find_benchmark(name) is not None and self._entry(name) is not None:
            return None
        known = {*BENCHMARKS, *(member for each in BENCHMARKS.values() for member in each.members)}
        near = difflib.get_close_matches(name, sorted(known), n=3, cutoff=0.5)
        return (f"no task {name}" + (f"; did you mean {' or '.join(near)}?" if near else "")
                + " (python launch.py evaluate list shows all)")

    def leaves(self, name: str) -> list[Leaf]:
        """The tasks of a name, each once, in the order of their definition."""
        found: dict[str, Leaf] = {}
        for leaf in self._leaves(name):
            found.setdefault(leaf.name, leaf)
        return list(found.values())

    def configuration(self, name: str) -> dict[str, Any]:
        """A task's definition, functions left as the names of files."""
        return self._entry(name).cfg

    def open(self, name: str, source: Source) -> Task:
        """A task over its questions.

        Raises:
          UserError: they lack something that the task needs.
        """
        from jinja2 import UndefinedError

        from ctllm_jax.evaluation import squad
        from ctllm_jax.evaluation.code import code_tasks

        manager = self._manager(name)
        try:
            with _no_advice():
                if name in code_tasks.TASKS:
                    task = manager.load([self._code(name, source)])["tasks"][name]
                elif name == "squadv2":
                    task = squad.open_squad(source)
                else:
                    spec = {"group": "one", "task": [{"task": name, "custom_dataset": source}]}
                    task = manager.load([spec])["tasks"][name]
        except (KeyError, UndefinedError) as error:
            raise UserError(f"{source.place}: {name} needs a split or a field that is not there: {error}") from error
        metadata = dict(task.config.metadata or {})
        metadata["config_source"] = _short_path(self._entry(name).yaml_path)
        metadata["questions"] = f"{source.kind}: {source.place}"
        task.set_config(key="metadata", value=metadata)
        return task

    def add_groups(self, name: str, tasks: Mapping[str, Task], groups: dict[str, Group]) -> None:
        """The group of a name and those below it, over tasks that are open."""
        from lm_eval.api.group import Group

        if name in groups or name in tasks:
            return
        config = self._group_config(name)
        group = Group.from_config(config)
        for child in self._children(name):
            self.add_groups(child, tasks, groups)
            group.add(tasks[child] if child in tasks else groups[child])
        groups[name] = group

    def _code(self, name: str, source: Source) -> dict[str, Any]:
        from ctllm_jax.evaluation.code import code_tasks

        entry = self._entry(name)
        return code_tasks.configure(name, entry.cfg, source, folder=entry.yaml_path.parent)

    def _manager(self, name: str) -> TaskManager:
        from lm_eval.tasks import TaskManager

        folder = definition_folder(find_benchmark(name))
        if folder not in self.managers:
            self.managers[folder] = TaskManager(include_defaults=False, include_path=str(folder))
        return self.managers[folder]

    def _entry(self, name: str):
        index = self._manager(name).task_index
        return index.get(name) or (BENCHMARKS.get(name) if find_benchmark(name).members else None)

    def _group_config(self, name: str) -> dict[str, Any]:
        """The definition of our group: that of the stock group of its tasks, with their names."""
        members = find_benchmark(name).members
        if not members:
            return dict(self._entry(name).cfg)
        stock = "cmmlu" if name.startswith("cmmlu") else "ceval-valid"
        return {**self._entry(stock).cfg, "group": name, "task": list(members)}

    def _children(self, name: str) -> list[str]:
        children = []
        for child in self._group_config(name)["task"]:
            entry = self._entry(child)
            # A tag, such as mmlu_stem_tasks, means its tasks.
            children += sorted(entry.tags) if entry.cfg is None else [child]
        return children

    def _leaves(self, name: str) -> Iterator[Leaf]:
        entry = self._entry(name)
        if isinstance(entry, Benchmark) or "group" in entry.cfg:
            for child in self._children(name):
                yield from self._leaves(child)
        elif name == "squadv2":
            yield Leaf(name, "lighteval/squad_v2", None, "validation")
        else:
            cfg = entry.cfg
            yield Leaf(name, cfg["dataset_path"], cfg.get("dataset_name"), cfg.get("test_split") or
                       cfg["validation_split"])


def definition_folder(benchmark: Benchmark) -> Path:
    """The folder of a benchmark's definition.

    Raises:
      UserError: lm-eval is not installed.
    """
    if benchmark.ours:
        return DEFINITIONS / benchmark.folder
    spec = importlib.util.find_spec("lm_eval")
    if spec is None:
        raise UserError("evaluation needs lm-eval: pip install 'ctllm-jax[eval]'")
    return Path(spec.origin).parent / "tasks" / benchmark.folder


def _short_path(path: Path) -> str:
    """A definition's path without its machine-dependent part: `lm_eval/tasks/mmlu/…`."""
    root = DEFINITIONS.parent.parent if path.is_relative_to(DEFINITIONS) else path.parents[
        [parent.name for parent in path.parents].index("lm_eval")].parent
    return str(path.relative_to(root.parent if path.is_relative_to(DEFINITIONS) else root))


@contextmanager
def _no_advice() -> Iterator[None]:
    """lm-eval advises on --metadata for each custom dataset, 67 times for CMMLU, and on gaps in its own files."""
    def keep(record: logging.LogRecord) -> bool:
        return not re.search("Custom kwargs can be passed|is defined, but (aggregation|higher_is_better) is not",
                             record.getMessage())

    logger = logging.getLogger("lm_eval.api.task")
    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)
