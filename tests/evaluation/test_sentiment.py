"""The verdict's parts: intervals against SciPy, figures against counts by hand, rewards against a full forward."""

import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ctllm_jax.config.errors import UserError
from ctllm_jax.config.load import load
from ctllm_jax.config.pretrain import PretrainConfig
from ctllm_jax.config.sft import TemplateConfig
from ctllm_jax.data.templates import open_template
from ctllm_jax.data.tokenizer import load_tokenizer
from ctllm_jax.evaluation import sentiment
from ctllm_jax.evaluation.sentiment import Answer, Judge
from ctllm_jax.inference.model import Model
from ctllm_jax.model.decoder import Decoder, head_weights, init_params
from tests.small_text import VOCABULARY, make_corpus

PAIRS = [("今天，", "我们去公园散步。", "天气。"), ("公园", "不错，不错", "今天今天今天今天"), ("我们", "散步", "去")]


@pytest.mark.parametrize(("hits", "count"), [(0, 1), (1, 1), (0, 300), (300, 300), (1, 300), (150, 300), (258, 300),
                                             (3, 7)])
def test_intervals_are_scipys(hits, count):
    stats = pytest.importorskip("scipy.stats")
    theirs = stats.binomtest(hits, count).proportion_ci(confidence_level=0.95, method="wilson")
    assert sentiment.wilson_interval(hits, count) == pytest.approx(tuple(theirs), abs=1e-12)


@pytest.mark.parametrize(("hits", "count"), [(0, 0), (2, 1), (-1, 1)])
def test_what_is_no_share_is_refused(hits, count):
    with pytest.raises(ValueError, match=f"{hits} of {count}"):
        sentiment.wilson_interval(hits, count)


def test_figures_of_answers_by_hand():
    answers = [Answer("很好", True), Answer("很好", True), Answer("很好吃", False), Answer("", True)]
    figures = sentiment.describe_answers(answers, [True, True, True, False], known={"很好"})
    assert figures["positive"]["share"] == 0.75 and figures["positive"]["count"] == 4
    assert figures["positive"]["interval"] == list(sentiment.wilson_interval(3, 4))
    # Pairs of characters: 很好 three times, 好吃 once.
    assert {key: value for key, value in figures.items() if key != "positive"} == {
        "distinct": 0.75, "commonest": 0.5, "distinct_bigrams": 0.5, "characters": 7 / 4, "ended": 0.75, "copied": 0.5}


def test_one_sentence_over_and_over_is_seen():
    figures = sentiment.describe_answers([Answer("非常满意。", True)] * 100, [True] * 100)
    assert (figures["distinct"], figures["commonest"], figures["distinct_bigrams"]) == (0.01, 1, 0.01)


def test_calibration_counts_each_label_apart():
    judge = Judge("first character", lambda text: text.startswith("好"))
    found = sentiment.calibrate(judge, [("好", True), ("坏", True), ("坏", False), ("坏了", False), ("好坏", False)])
    assert found["agreement"]["share"] == 3 / 5
    assert found["of_positive"]["share"] == 1 / 2 and found["of_negative"]["share"] == pytest.approx(1 / 3)


def test_the_judge_is_snownlps_classifier_and_a_blank_text_is_not_positive():
    snownlp = pytest.importorskip("snownlp")
    judge = sentiment.open_judge()
    assert judge.name.startswith("snownlp 0.")
    for text in ("房间很干净，服务非常好，很满意，下次还会再来。", "太差了，非常失望，再也不会来了，强烈不推荐。"):
        assert judge.is_positive(text) is (snownlp.SnowNLP(text).sentiments > 0.5)
    assert judge.is_positive("房间很干净，服务非常好，很满意，下次还会再来。")
    assert not judge.is_positive("太差了，非常失望，再也不会来了，强烈不推荐。")
    assert not judge.is_positive("") and not judge.is_positive(" \n")


def test_without_snownlp_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "snownlp", None)
    with pytest.raises(UserError, match=r"snownlp is not installed: run pip install -e '\.\[quickstart\]'"):
        sentiment.open_judge()


