"""The paper's tables: golden ones of made-up results, what is marked, and what stays empty."""

import csv
import io
import json

import pytest
from rich.console import Console

from ctllm_jax.config.errors import UserError
from ctllm_jax.config.evaluate_data import read_suite
from ctllm_jax.evaluation.figures import read_measured
from ctllm_jax.evaluation.paper import read_paper
from ctllm_jax.evaluation.registry import CMMLU_GROUPS
from ctllm_jax.evaluation.tables import make_tables, to_csv, to_markdown, to_rich
from tests.evaluation.made_up import write_choices, write_judged, write_run

SUITE = read_suite("eval/paper")
MMLU = {"mmlu": ["mmlu_anatomy", "mmlu_virology"]}


def tables_of(*targets, **options):
    measured = [read_measured(str(target), SUITE) for target in targets]
    return make_tables(measured, SUITE, **{"every_row": False, **options})


def row_of(table, name):
    return next(cells for row, cells, _ in table.rows if row == name)


def test_the_paper_is_what_is_known_of_it():
    # MMLU, C-Eval, CMMLU, HellaSwag and GSM8K, as arXiv 2404.04167 has them.
    known = {"CT-LLM 13.3B": (26.15, 27.89, 25.51, 26.5, 1.74), "CT-LLM 599.9B": (32.17, 30.46, 30.42, 47.55, 6.22),
             "CT-LLM final": (37.11, 36.78, 36.4, 50.37, 8.87), "CT-LLM SFT 2:1": (39.95, 41.54, 41.48, 52.93, 19.18),
             "CT-LLM SFT-DPO": (39.82, 41.18, 42.01, 53.38, 18.5)}
    paper = read_paper()
    models = {model.name: model.figures for model in
              [*map(paper.checkpoint, range(len(paper.tokens))), *paper.compared("sft", "dpo", peers=False)]}
    for name, figures in known.items():
        assert tuple(models[name][each] for each in ("MMLU", "C-Eval", "CMMLU", "HellaSwag", "GSM8K")) == figures
    assert {len(figures) for figures in paper.checkpoints.values()} == {len(paper.tokens)} == {15}
    assert sorted(paper.tokens) == list(paper.tokens)
    # Every row of the paper has a task, or a reason why not, in the suite.
    assert set(paper.checkpoints) == set(SUITE.benchmarks) - {"CValues responsibility"}
    assert {name for model in paper.models for name in model.figures} <= set(paper.checkpoints)
    base = next(model for model in paper.models if model.is_ours and model.kind == "base")
    assert base.figures.items() <= paper.checkpoint(-1).figures.items()


def test_the_nearest_checkpoint_is_so_by_ratio():
    paper = read_paper()
    assert [paper.label(paper.nearest(tokens)) for tokens in (1, 20e9, 30e9, 610e9, 9e12)] == [
        "CT-LLM 13.3B", "CT-LLM 13.3B", "CT-LLM 40.0B", "CT-LLM 599.9B", "CT-LLM final"]


def test_a_table_of_base_models(tmp_path):
    run = write_run(tmp_path / "a_run")
    write_choices(run, 100, {"mmlu_anatomy": (30, 100, 100), "mmlu_virology": (20, 100, 100)}, groups=MMLU,
                  tokens=590_000_000_000)
    write_choices(run, 100, {"hellaswag": (50, 100, 10_042)}, shots=0, limit=100, metric="acc_norm,none")
    text = to_markdown(tables_of(run))
    assert text == """\
### Base models

|  | CT-LLM 599.9B<br>paper | CT-LLM final<br>paper | a\\_run<br>step 100, 590B tokens | examples | questions | chance |
| --- | ---: | ---: | ---: | ---: | ---: | ---: |
| HellaSwag | 47.55 | 50.37 | 50.0 [40.4, 59.6]ᵃ | 0 | 100 of 10,042 | 25.0 |
| MMLU | 32.17 | 37.11 | 25.0 [19.5, 31.4] | 5 | 200 | 25.0 |

- In percent, with 95 % intervals in brackets; bits per byte in bits, where less is better. –: not measured.
- Columns marked paper: CT-LLM, arXiv 2404.04167 (chinese-tiny-llm.github.io), which does not say with how many \
examples, in which wording and by which metric was measured. Ours are worded as lm-eval words them, and C-Eval is its \
validation split: a difference of some points may be one of wording.
- ᵃ not all questions were asked
"""


def test_what_was_not_measured_is_a_dash_and_never_zero(tmp_path):
    first, second = write_run(tmp_path / "first"), write_run(tmp_path / "second")
    write_choices(first, 1, {"boolq": (0, 50, 50)}, shots=0, choices=2)
    write_choices(second, 1, {"copa": (25, 50, 50)}, shots=0, choices=2)
    table, = tables_of(first, second, every_row=True)
    assert [cell.value for cell in row_of(table, "BoolQ")][-2:] == [0.0, None]
    assert [cell.value for cell in row_of(table, "COPA")][-2:] == [None, 50.0]
    text = to_markdown([table])
    assert "| BoolQ | 42.17 | 0.0 [0.0, 7.1] | – | 0 | 50 | 50.0 |" in text
    assert "| TheoremQA | 2.12 | – | – | – | – | – |" in text
    rows = list(csv.DictReader(io.StringIO(to_csv([table]))))
    assert [row["column"] for row in rows if row["row"] == "BoolQ"] == ["CT-LLM final", "first"]
    assert not any(row["row"] == "CValues responsibility" for row in rows)


