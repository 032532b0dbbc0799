"""Examples before a question: as many as lm-eval can draw, and a clear refusal of more."""

import pytest

pytest.importorskip("lm_eval")

from ctllm_jax.config.errors import UserError  # noqa: E402
from ctllm_jax.evaluation.tasks import open_tasks  # noqa: E402
from tests.evaluation import official_files as files  # noqa: E402


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    files.write_cmmlu(folder / "cmmlu_v1_0_1.zip")
    files.write_mbpp(folder / "mbpp.jsonl")
    return folder


@pytest.mark.parametrize("name", ["cmmlu_arts", "mbpp"])
def test_as_many_examples_are_accepted_as_lm_eval_can_draw(data, name):
    def draw(number):
        """Whether lm-eval's own sampler finds that many examples for every question."""
        task, = open_tasks([name], data=data, cache=data / "cache", num_fewshot=0)["tasks"].values()
        task.set_fewshot_seed(seed=1)
        try:
            for doc in task.eval_docs:
                task.sampler.sample(number, eval_doc=doc if task.fewshot_cfg.split == task.config.test_split else None)
        except (AssertionError, ValueError):
            return False
        return True

    most = max(number for number in range(12) if draw(number))
    assert most > 0
    open_tasks([name], data=data, cache=data / "cache", num_fewshot=most)
    with pytest.raises(UserError, match=f"{name} has {most}; give at most {most}"):
        open_tasks([name], data=data, cache=data / "cache", num_fewshot=most + 1)
