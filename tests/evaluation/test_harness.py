"""A model of ours beside lm-eval's own Hugging Face model on the same folder, and what of it goes on after a kill."""

import json
from types import SimpleNamespace

import pytest

pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance  # noqa: E402

from ctllm_jax.config.errors import UserError  # noqa: E402
from ctllm_jax.data.chat import Message  # noqa: E402
from ctllm_jax.evaluation import results  # noqa: E402
from ctllm_jax.evaluation.answer_store import AnswerStore  # noqa: E402
from ctllm_jax.evaluation.evaluate import run_tasks  # noqa: E402
from ctllm_jax.evaluation.harness import HarnessModel, find_prefix, identify  # noqa: E402
from ctllm_jax.inference.model import load_model  # noqa: E402
from tests.cli.conftest import call  # noqa: E402
from tests.huggingface.folders import make_folder  # noqa: E402
from tests.small_text import VOCABULARY, make_corpus  # noqa: E402

pytestmark = pytest.mark.parity
LENGTH = 96
CONTEXT = "今天 the model reads text and writes. 我们去公园散步。 "
PAIRS = [
    *((CONTEXT + "the naïve model", f" {choice}") for choice in "ABCD"),
    *((CONTEXT + "天气", choice) for choice in ("不错。", "不错，我们去公园", " writes 42")),
    ("the model ", "reads"), ("the model  ", " reads text"), ("今天\n", "天气"),
    ("", "今天天气不错"), ("", " reads"),
    (CONTEXT * 7, "散步"), (CONTEXT * 7, "散步 and text. " * 3), (CONTEXT * 7 + "42", " 42"),
]
DOCUMENTS = ["", "今天", CONTEXT, CONTEXT * 14, "the model reads text 😀 龘" * 12]
TEXTS = [(CONTEXT, {"until": ["\n\n"], "max_gen_toks": 12}), ("今天", {"until": "。", "max_new_tokens": 9}),
         (CONTEXT * 7, {"until": [], "max_gen_toks": 5, "do_sample": False, "temperature": 0.7}),
         ("the model", {"until": ["e", "42"], "max_gen_toks": 12, "temperature": 0.0})]


