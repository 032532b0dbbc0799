"""A sweep's command to its runs: values, names, directories, and all errors before anything starts."""

import subprocess
import sys
from pathlib import Path

import pytest

from ctllm_jax.config.errors import UserError
from ctllm_jax.config.sweep import plan_sweep, run_key, split_values, to_yaml
from tests.runs import REPOSITORY


@pytest.fixture
def given(tmp_path):
    """What an `sft` needs to pass the checks: a base and two sources that are there."""
    for name in ("base", "zh.jsonl", "en.jsonl"):
        (tmp_path / name).touch()
    return [f"init={tmp_path / 'base'}", f"data.sources.zh.path={tmp_path / 'zh.jsonl'}",
            f"data.sources.en.path={tmp_path / 'en.jsonl'}", f"run.dir={tmp_path / 'runs'}"]


RATIO = "quickstart/sft_ratio"


@pytest.mark.parametrize(("text", "values"), [
    ("1e-5,2e-5", ["1e-5", "2e-5"]), ("zh:en=1:1,zh:en=2:1", ["zh:en=1:1", "zh:en=2:1"]), ("a", ["a"]),
    (r"你好\, 世界,再见", ["你好, 世界", "再见"]), (r"a\\,b", ["a\\", "b"]), (r"\n,\d+", [r"\n", r"\d+"]),
    (r"[1\, 2],null", ["[1, 2]", "null"]), (" a , b ", [" a ", " b "]), ("a,", ["a", ""]), ("\\", ["\\"])])
def test_values_stand_between_commas(text, values):
    assert split_values(text) == values


def test_runs_are_the_product_in_order_each_with_its_directory(given, tmp_path):
    sweep = plan_sweep("sft", [RATIO], [*given, "vary.data.ratio=zh:en=1:1,en:zh=1:0", "vary.optimizer.lr=1e-4,2e-4",
                                        "data.epochs=1"])
    assert [run.name for run in sweep.runs] == ["ratio=zh_en=1_1,lr=1e-4", "ratio=zh_en=1_1,lr=2e-4",
                                                "ratio=en_zh=1_0,lr=1e-4", "ratio=en_zh=1_0,lr=2e-4"]
    assert [(run.config.data.ratio, run.config.optimizer.lr) for run in sweep.runs] == [
        ("zh:en=1:1", 1e-4), ("zh:en=1:1", 2e-4), ("en:zh=1:0", 1e-4), ("en:zh=1:0", 2e-4)]
    for run in sweep.runs:
        assert run.config.run.dir == str(tmp_path / "runs" / run.name) and run.config.data.epochs == 1
        assert run.words[0] == RATIO and run.words[-1] == f"run.dir={run.config.run.dir}"
    assert to_yaml(sweep).count("--- # ratio=") == 4


def test_the_papers_six_are_called_after_their_files(given):
    targets = [f"configs/ct_llm_2b/sft_{name}.yaml" for name in ("1_1", "2_1", "4_1", "8_1", "zh_only", "en_only")]
    sweep = plan_sweep("sft", targets, given)
    assert [run.name for run in sweep.runs] == [f"sft_{name}" for name in ("1_1", "2_1", "4_1", "8_1", "zh_only",
                                                                           "en_only")]
    ratios = [run.config.data.ratio for run in sweep.runs]
    assert ratios == ["zh:en=1:1", "zh:en=2:1", "zh:en=4:1", "zh:en=8:1", "zh:en=1:0", "en:zh=1:0"]
    assert all(set(run.config.data.sources) == {"zh", "en"} for run in sweep.runs), "all evaluate both languages"
    assert str(plan_sweep("sft", targets, given[:-1]).directory) == "runs/ct_llm_2b-sft-sweep"
    assert str(plan_sweep("sft", targets[:1], given[:-1]).directory) == "runs/ct_llm_2b-sft_1_1-sweep"