@pytest.mark.parametrize(("settings", "note"), [
    ({"shots": 0}, "0 examples, where the suite has 5"), ({"shots": 1}, "1 example, where the suite has 5"),
    ({"limit": 5}, "not all questions were asked"), ({"chat": True}, "asked through the chat template"),
    ({"max_length": 128}, "the model sees 128 tokens at once: longer questions lost their beginning"), ({}, None)])
def test_what_was_asked_otherwise_is_marked(tmp_path, settings, note):
    run = write_run(tmp_path / "run")
    write_choices(run, 1, {"cmmlu": (5, 10, 20 if "limit" in settings else 10)}, **settings)
    table, = tables_of(run)
    assert list(table.notes()) == [note] * (note is not None)
    assert row_of(table, "CMMLU")[-1].notes == tuple([note] * (note is not None))


def test_of_several_results_the_one_nearest_to_the_suite_counts(tmp_path):
    run = write_run(tmp_path / "run")
    for order, (hits, settings) in enumerate([(1, {"shots": 0, "date": 9.0}), (2, {"limit": 10, "date": 8.0}),
                                              (3, {"date": 1.0, "name": "old"}), (4, {"date": 2.0, "name": "new"})]):
        there = 20 if "limit" in settings else 10
        write_choices(run, 1, {"cmmlu": (hits, 10, there)}, **settings)
        table, = tables_of(run)
        assert row_of(table, "CMMLU")[-1].value == pytest.approx(10.0 * hits), order


def test_runs_of_mixed_settings_stand_beside_each_other_marked(tmp_path):
    five, zero = write_run(tmp_path / "five"), write_run(tmp_path / "zero")
    write_choices(five, 1, {"cmmlu": (5, 10, 10)})
    write_choices(zero, 2, {"cmmlu": (5, 10, 99)}, shots=0, limit=10, max_length=64)
    table, = tables_of(five, zero)
    name, cells, facts = table.rows[0]
    assert [len(cell.notes) for cell in cells] == [0, 0, 3] and facts == ["5 / 0", "10 / 10 of 99", "25.0"]
    shown = Console(width=200, record=True)
    with shown.capture() as captured:
        shown.print(to_rich(table))
    assert "50.0 [23.7, 76.3] " in captured.get() and "50.0 [23.7, 76.3]ᵃᵇᶜ" in captured.get()


def test_the_paper_s_groups_of_subjects_come_from_the_whole_benchmark(tmp_path):
    run = write_run(tmp_path / "run")
    subjects = {f"cmmlu_{subject}": (number % 4, 10, 10) for number, subject in
                enumerate(sorted({subject for group in CMMLU_GROUPS.values() for subject in group}))}
    write_choices(run, 1, subjects, groups={"cmmlu": list(subjects)})
    table, = tables_of(run)
    rows = {name: cells[-1] for name, cells, _ in table.rows}
    assert list(rows) == ["CMMLU", "CMMLU humanities", "CMMLU stem", "CMMLU social science", "CMMLU other",
                          "CMMLU china-specific"]
    members = [f"cmmlu_{subject}" for subject in CMMLU_GROUPS["cmmlu_stem"]]
    assert rows["CMMLU stem"].value == pytest.approx(
        100 * sum(subjects[member][0] for member in members) / (10 * len(members)))
    # One subject short, and the group has no figure.
    del subjects[members[0]]
    other = write_run(tmp_path / "other")
    write_choices(other, 1, subjects, groups={"cmmlu": list(subjects)})
    table, = tables_of(other)
    assert "CMMLU stem" not in [name for name, *_ in table.rows]


def test_aligned_models_stand_beside_the_paper_s(tmp_path):
    sft, dpo = write_run(tmp_path / "sft", kind="sft", ratio="zh:en=2:1"), write_run(tmp_path / "dpo", kind="dpo")
    for run in (sft, dpo):
        write_choices(run, 10, {"cmmlu": (5, 10, 10)}, tokens=1000)
    table, = tables_of(sft, dpo)
    assert table.title == "Aligned models"
    assert [(column.name, column.below) for column in table.columns] == [
        ("CT-LLM SFT 2:1", "paper"), ("CT-LLM SFT-DPO", "paper"), ("sft", "zh:en=2:1, step 10, 1.00k tokens"),
        ("dpo", "step 10, 1.00k tokens")]
    assert [cell.value for cell in row_of(table, "CMMLU")] == [41.48, 42.01, 50.0, 50.0]
    with_peers, = tables_of(sft, peers=True)
    assert len(with_peers.columns) == 10 and with_peers.columns[0].origin == "paper, another model"


