"""Bits per byte of held-out text: by hand, of text and of datasets, of runs and of what is none."""

import json
import math

import numpy as np
import pytest

pytest.importorskip("lm_eval")

from ctllm_jax.config.statuses import WRONG_INPUT  # noqa: E402
from ctllm_jax.evaluation.held_out import _draw, measure_text  # noqa: E402
from ctllm_jax.evaluation.scoring import Scorer  # noqa: E402
from ctllm_jax.inference.model import load_model  # noqa: E402
from tests.cli.conftest import call  # noqa: E402
from tests.inference.models import full_logps  # noqa: E402

TEXTS = ["the river reads", "今天 river ε 😀", "a" * 150, "the the the"]


@pytest.fixture(scope="module")
def model(text_run):
    return load_model(str(text_run.directory))


def by_hand(model, texts, prefix_id, window):
    """(nats, bytes) of each text: a plain pass for each of its windows."""
    paid = []
    for text in texts:
        tokens, nats = [*model.tokenizer.encode(text), model.stop_id], 0.0
        for start in range(0, len(tokens), window):
            piece = tokens[start:start + window]
            row = [prefix_id if start == 0 else tokens[start - 1], *piece]
            logps = full_logps((model.decoder, model.params), row[:-1])
            nats -= sum(float(logps[place, token]) for place, token in enumerate(piece))
        paid.append((nats, len(text.encode())))
    return paid


def test_text_is_paid_for_document_by_document(model):
    window = model.decoder.config.context_length
    figures = measure_text(Scorer(model), model, iter(TEXTS), prefix_id=model.stop_id, max_tokens=10**6)
    paid = by_hand(model, TEXTS, model.stop_id, window)
    assert max(len(model.tokenizer.encode(text)) for text in TEXTS) > window  # one of them takes several windows
    bits = np.array([nats / math.log(2) for nats, _ in paid])
    size = np.array([length for _, length in paid])
    ratio = bits.sum() / size.sum()
    assert figures["bits_per_byte"] == pytest.approx(ratio, rel=1e-5)
    assert (figures["bytes"], figures["documents"]) == (size.sum(), 4)
    assert figures["tokens"] == sum(len(model.tokenizer.encode(text)) + 1 for text in TEXTS)
    assert figures["loss"] == pytest.approx(sum(nats for nats, _ in paid) / figures["tokens"], rel=1e-5)


def test_the_interval_is_that_of_the_jackknife(model):
    # Which knows nothing of the formula: the figure again, without one document after the other.
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(["the", "river", "reads", "今天", "a", "stone"], int(rng.integers(5, 10))))
             for _ in range(40)]
    scorer = Scorer(model)

    def measured(some):
        return measure_text(scorer, model, some, prefix_id=model.stop_id, max_tokens=10**6)

    alone = [measured([text]) for text in texts]
    bits = np.array([each["bits_per_byte"] * each["bytes"] for each in alone])
    size = np.array([each["bytes"] for each in alone])
    left_out = (bits.sum() - bits) / (size.sum() - size)
    jackknife = math.sqrt(39 / 40 * ((left_out - left_out.mean()) ** 2).sum())
    figures = measured(texts)
    assert figures["bits_per_byte"] == pytest.approx(bits.sum() / size.sum(), rel=1e-5)
    assert figures["error"] == pytest.approx(jackknife, rel=0.05)
    assert alone[0]["error"] is None


def test_no_more_than_the_tokens_asked_for(model, monkeypatch):
    monkeypatch.setattr("ctllm_jax.evaluation.held_out._AT_ONCE", 1)
    figures = measure_text(Scorer(model), model, ["the river"] * 50, prefix_id=model.stop_id, max_tokens=20)
    assert 20 <= figures["tokens"] < 40 and figures["of_documents"] == 50


@pytest.mark.parametrize("bytes_a_token", [16, 1 / 8])
def test_documents_are_drawn_wherever_they_stand(model, monkeypatch, bytes_a_token):
    """The first file of a folder is no sample of it, and memory need not hold all."""
    monkeypatch.setattr("ctllm_jax.evaluation.held_out._BYTES_A_TOKEN", bytes_a_token)
    texts = [f"{'river' if number < 200 else 'stone'} {number}" for number in range(400)]
    drawn, count = _draw(iter(["", *texts]), model.tokenizer, 400)
    assert count == 400 and drawn == sorted(drawn, key=texts.index) and len(set(drawn)) == len(drawn) < 200
    assert set(drawn) == set(_draw(iter(texts[::-1]), model.tokenizer, 400)[0])
    assert 0.3 < sum(text.startswith("river") for text in drawn) / len(drawn) < 0.7
    assert _draw(iter(texts[:20]), model.tokenizer, 10**6) == (texts[:20], 20)


def test_text_and_a_dataset_of_a_run_in_one_command(text_run, corpus, tmp_path):
    (tmp_path / "some.jsonl").write_text("".join(json.dumps({"content": text}) + "\n" for text in TEXTS))
    (tmp_path / "one.txt").write_text(TEXTS[0])
    printed = call("evaluate", text_run.directory, "tasks=bits_per_byte", f"output={tmp_path / 'out'}",
                   f"held_out.sources.json={tmp_path / 'some.jsonl'}", "held_out.sources.json.text_field=content",
                   f"held_out.sources.text={tmp_path / 'one.txt'}", f"held_out.sources.zh={corpus.folder / 'zh'}")
    assert printed.status == 0, printed.err
    found = json.loads((tmp_path / "out" / "bits_per_byte.json").read_text())["ctllm_jax"]["held_out"]
    assert list(found) == ["json", "text", "zh"] and "±" in printed.out
    assert [found[name].get("documents") for name in found] == [4, 1, None]
    # The dataset as the run's training evaluated it.
    told = [json.loads(line) for line in (text_run.directory / "metrics.jsonl").read_text().splitlines()]
    last = [record for record in told if record["event"] == "evaluation"][-1]["sources"]["zh"]
    assert found["zh"]["bits_per_byte"] == pytest.approx(last["bits_per_byte"], rel=1e-5)
    table = call("tables", tmp_path / "out", "rows=measured")
    assert "bits per byte · json" in table.out and "[" in table.out.split("bits per byte · json")[1].split("\n")[0]


@pytest.mark.parametrize(("words", "message"), [
    (["held_out.sources.zh=nowhere.jsonl"], "held_out.sources.zh=nowhere.jsonl does not exist"),
    (["held_out.split=some"], "has no split 'some'")])
def test_what_cannot_be_measured_is_told(words, message, text_run, tmp_path):
    printed = call("evaluate", text_run.directory, "tasks=bits_per_byte", f"output={tmp_path}", *words)
    assert printed.status == WRONG_INPUT and message in printed.err


def test_a_tuned_model_has_no_text_of_its_own(tuned, tmp_path):
    printed = call("evaluate", tuned, "tasks=bits_per_byte", f"output={tmp_path}")
    assert printed.status == WRONG_INPUT and "give held_out.sources.NAME=PATH" in printed.err