def test_names_that_would_be_one_folder_are_told_apart(given, tmp_path):
    sweep = plan_sweep("sft", [RATIO], [*given, "vary.sample.prompts=a/b,a:b"])
    first, second = (run.name for run in sweep.runs)
    assert first != second and first.startswith("prompts=a_b-") and second.startswith("prompts=a_b-")
    long = plan_sweep("sft", [RATIO], [*given, f"vary.sample.prompts={'长' * 300},短"])
    assert max(len(run.name.encode()) for run in long.runs) < 140
    for folder in (tmp_path / "a", tmp_path / "a" / "a"):
        folder.mkdir()
        (folder / "x.yaml").write_text(f"extends: {REPOSITORY / 'configs' / RATIO}.yaml\n"
                                       f"log: {{every: {len(folder.parts)}}}\n")
    two = plan_sweep("sft", [str(folder / "x.yaml") for folder in (tmp_path / "a", tmp_path / "a" / "a")],
                     [*given, "vary.seed=1,2"])
    assert len({run.name for run in two.runs}) == 4


def test_the_same_keys_twice_are_the_same_runs(given):
    first, again = (plan_sweep("sft", [RATIO], [*given, "vary.seed=1,2"]) for _ in range(2))
    assert [run_key(run.config) for run in first.runs] == [run_key(run.config) for run in again.runs]
    keys = {run_key(run.config) for run in first.runs}
    for other in ("optimizer.lr=1e-3", "data.epochs=7", "steps=4"):
        assert keys.isdisjoint(run_key(run.config) for run in plan_sweep(
            "sft", [RATIO], [*given, "vary.seed=1,2", other]).runs), other
    assert keys == {run_key(run.config) for run in plan_sweep(
        "sft", [RATIO], [*given, "vary.seed=1,2", "log.every=3", "checkpoint.every=9"]).runs}
    data = Path(given[1].partition("=")[2])
    (data.parent / "other").touch()
    assert keys.isdisjoint(run_key(run.config) for run in plan_sweep(
        "sft", [RATIO], [f"init={data.parent / 'other'}", *given[1:], "vary.seed=1,2"]).runs), "another model"
    with open(data, "a") as file:
        file.write("{}\n")
    assert keys.isdisjoint(run_key(run.config) for run in first.runs)


def test_a_link_to_nowhere_in_a_folder_of_data_is_no_data(given, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "zh.jsonl").touch()
    before = [run_key(run.config) for run in plan_sweep("sft", [RATIO], [*given[:1], f"data.sources.zh.path={folder}",
                                                                        *given[2:]]).runs]
    (folder / ".#zh.jsonl").symlink_to("user@host.123")
    assert before == [run_key(run.config) for run in plan_sweep("sft", [RATIO], [
        *given[:1], f"data.sources.zh.path={folder}", *given[2:]]).runs]


@pytest.mark.parametrize(("overrides", "messages"), [
    (["vary.optimizer.lr=1e-4,x", "vary.optimiser.b1=0.5", "data.held_out=2"],
     ["optimizer.lr=x (command line): needs float", "did you mean optimizer.b1?", "data.held_out=2", "must be < 1"]),
    (["vary.seed=1,2", "vary.seed=3"], ["vary.seed: given twice"]),
    (["vary.seed=1,1"], ["a value stands there twice"]), (["vary.seed="], ["needs values"]),
    (["vary.seed=1,2", "seed=3"], ["vary.seed: seed is given too"]),
    (["vary.run.dir=a,b"], ["its own directory below run.dir"]),
    (["vary.optimizer.lr=1e-4,0.0001"], ["lr=0.0001 is the same run as lr=1e-4"]),
    (["init=nowhere@3", "data.sources.en.path=none.jsonl"], ["init=nowhere@3: does not exist",
                                                           "data.sources.en.path=none.jsonl: does not exist"]),
])
def test_all_that_is_wrong_is_said_at_once(given, overrides, messages):
    with pytest.raises(UserError) as error:
        plan_sweep("sft", [RATIO], [*given, *overrides])
    for message in messages:
        assert str(error.value).count(message) == 1, str(error.value)


def test_no_config_is_none(given):
    with pytest.raises(UserError, match="sweep sft needs a config"):
        plan_sweep("sft", [], given)


def test_errors_of_the_command_come_before_jax():
    code = ("import sys\nfrom ctllm_jax.cli import main\n"
            "status = main(['sweep', 'sft', 'quickstart/sft_ratio', 'ct_llm_2b/sft_1_1', 'vary.optimizer.lr=x,1e-4',"
            " 'init=nowhere'])\nassert 'jax' not in sys.modules\nsys.exit(status)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY)
    assert done.returncode == 2 and "optimizer.lr=x" in done.stderr and "init=nowhere" in done.stderr, done.stderr
