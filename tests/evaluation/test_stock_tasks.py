"""Every stock task of the paper's suite is asked and scored from a folder of rows, with the network shut."""

import socket

import pytest

lm_eval = pytest.importorskip("lm_eval")

from ctllm_jax.config.evaluate_data import read_suite  # noqa: E402
from ctllm_jax.evaluation.archives import OFFICIAL, write_parquet  # noqa: E402
from ctllm_jax.evaluation.tasks import Catalog, open_tasks  # noqa: E402
from tests.evaluation.official_files import Model  # noqa: E402

CHOICES = {"text": ["red", "blue", "green", "grey"], "label": ["A", "B", "C", "D"]}
# task -> (a row as the hub has it, what a model says that knows the answer).
ROWS = {
    "boolq": ({"passage": "Snow is cold.", "question": "is snow cold", "label": 1}, "yes"),
    "cb": ({"premise": "It snows.", "hypothesis": "It is warm", "label": 1}, ["True", "False", "Neither"]),
    "copa": ({"premise": "It snowed.", "choice1": "I froze.", "choice2": "I swam.", "question": "effect", "label": 0},
             "i froze."),
    "sglue_rte": ({"premise": "It snows.", "hypothesis": "It is cold", "label": 0}, "True"),
    # lm-eval 0.4.13 lists yes before no, and so takes "no" for what SuperGLUE labels 1, true.
    "multirc": ({"paragraph": "It snows.", "question": "What falls?", "answer": "snow", "label": 1,
                 "idx": {"paragraph": 0, "question": 0, "answer": 0}}, "snow\nIs the answer correct? no"),
    "wic": ({"sentence1": "A bank.", "sentence2": "The bank.", "word": "bank", "start1": 2, "end1": 6,
             "start2": 4, "end2": 8, "label": 1}, "yes"),
    "piqa": ({"goal": "To melt snow", "sol1": "heat it", "sol2": "cool it", "label": 0}, "heat it"),
    "social_iqa": ({"context": "Li skied.", "question": "Why?", "answerA": "fun", "answerB": "duty", "answerC": "no",
                    "label": "1"}, "fun"),
    "hellaswag": ({"ctx_a": "A man", "ctx_b": "he", "ctx": "A man he", "activity_label": "Ski", "label": "2",
                   "endings": ["eats.", "sings.", "skis.", "sits."]}, "skis."),
    "winogrande": ({"sentence": "Li beat Wu since _ trained.", "option1": "Li", "option2": "Wu", "answer": "1"},
                   "trained."),
    "arc_easy": ({"question": "Sky?", "choices": CHOICES, "answerKey": "B"}, "blue"),
    "arc_challenge": ({"question": "Sky?", "choices": CHOICES, "answerKey": "B"}, "blue"),
    "openbookqa": ({"question_stem": "Sky is", "choices": CHOICES, "answerKey": "B"}, "blue"),
    "commonsense_qa": ({"question": "Sky?", "answerKey": "B", "choices": {
        "text": [*CHOICES["text"], "x"], "label": [*CHOICES["label"], "E"]}}, "B"),
    "nq_open": ({"question": "color of the sky", "answer": ["Blue", "azure"]}, "blue\n"),
    "triviaqa": ({"question": "Sky?", "answer": {"aliases": ["Blue", "Azure"], "value": "Blue"}}, "azure"),
    "lambada_openai": ({"text": "the sky is blue"}, "blue"),
    "gsm8k": ({"question": "1+1?", "answer": "Add. #### 2"}, "It is 2."),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder, catalog = tmp_path_factory.mktemp("stock"), Catalog()
    for name, (row, _) in ROWS.items():
        leaf, = catalog.leaves(name)
        for split in ("train", "validation", "test"):
            # Each row another, for lambada draws its examples among its questions; each class of CB, which has an F1.
            rows = [{**row, "row": number, **({"label": number % 3} if name == "cb" else {})} for number in range(9)]
            write_parquet(folder / leaf.dataset / (leaf.configuration or "default") / f"{split}.parquet", rows)
    return folder


def test_all_of_the_suite_is_here_or_official(data):
    catalog = Catalog()
    official = {one.dataset for one in OFFICIAL}
    rest = {leaf.name for task in read_suite("eval/paper").tasks for leaf in catalog.leaves(task)
            if leaf.dataset not in official}
    assert rest == {*ROWS, "squadv2"}


@pytest.mark.parametrize("shots", [0, 2])
def test_knowing_scores_one(data, tmp_path, shots, monkeypatch):
    def refuse(*args):
        raise AssertionError("asked the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    model = Model(logp=lambda request: 0.0 if request.args[1].strip() == right(request) else -9.0, text=right)
    opened = open_tasks(list(ROWS), data=data, num_fewshot=shots, cache=tmp_path)
    results = lm_eval.evaluate(model, task_dict=opened, bootstrap_iters=0)["results"]
    suite = read_suite("eval/paper")
    metric = {one.task: one.metric for one in suite.benchmarks.values()}
    assert {name: results[name][metric[name]] for name in ROWS if name != "lambada_openai"} == {
        name: 1 for name in ROWS if name != "lambada_openai"}
    assert results["lambada_openai"]["perplexity,none"] == 1
    assert all(task.get_config("num_fewshot") == shots for task in opened["tasks"].values())
    if shots:
        return
    wrong = lm_eval.evaluate(Model(logp=lambda request: 0.0 if request.args[1].strip() != right(request) else -9.0),
                             task_dict=open_tasks(list(ROWS), data=data, cache=tmp_path), bootstrap_iters=0)["results"]
    assert {name: wrong[name][metric[name]] for name in ROWS} == dict.fromkeys(ROWS, 0)


def right(request):
    if request.task_name == "winogrande" and not request.args[0].endswith("Li"):
        return ""  # the contexts differ there, not the continuations
    answer = ROWS[request.task_name][1]
    return answer if isinstance(answer, str) else answer[request.doc["label"]]