def as_requests(kind, arguments):
    return [Instance(kind, {}, args if isinstance(args, tuple) else (args,), place, ("test", place, 1))
            for place, args in enumerate(arguments)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A byte-level tokenizer without BOS, and a chat template."""
    path = tmp_path_factory.mktemp("hf")
    make_folder(path, "llama")
    return path


@pytest.fixture(scope="module")
def model(folder):
    return load_model(str(folder))


@pytest.fixture(scope="module")
def lm(model):
    return HarnessModel(model, max_length=LENGTH, batch_tokens=1024)


def open_theirs(folder, prefix):
    from lm_eval.models.huggingface import HFLM

    return HFLM(str(folder), device="cpu", dtype="float32", batch_size=4, max_length=LENGTH, prefix_token_id=prefix)


@pytest.fixture(scope="module")
def theirs(folder, lm):
    return open_theirs(folder, lm.prefix_token_id)


@pytest.fixture
def questions():
    """Tasks of each kind over a few rows, in a group."""
    import datasets
    from lm_eval.api.group import Group
    from lm_eval.tasks import TaskManager

    rows = [{"question": f"{CONTEXT[:20 + place]}？", "choices": ["不错", "散步。", " reads", "the model"],
             "label": place % 4, "text": "今天天气不错。 the model reads." * (1 + place)} for place in range(9)]
    common = {"custom_dataset": lambda **_: {"test": datasets.Dataset.from_list(rows)}, "test_split": "test",
              "fewshot_split": "test", "fewshot_config": {"sampler": "first_n"}, "num_fewshot": 2}
    choice = {"output_type": "multiple_choice", "doc_to_text": "{{question}}\n答案：", "doc_to_choice": "{{choices}}",
              "doc_to_target": "label", "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}]}
    tasks = [{"task": "choices", **choice}, {"task": "more_choices", **choice, "doc_to_text": "{{question}}"},
             {"task": "perplexity", "output_type": "loglikelihood_rolling", "doc_to_text": "", "num_fewshot": 0,
              "doc_to_target": "{{text}}", "metric_list": [{"metric": "bits_per_byte"}]},
             {"task": "texts", "output_type": "generate_until", "doc_to_text": "{{question}}", "num_fewshot": 0,
              "doc_to_target": "不", "generation_kwargs": {"until": ["\n"], "max_gen_toks": 6},
              "metric_list": [{"metric": "exact_match"}]}]
    group = {"group": "all_choices", "task": ["choices", "more_choices"],
             "aggregate_metric_list": [{"metric": "acc", "weight_by_size": True}]}

    def opened():
        loaded = TaskManager(include_defaults=False).load([{**common, **task} for task in tasks])
        whole = Group.from_config(group)
        for name in group["task"]:
            whole.add(loaded["tasks"][name])
        for task in loaded["tasks"].values():
            task.set_fewshot_seed(seed=1)
        return {"tasks": loaded["tasks"], "groups": {"all_choices": whole},
                "group_map": {"all_choices": whole.child_names}}

    return opened


def test_log_likelihoods_are_those_of_lm_evals_own_model(lm, theirs):
    requests = as_requests("loglikelihood", PAIRS)
    assert max(len(lm.tok_encode(context)) for context, _ in PAIRS) > LENGTH
    assert lm.loglikelihood(requests) == [
        (pytest.approx(logp, abs=1e-4, rel=1e-6), greedy) for logp, greedy in theirs.loglikelihood(requests)]


def test_a_blank_context_is_none(lm):
    assert lm.encode_pairs([(" ", "reads")]) == lm.encode_pairs([("", " reads")])


def test_documents_in_windows_cost_what_they_cost_there(lm, theirs):
    requests = as_requests("loglikelihood_rolling", DOCUMENTS[1:])
    assert max(len(lm.tok_encode(text)) for text in DOCUMENTS) > 2 * LENGTH
    assert lm.loglikelihood_rolling(requests) == pytest.approx(theirs.loglikelihood_rolling(requests), abs=1e-4,
                                                               rel=1e-6)
    assert lm.loglikelihood_rolling(as_requests("loglikelihood_rolling", [""])) == [0.0]


def test_texts_are_those_of_lm_evals_own_model(lm, theirs):
    requests = as_requests("generate_until", TEXTS)
    ours = lm.generate_until(requests)
    assert ours == theirs.generate_until(requests)
    assert len(set(ours)) > 2 and "。" not in ours[1] and "e" not in ours[3]


def test_a_bos_stands_before_every_context_where_the_tokenizer_puts_one(tmp_path):
    for name in ("corpus", "hf"):
        (tmp_path / name).mkdir()
    make_folder(tmp_path / "hf", "llama", rows=VOCABULARY, tokenizer=make_corpus(tmp_path / "corpus").tokenizer,
                settings={"add_bos_token": True})
    for words in (["import-hf", tmp_path / "hf", f"output={tmp_path / 'run'}"],
                  ["export-hf", tmp_path / "run", f"output={tmp_path / 'out'}"]):
        assert call(*words).status == 0
    model = load_model(str(tmp_path / "run"))
    ours = HarnessModel(model, max_length=LENGTH, batch_tokens=1024)
    assert find_prefix(model) == ("prefix_id of the checkpoint", model.tokenizer.bos_id)
    requests = as_requests("loglikelihood", PAIRS[:7])
    assert ours.loglikelihood(requests) == [
        (pytest.approx(logp, abs=1e-4, rel=1e-6), greedy)
        for logp, greedy in open_theirs(tmp_path / "out", model.prefix_id).loglikelihood(requests)]


def test_tasks_come_to_the_same(lm, theirs, questions):
    import lm_eval

    lm.store = AnswerStore(None, None)
    ours = run_tasks(lm, questions(), limit=4, bootstrap=0)
    other = lm_eval.evaluate(theirs, task_dict=questions(), limit=4, bootstrap_iters=0)
    assert ours["results"].keys() == other["results"].keys() == {"choices", "more_choices", "all_choices", "perplexity",
                                                                  "texts"}
    for name, entry in other["results"].items():
        assert results.metrics_of(ours["results"][name]) == pytest.approx(results.metrics_of(entry), rel=1e-5), name
    for name in ("configs", "versions", "n-shot", "higher_is_better", "n-samples", "group_subtasks", "groups"):
        assert ours[name].keys() == other[name].keys()
    own = ours[results.OURS]
    hits = round(4 * ours["results"]["choices"]["acc,none"]) + round(4 * ours["results"]["more_choices"]["acc,none"])
    assert own["intervals"]["all_choices"]["acc,none"] == dict(
        zip(("low", "high"), results.wilson_interval(hits, 8), strict=True), method="wilson", hits=hits, count=8)
    assert own["chance"] == {"choices": 0.25, "more_choices": 0.25, "all_choices": 0.25}
    assert own["prefix"] == {"id": lm.prefix_token_id, "source": "end of document", "before_every_context": False}
    assert json.loads(json.dumps(ours, default=results.to_json))["results"] == ours["results"]


class Killed(BaseException):
    pass


def test_a_kill_costs_no_answer_that_was_kept(model, tmp_path, monkeypatch):
    path, identity = tmp_path / "answers.jsonl", identify(model, max_length=LENGTH, seed=0)
    requests = as_requests("loglikelihood", [*PAIRS, PAIRS[0]])

    def ask(store):
        lm = HarnessModel(model, max_length=LENGTH, batch_tokens=128, store=store)
        return lm.loglikelihood(requests), lm.scorer.counts["requests"]

    whole, asked = ask(AnswerStore(None, identity))
    assert asked == len(PAIRS), "equal questions are asked once"
    add, kept = AnswerStore.add, []

    def killed(self, answers):
        add(self, answers)
        kept.extend(answers)
        if len(kept) > 5:
            raise Killed

    monkeypatch.setattr(AnswerStore, "add", killed)
    with pytest.raises(Killed), AnswerStore(path, identity) as store:
        ask(store)
    monkeypatch.undo()
    assert 5 < len(kept) < len(PAIRS)
    with open(path, "ab") as file:
        file.write(b'["torn')  # what a kill leaves of a line
    with AnswerStore(path, identity) as store:
        again, asked = ask(store)
    assert asked == len(PAIRS) - len(kept)
    assert again == [(pytest.approx(logp, abs=1e-4), greedy) for logp, greedy in whole]
    with AnswerStore(path, identity) as store:
        assert ask(store) == (again, 0)
    with AnswerStore(path, {**identity, "dtype": "bfloat16"}) as store:
        assert store.get(store.key("loglikelihood", *PAIRS[0])) is None


def test_a_line_that_cannot_be_read_is_asked_again(tmp_path):
    path = tmp_path / "answers.jsonl"
    with AnswerStore(path, "model") as store:
        store.add([(store.key("a", 1), [0.5, True]), (store.key("b"), "text\n")])
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"\0\0\n" + lines[1] + lines[0][:-3])
    with AnswerStore(path, "model") as store:
        assert (store.get(store.key("a", 1)), store.get(store.key("b"))) == (None, "text\n")
        store.add([(store.key("a", 1), [0.5, True])])
    with AnswerStore(path, "model") as store:
        assert store.get(store.key("a", 1)) == [0.5, True]


MESSAGES = [{"role": "user", "content": "今天 <|im_end|> naïve？"}, {"role": "assistant", "content": "不错。"},
            {"role": "user", "content": "the model"}]


def test_a_chat_prompt_is_what_was_trained(lm, theirs):
    template = lm.model.template
    text = lm.apply_chat_template(MESSAGES)
    ids = lm.tok_encode(text)
    assert ids == template.prompt_ids([Message(**each) for each in MESSAGES])
    # Typed markers are text here, and markers there.
    plain = [{**each, "content": each["content"].replace("<|im_end|>", "")} for each in MESSAGES]
    assert lm.readable(lm.apply_chat_template(plain)) == theirs.apply_chat_template(plain)
    assert lm.readable(text) == theirs.apply_chat_template(MESSAGES)
    assert lm.tok_encode(lm.apply_chat_template(plain)) == theirs.tok_encode(theirs.apply_chat_template(plain))
    context, continuation = lm.encode_pairs([(text, "不错")])[0]
    assert (context, continuation) == (ids, lm.tok_encode("不错"))
    begun = [*plain, {"role": "assistant", "content": "答案"}]
    assert (lm.tok_encode(lm.apply_chat_template(begun, add_generation_prompt=False))
            == theirs.tok_encode(theirs.apply_chat_template(begun, add_generation_prompt=False)))


def test_private_characters_of_a_question_stay_text(model, lm):
    spelled = "\ue0101 2\ue011 问题"
    bare = HarnessModel(model, max_length=LENGTH, batch_tokens=1024)
    expected = model.tokenizer.encode(spelled)
    assert bare.tok_encode(spelled) == expected and len(expected) > 10 and bare.readable(spelled) == spelled
    # Also in the middle of a chat prompt, in an answer, and where the beginning of another prompt is spelled.
    asked = [{"role": "user", "content": f"a{spelled}"}]
    text = lm.apply_chat_template(asked)
    assert lm.tok_encode(text) == lm.model.template.prompt_ids([Message(**each) for each in asked])
    assert spelled in lm.readable(text)
    assert lm.encode_pairs([(text, spelled)])[0] == (lm.tok_encode(text), lm.tok_encode(text + spelled)[
        len(lm.tok_encode(text)):])
    assert lm.tok_encode(text + spelled)[-len(expected):] == expected
    assert lm.encode_all([text], add_prefix=False)[0] == model.tokenizer.encode(text)


def test_tasks_behind_the_template_come_to_the_same(lm, theirs, questions):
    import lm_eval

    lm.store = AnswerStore(None, None)
    ours = run_tasks(lm, questions(), limit=3, chat=True, system="简短。", bootstrap=0)
    other = lm_eval.evaluate(theirs, task_dict=questions(), limit=3, bootstrap_iters=0, apply_chat_template=True,
                             fewshot_as_multiturn=True, system_instruction="简短。")
    # lm-eval counts the end of a line before the answer as the answer's; behind a template we do as in training.
    for own, row in zip(ours["samples"]["choices"], other["samples"]["choices"], strict=True):
        assert [lm.readable(context) for context, _ in own["arguments"]] == [context for context, _ in row["arguments"]]
    for own, row in zip(ours["samples"]["texts"], other["samples"]["texts"], strict=True):
        assert own["resps"] == row["resps"] and lm.readable(own["arguments"][0][0]) == row["arguments"][0][0]
    assert ours["system_instruction"] == "简短。" and ours["fewshot_as_multiturn"]
    assert ours[results.OURS]["template"] == {"kind": "jinja", "fingerprint": lm.model.template.fingerprint()}


def test_without_a_template_none_is_applied(lm):
    bare = SimpleNamespace(model=SimpleNamespace(template=None))
    with pytest.raises(UserError, match="was not taught to answer"):
        HarnessModel.apply_chat_template(bare, MESSAGES)


def test_equal_drawn_requests_get_texts_of_their_own_and_the_same_ones_again(lm):
    settings = {"do_sample": True, "temperature": 1.5, "top_p": 1.0, "max_gen_toks": 8, "until": []}
    requests = as_requests("generate_until", [("今天", settings)] * 3)
    first = lm.generate_until(requests)
    lm.store = AnswerStore(None, None)
    assert lm.generate_until(requests) == first and len(set(first)) == 3


@pytest.mark.parametrize(("settings", "message"), [
    ({"num_beams": 4}, "num_beams: beams are not searched"), ({"typical_p": 0.5}, "typical_p=0.5 is not known here"),
    ({"max_gen_toks": LENGTH}, f"asks for {LENGTH} new tokens")])
def test_settings_that_cannot_be_kept_are_refused(lm, settings, message):
    with pytest.raises(UserError, match=message):
        lm.generate_until(as_requests("generate_until", [("今天", {"until": [], **settings})]))


def test_where_no_document_has_a_beginning_it_is_said(model):
    tokenizer = SimpleNamespace(eos_id=None, bos_id=7, path="t")
    bare = SimpleNamespace(tokenizer=tokenizer, prefix_id=None, stop_id=None, run_dir="run")
    assert find_prefix(bare) == ("BOS of the tokenizer", 7)
    tokenizer.bos_id = None
    with pytest.raises(UserError, match="run: neither the checkpoint nor t has an id"):
        find_prefix(bare)