def test_the_course_of_training(tmp_path):
    run = write_run(tmp_path / "run")
    for step, tokens in ((1, 10e9), (2, 14e9), (3, 600e9)):
        write_choices(run, step, {"cmmlu": (step, 10, 10)}, tokens=int(tokens))
    base, course = tables_of(run)
    assert base.columns[-1].step == 3 and course.title == "Over training: run"
    assert [column.name for column in course.columns] == ["step 1", "step 2", "CT-LLM 13.3B", "step 3", "CT-LLM 599.9B"]
    assert [cell.value for cell in row_of(course, "CMMLU")] == [10.0, 20.0, 25.51, pytest.approx(30.0), 30.42]
    only, = tables_of(f"{run}@2")
    assert only.columns[-1].step == 2


def test_chc_bench_by_category(tmp_path):
    run = write_run(tmp_path / "run", kind="sft")
    write_judged(run, 5, {"writing": (4.5, 33), "math": (None, 34)}, failures=2)
    table, = tables_of(run)
    text = to_markdown([table])
    assert table.title == "CHC-Bench: chc-bench, judged by gpt-4"
    assert "| writing | 4.50 [4.00, 5.00]ᵃ | 33 |" not in text and "| writing | 4.5 [4.0, 5.0]ᵃ | 33 |" in text
    assert "| math | – | 34 |" in text and "| coding | – | – |" in text and "ᵃ 2 answers have no rating" in text
    assert "could be read" in text
    # Another judge's ratings are not beside these.
    other = write_run(tmp_path / "other", kind="sft")
    write_judged(other, 5, {"writing": (4.5, 33), "math": (3.0, 34)}, judge="another")
    assert [len(table.columns) for table in tables_of(run, other)] == [1, 1]


def test_what_was_measured_counts_and_not_only_at_the_last_step(tmp_path):
    """The loop's figures of the last step do not hide a milestone's; nor does one that was judged later another's."""
    run = write_run(tmp_path / "run")
    write_choices(run, 5, {"cmmlu": (5, 10, 10)}, tokens=500)
    lines = [{"event": "start", "time": 1.0, "step": 0, "tokens_per_step": 100},
             {"event": "evaluation", "time": 2.0, "step": 9, "tokens": 900, "sources": {"zh": {"bits_per_byte": 2.5}}}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert row_of(tables_of(run)[0], "CMMLU")[-1].value == 50.0
    tuned = write_run(tmp_path / "tuned", kind="sft")
    write_judged(tuned, 5, {"writing": (4.5, 33), "math": (3.0, 34)})
    write_judged(tuned, 7, {"writing": (5.5, 33), "math": (3.0, 34)})
    write_judged(tuned, 6, {"a": (5.5, 33)}, name="mine")
    assert [[column.below for column in table.columns] for table in tables_of(tuned)] == [["step 7"], ["step 6"]]


def test_bits_per_byte_and_benchmarks_of_the_loop_are_there_too(tmp_path):
    run = write_run(tmp_path / "run")
    told = {"value": 26.0, "low": 20.0, "high": 33.0, "chance": 25.0, "questions": 40, "metric": "acc,none",
            "setting": {"shots": 5, "asked": "40 of 99", "chat": False, "system": False, "wording": "lm-eval",
                        "max_length": None, "in_training": False}}
    lines = [{"event": "start", "time": 1.0, "step": 0, "tokens_per_step": 100},
             {"event": "evaluation", "time": 2.0, "step": 5, "tokens": 500, "sources": {"zh": {"bits_per_byte": 2.5}}},
             {"event": "benchmarks", "time": 3.0, "step": 5, "tokens": 500, "seconds": 1.0,
              "tasks": {"cmmlu": told, "mmlu_anatomy": told}}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    table, = tables_of(run)
    assert [name for name, *_ in table.rows] == ["CMMLU", "mmlu_anatomy", "bits per byte · zh"]
    assert "| CMMLU | 25.51 | 36.40 | 26.0 [20.0, 33.0]ᵃᵇ | 5 | 40 of 99 | 25.0 |" in to_markdown([table])
    assert "| bits per byte · zh | – | – | 2.500ᵇ | – | – | – |" in to_markdown([table])
    # What was evaluated of the same checkpoint comes before.
    write_choices(run, 5, {"cmmlu": (5, 10, 10)}, tokens=500)
    table, = tables_of(run)
    assert row_of(table, "CMMLU")[-1].value == 50.0


def test_a_folder_of_results_is_a_target(tmp_path):
    write_choices(tmp_path / "no_run", 0, {"cmmlu": (5, 10, 10)}, folder=tmp_path / "results")
    table, = tables_of(tmp_path / "results")
    assert table.columns[-1].name == "results" and row_of(table, "CMMLU")[-1].value == 50.0


def test_what_is_no_target_is_told(tmp_path):
    with pytest.raises(UserError, match="is no directory"):
        tables_of(tmp_path / "nothing")
    run = write_run(tmp_path / "run")
    write_choices(run, 3, {"cmmlu": (5, 10, 10)})
    with pytest.raises(UserError, match="nothing was measured at step 4; there is step 3"):
        tables_of(f"{run}@4")
