"""`launch.py sweep STAGE CONFIG …`: one command to the configs of all its runs. No jax here.

A run is one of the configs with one choice of every varied key: `vary.KEY=V1,V2`. A comma that belongs to a value is
written `\\,`, and a backslash before a comma `\\\\`; nothing else is read in a value but what the stage's schema says.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ctllm_jax.config.errors import UserError
from ctllm_jax.config.folders import files_below
from ctllm_jax.config.load import ConfigError, changeable_paths, load
from ctllm_jax.config.pretrain import PretrainConfig, RunConfig
from ctllm_jax.config.stages import STAGES

VARY = "vary."
_LONGEST_NAME = 120


@dataclass(frozen=True)
class SweepRun:
    """One run of a sweep: its name, its config file, what varies (key -> value as it was typed), all its `key=value`
    but `run.dir`, and the config that they come to."""

    name: str
    target: str
    varied: dict[str, str]
    overrides: tuple[str, ...]
    config: PretrainConfig

    @property
    def words(self) -> list[str]:
        """The words after the stage on the command line."""
        return [self.target, *self.overrides, f"run.dir={self.config.run.dir}"]


@dataclass(frozen=True)
class Sweep:
    """Runs of a stage, each in a directory of its own below `directory`."""

    stage: str
    directory: Path
    runs: tuple[SweepRun, ...]


def plan_sweep(stage: str, targets: Sequence[str], overrides: Sequence[str]) -> Sweep:
    """All runs of a sweep, checked.

    Args:
      stage: one of STAGES.
      targets: config files.
      overrides: `key=value` for every run, and `vary.KEY=V1,V2`.

    Raises:
      UserError: all that is wrong with any of them, each once.
    """
    if not targets:
        raise UserError(f"sweep {stage} needs a config, such as configs/quickstart/{stage}.yaml, or several")
    common, varied, named = _sorted_out(overrides)
    directory = Path(named or f"runs/{_stem(targets, stage)}-sweep")
    choices = [dict(zip(varied, values, strict=True)) for values in itertools.product(*varied.values())]
    names = _run_names(targets, choices)
    problems: dict[str, list[str]] = {}
    runs = []
    for name, (target, choice) in zip(names, itertools.product(targets, choices), strict=True):
        own = (*common, *(f"{key}={value}" for key, value in choice.items()))
        try:
            config = load(STAGES[stage].schema, target=target, overrides=own)
        except ConfigError as error:
            found = error.problems
        except UserError as error:
            found = [str(error)]
        else:
            config = config.model_copy(update={"run": config.run.model_copy(update={"dir": str(directory / name)})})
            runs.append(SweepRun(name, target, choice, own, config))
            found = _absent_files(config)
        for problem in dict.fromkeys(found):
            problems.setdefault(problem, []).append(name)
    if not problems:
        problems = _equal_runs(runs)
    if problems:
        raise ConfigError([problem if len(of) == len(names) else f"{_some(of)}: {problem}"
                           for problem, of in problems.items()])
    return Sweep(stage, directory, tuple(runs))


def _some(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) <= 3 else f"{names[0]}, {names[1]} and {len(names) - 2} more"


def split_values(text: str) -> list[str]:
    """The values between commas. `\\,` is a comma of a value, `\\\\` a backslash; any other backslash is one."""
    values = [""]
    for piece in re.findall(r"\\[\\,]|,|[^\\,]+|\\", text):
        if piece == ",":
            values.append("")
        else:
            values[-1] += piece[1] if piece in ("\\,", "\\\\") else piece
    return values


def run_key(config: PretrainConfig) -> str:
    """A hash of all that decides whether a finished run is finished still: its config, but for keys that may change
    without a step more, and the size and time of the files that it reads."""
    loose = changeable_paths(type(config)) - {"steps", "data.epochs", "init"}

    def fixed(tree, prefix: str = ""):
        if not isinstance(tree, dict):
            return tree
        return {name: fixed(value, f"{prefix}{name}.") for name, value in tree.items() if prefix + name not in loose}

    files = []
    for _, path in _files(config):
        for file in files_below(path) if path.is_dir() else [path] if path.is_file() else []:
            found = file.stat()
            files.append([str(file), found.st_size, found.st_mtime_ns])
    return hashlib.sha256(json.dumps([fixed(config.model_dump(mode="json")), files]).encode()).hexdigest()


def _sorted_out(overrides: Sequence[str]) -> tuple[list[str], dict[str, list[str]], str]:
    """(what every run is given, key -> its values, the sweep's directory or an empty text)."""
    common: list[str] = []
    varied: dict[str, list[str]] = {}
    problems, directory = [], ""
    for override in overrides:
        key, _, text = override.partition("=")
        if key in ("run.dir", "run"):
            directory = text
        elif not key.startswith(VARY):
            common.append(override)
        else:
            values, path = split_values(text), key.removeprefix(VARY)
            if path.split(".")[0] == "run":
                problems.append(f"{key}: every run of a sweep has its own directory below run.dir")
            if path in varied:
                problems.append(f"{key}: given twice; its values stand between commas")
            if not text or len(set(values)) < len(values):
                problems.append(f"{override}: {'needs values' if not text else 'a value stands there twice'}, such as "
                                f"{key}=A,B")
            varied[path] = values
    given = {override.partition("=")[0] for override in common}
    problems += [f"{VARY}{key}: {key} is given too; leave one of them out" for key in varied if key in given]
    if problems:
        raise ConfigError(problems)
    return common, varied, directory


def _stem(targets: Sequence[str], stage: str) -> str:
    """The name of a sweep: that of its config, or of the folder of its configs and the stage."""
    shown = [target.removesuffix(".yaml").removeprefix("./").removeprefix("configs/") for target in targets]
    name = shown[0] if len(shown) == 1 else f"{Path(shown[0]).parent.name or 'configs'}/{stage}"
    return name.replace("/", "-").strip("-.")


def _run_names(targets: Sequence[str], choices: Sequence[dict[str, str]]) -> list[str]:
    """A folder's name for each config and choice: the config where there are several, and KEY=VALUE of what varies."""
    stems = [Path(target).stem for target in targets]
    if len(set(stems)) < len(stems):
        stems = [target.removesuffix(".yaml").strip("./").replace("/", "-") for target in targets]
    leaves = Counter(key.rpartition(".")[2] for key in choices[0])
    names, wholes = [], []
    for (target, stem), choice in itertools.product(zip(targets, stems, strict=True), choices):
        wholes.append(json.dumps([target, choice]))
        parts = [stem] if len(targets) > 1 or not choice else []
        for key, value in choice.items():
            leaf = key.rpartition(".")[2]
            parts.append(f"{leaf if leaves[leaf] == 1 else key}={value}")
        names.append(",".join(parts))
    plain = [re.sub(r"[^\w.+=,-]", "_", name) for name in names]
    often = Counter(plain)
    return [short if often[short] == 1 and len(short.encode()) <= _LONGEST_NAME and short.strip(".") else
            f"{_cut(short, _LONGEST_NAME)}-{hashlib.sha256(whole.encode()).hexdigest()[:6]}"
            for short, whole in zip(plain, wholes, strict=True)]


def _cut(text: str, size: int) -> str:
    """The beginning of a text with at most this many bytes in UTF-8."""
    return text.encode()[:size].decode(errors="ignore")


def _files(config: PretrainConfig) -> list[tuple[str, Path]]:
    """(key, path) of what a run reads from a disk of this machine, but for the model that it starts from."""
    data = config.data
    named = [(f"data.sources.{name}.path", source.path) for name, source in data.sources.items()]
    named += [("data.tokenizer", data.tokenizer)] if data.tokenizer else []
    template = getattr(data, "template", None)
    named += [("data.template.path", template.path)] if template is not None and template.path else []
    return [(key, Path(path)) for key, path in named if "://" not in path]


def _absent_files(config: PretrainConfig) -> list[str]:
    """The errors of missing files, checked so that no run starts before all can."""
    said = [f"{key}={path}: does not exist" for key, path in _files(config) if not path.exists()]
    if config.init and "://" not in config.init and not any(
            Path(name).exists() for name in (config.init, config.init.rpartition("@")[0]) if name):
        said.append(f"init={config.init}: does not exist; a run directory or RUN@STEP is needed")
    return said


def _equal_runs(runs: Sequence[SweepRun]) -> dict[str, list[str]]:
    """Runs that are the same in all but their names: problem -> their names."""
    by_config: dict[str, list[str]] = {}
    for run in runs:
        plain = run.config.model_copy(update={"run": RunConfig()})
        by_config.setdefault(plain.model_dump_json(), []).append(run.name)
    return {f"{names[1]} is the same run as {names[0]}, by all its keys": names[1:2]
            for names in by_config.values() if len(names) > 1}


def to_yaml(sweep: Sweep) -> str:
    """All configs, resolved, as documents of one YAML file."""
    from ctllm_jax.config.load import to_yaml as one

    return "".join(f"--- # {run.name}\n{one(run.config)}" for run in sweep.runs)