def test_nothing_of_snownlp_is_imported_before_it_is_asked():
    import subprocess

    shown = subprocess.run([sys.executable, "-c", "import sys, ctllm_jax.evaluation.sentiment; "
                            "print('snownlp' in sys.modules)"], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "False"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Two models of different weights, with one tokenizer and template."""
    path = make_corpus(tmp_path_factory.mktemp("corpus")).tokenizer
    tokenizer = load_tokenizer(path)
    config = load(PretrainConfig, target="debug/pretrain",
                  overrides=[f"model.vocab_size={VOCABULARY}", "model.init_std=0.2"]).model
    template = open_template(TemplateConfig(kind="plain"), tokenizer)
    return [Model(Decoder(config, dtype=jnp.float32), init_params(config, jax.random.key(seed)), tokenizer, None,
                  tokenizer.eos_id, path.parent, 1, template) for seed in (0, 1)]


def logp_of(model, prompt, answer):
    """log p of an answer by a forward pass of its own, unpadded, and numpy's softmax."""
    start = model.template.prompt_ids([sentiment.Message("user", prompt)])
    dialogue = [sentiment.Message("user", prompt), sentiment.Message("assistant", answer)]
    rendered = model.template.render(dialogue)
    assert rendered.ids[:len(start)].tolist() == start
    hidden_1SD, _ = model.decoder.apply({"params": model.params}, rendered.ids[None])
    logits_SV = np.asarray(hidden_1SD[0] @ head_weights(model.params), np.float64)[:, :VOCABULARY]
    logps_SV = logits_SV - np.log(np.exp(logits_SV).sum(axis=1, keepdims=True))
    learned = np.flatnonzero(rendered.weights)
    return sum(logps_SV[place - 1, rendered.ids[place]] for place in learned)


def test_rewards_are_those_of_a_forward_pass_for_each_answer(models, monkeypatch):
    monkeypatch.setattr(sentiment, "ROWS", 4)  # the six answers take two batches
    gains = []
    for model in models:
        logps = sentiment.answer_logps(model, PAIRS)
        wanted = [logp_of(model, prompt, answer) for prompt, *answers in PAIRS for answer in answers]
        np.testing.assert_allclose(logps, wanted, rtol=1e-5)
        gains.append(np.asarray(wanted))
    gain = (gains[0] - gains[1]).reshape(-1, 2)
    accuracy = sentiment.reward_accuracy(*models, PAIRS)
    assert accuracy["share"] == np.mean(gain[:, 0] > gain[:, 1]) and accuracy["count"] == 3
    turned = sentiment.reward_accuracy(*models, [(prompt, second, first) for prompt, first, second in PAIRS])
    assert turned["share"] == pytest.approx(1 - accuracy["share"])


def test_answers_depend_on_seed_and_prompt_and_end_at_the_stop_id(models, monkeypatch):
    options = {"max_tokens": 8, "temperature": 1.0, "top_p": 1.0}
    prompts = ["今天", "公园", "今天"]
    answers = sentiment.write_answers(models[0], prompts, seed=3, **options)
    assert answers == sentiment.write_answers(models[0], prompts, seed=3, **options)
    assert answers != sentiment.write_answers(models[0], prompts, seed=4, **options)
    assert answers[0] != answers[2], "the same draws for each place"
    monkeypatch.setattr(sentiment, "ROWS", 2)
    parts = sentiment.write_answers(models[0], prompts, seed=3, **options)
    assert parts[:2] == answers[:2] and len(parts) == 3 and parts[2] != parts[0]


def test_an_answer_that_ends_by_itself_is_told_from_one_that_is_cut(models, monkeypatch):
    monkeypatch.setattr(sentiment, "generate", lambda decoder, params, prompts, **options: [[7] * 3, [7] * 8])
    model = SimpleNamespace(**vars(models[0]), stop_ids=())
    answers = sentiment.write_answers(model, ["今天", "公园"], seed=0, max_tokens=8, temperature=1.0, top_p=1.0)
    assert [answer.ended for answer in answers] == [True, False]
