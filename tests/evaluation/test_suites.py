"""Every benchmark of a suite is one that the installed lm-eval has, with the metric that the suite names."""

from pathlib import Path

import pytest

lm_eval = pytest.importorskip("lm_eval")

from ctllm_jax.config.errors import UserError  # noqa: E402
from ctllm_jax.config.evaluate_data import read_suite  # noqa: E402
from ctllm_jax.evaluation.registry import BENCHMARKS, CEVAL_GROUPS, CMMLU_GROUPS  # noqa: E402
from ctllm_jax.evaluation.tasks import Catalog  # noqa: E402
from tests.evaluation.official_files import subjects_of  # noqa: E402

PAPER = """BoolQ CB COPA RTE MultiRC WiC PIQA SIQA HellaSwag WinoGrande ARC-e ARC-c OBQA CSQA MMLU HumanEval MBPP NQ
TriviaQA LAMBADA SQuAD2 GSM8K TheoremQA C-Eval CMMLU""".split()
# Metrics of a definition that lists none, and of those that we replace.
OTHER = {"squadv2": {"exact", "f1"}, "humaneval": {"pass@1"}, "mbpp": {"pass_at_1"}}


@pytest.fixture(scope="module")
def catalog():
    return Catalog()


@pytest.mark.parametrize("name", ["paper", "quick"])
def test_tasks_and_metrics_exist(name, catalog):
    for benchmark in read_suite(f"configs/eval/{name}.yaml").benchmarks.values():
        if benchmark.task is None:
            continue
        assert catalog.unknown(benchmark.task) is None
        metric, _, answers = benchmark.metric.partition(",")
        for leaf in catalog.leaves(benchmark.task):
            cfg = catalog.configuration(leaf.name)
            assert metric in OTHER.get(leaf.name, {one["metric"] for one in cfg.get("metric_list", [])}), leaf
            assert answers in ([one["name"] for one in cfg.get("filter_list", [])] or ["none"]), leaf


def test_the_paper_is_whole(catalog):
    suite = read_suite("eval/paper")
    assert [name for name in PAPER if name not in suite.benchmarks] == []
    assert [sum(name.startswith(f"{whole} ") for name in suite.benchmarks) for whole in ("MMLU", "C-Eval", "CMMLU")] \
        == [4, 5, 5]
    absent = [name for name, one in suite.benchmarks.items() if one.absent]
    folders = {path.name.lower() for path in (Path(lm_eval.__file__).parent / "tasks").iterdir()}
    assert absent == ["TheoremQA"] and not any("theorem" in folder for folder in folders)
    assert suite.shots["mmlu"] == 5 and "humaneval" not in suite.shots


def test_what_is_wrong_with_a_suite_is_said(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("benchmarks:\n  A: mmlu\n  B: {task: mmlu, shot: 3}\n  C: {shots: 1}\n")
    with pytest.raises(UserError) as error:
        read_suite(path)
    assert f"{path}:3): unknown key; did you mean benchmarks.NAME.shots?" in str(error.value)
    assert "benchmarks.C" in str(error.value) and "needs either task, or absent" in str(error.value)
    path.write_text("benchmarks: {A: mmlu, B: {task: mmlu}}")
    with pytest.raises(UserError, match="name mmlu more than once"):
        read_suite(path)
    path.write_text("benchmarks: {A: mmlu, B: gsm8k}")
    assert read_suite(path).tasks == ["mmlu", "gsm8k"]


def test_groups_are_those_of_their_authors():
    for benchmark, groups, across, sizes in (
            ("cmmlu", CMMLU_GROUPS, "cmmlu_china_specific", {"stem": 17, "humanities": 13, "social_science": 22,
                                                             "other": 15, "china_specific": 15}),
            ("ceval", CEVAL_GROUPS, "ceval-valid_hard", {"stem": 20, "social_science": 10, "humanities": 11,
                                                         "other": 11, "hard": 8})):
        apart = sorted(subject for name, subjects in groups.items() if name != across for subject in subjects)
        assert apart == subjects_of(benchmark)  # each subject of lm-eval in one category
        assert set(groups[across]) < set(apart)
        assert {name.partition("_")[2]: len(subjects) for name, subjects in groups.items()} == sizes


def test_every_benchmark_is_one_that_lm_eval_or_we_define(catalog):
    assert all(catalog.unknown(name) is None for name in BENCHMARKS)
