"""Pairs are packed whole, both answers in one row, once an epoch, the same for any number of processes."""

import itertools
import json

import numpy as np
import pytest

from ctllm_jax.config.dpo import PairDataConfig
from ctllm_jax.config.errors import UserError
from ctllm_jax.config.sft import TemplateConfig
from ctllm_jax.data.chat import open_template
from ctllm_jax.data.preference import PreferenceData
from ctllm_jax.data.tokenizer import load_tokenizer

S, CONTEXT, ROWS = 192, 90, 3


@pytest.fixture(scope="module")
def write(tmp_path_factory):
    """(rows of (prompt, chosen, rejected)) -> a file of them."""
    def write(rows):
        path = tmp_path_factory.mktemp("pairs") / "rows.jsonl"
        path.write_text("".join(json.dumps(dict(zip(("prompt", "chosen", "rejected"), row, strict=True)),
                                           ensure_ascii=False) + "\n" for row in rows))
        return str(path)

    return write


@pytest.fixture(scope="module")
def load(tokenizer_path, make_texts, write):
    """Changes of the config -> the data: 30 Chinese pairs in two sources, 20 English ones."""
    texts = iter([text[:20] for text in make_texts(200)])
    sources = {name: {"path": write([(next(texts), next(texts), next(texts)) for _ in range(count)]), "group": group}
               for name, count, group in (("a", 10, "zh"), ("b", 20, "zh"), ("c", 20, "en"))}

    def load(*, rows=ROWS, seed=5, sequence_length=S, context_length=CONTEXT, vocab_size=352, **changes):
        tokenizer = load_tokenizer(tokenizer_path)
        return PreferenceData(PairDataConfig(**{"sources": sources, **changes}), tokenizer=tokenizer,
                              template=open_template(TemplateConfig(kind="plain"), tokenizer), rows=rows, seed=seed,
                              sequence_length=sequence_length, context_length=context_length, vocab_size=vocab_size)

    return load


@pytest.fixture(scope="module")
def data(load):
    data = load()
    data.reference_logps = -np.arange(1, 2 * len(data) + 1, dtype=np.float32)
    return data


def answers_of(data, row):
    """The segments of a row, each as (answer number by its reference, pair id, is chosen)."""
    segments = int(row.segment_ids.max())
    known = row.preference
    assert not known.pair_ids[segments:].any() and not known.reference_logps[segments:].any()
    found = []
    for segment in range(segments):
        answer = int(-known.reference_logps[segment]) - 1
        first, last = data.answers.offsets[answer:answer + 2]
        here = np.flatnonzero(row.segment_ids == segment + 1)
        assert np.array_equal(row.tokens[here], data.answers.ids[first:last])
        assert np.array_equal(row.loss_weights[here[:-1]], data.answers.weights[first + 1:last])
        assert known.is_chosen[segment] == (answer % 2 == 0)
        assert data.group_names[known.group[segment]] == ("zh" if data.answers.sources[answer] < 2 else "en")
        found.append((answer, int(known.pair_ids[segment])))
    return found


@pytest.mark.parametrize("epoch", [0, 1, 4])
def test_an_epoch_holds_every_pair_once_in_one_row(data, epoch):
    first = epoch * data.steps_per_epoch
    rows = [data.row(step, row) for step in range(first, first + data.steps_per_epoch) for row in range(ROWS)]
    seen = []
    for row in rows:
        found = answers_of(data, row)
        pairs = {}
        for answer, pair_id in found:
            pairs.setdefault(pair_id, []).append(answer)
        assert all(both[0] // 2 == both[1] // 2 and len(both) == 2 for both in pairs.values()) and 0 not in pairs
        seen += [answer for answer, _ in found]
    assert sorted(seen) == list(range(2 * len(data)))
    assert rows[0].preference.pair_ids.shape == (data.num_segments,) and data.num_segments % 2 == 0
    assert max(int(row.segment_ids.max()) for row in rows) == data.num_segments
    assert data.steps == 2 * data.steps_per_epoch and data.steps_per_epoch == -(-data.rows_per_epoch // ROWS)
    assert data.epochs(data.steps) == {"a": 2, "b": 2, "c": 2}


def test_rows_are_a_function_of_seed_and_step(load, data):
    def arrays(data, step, rows):
        batch = next(data.iterate(step, local_rows=rows))
        return [*batch[:5], *batch.preference[:3]]

    whole = arrays(data, 7, range(ROWS))
    parts = [arrays(load(), 7, [2]), arrays(data, 7, [1, 0])]
    for mine, last, others in zip(whole, *parts, strict=True):
        assert np.array_equal(mine, np.stack([others[1], others[0], last[0]]))
    late = list(itertools.islice(data.iterate(0, local_rows=range(ROWS)), 8))[7]
    assert np.array_equal(late.tokens, whole[0])
    assert not np.array_equal(arrays(load(seed=6), 7, range(ROWS))[0], whole[0])


def test_a_step_of_as_many_pairs_as_rows(load):
    data = load(pairs_per_row=1)
    assert data.num_segments == 2 and data.rows_per_epoch == len(data)
    assert all(data.row(0, row).segment_ids.max() == 2 for row in range(ROWS))
    assert load().num_segments > 2


WORDS = "今天天气不错。"


@pytest.mark.parametrize(("policy", "expected"), [
    ("drop", {"over_length": 2, "cut": 0, "pairs": 1}), ("truncate", {"over_length": 0, "cut": 2, "pairs": 3})])
def test_what_is_too_long_is_counted(load, write, caplog, policy, expected):
    path = write([("问", WORDS, WORDS * 2), ("问", WORDS, WORDS * 30), ("问", WORDS * 30 + "我", "我" + WORDS * 31),
                  (WORDS * 20, "我", "我们")])
    data = load(sources={"x": {"path": path}}, over_length=policy, sequence_length=64, context_length=64)
    report = data.report["sources"]["x"]
    assert {name: report[name] for name in expected} == expected and report["over_length_prompt"] == 1
    assert "leave no room for answers" in caplog.text and "2 of 4 pairs are" in caplog.text
    lengths = data.answers.lengths.reshape(-1, 2)
    assert (lengths.sum(axis=1) <= 64).all()
    # What the shorter answer leaves is the longer one's.
    assert lengths.max() > 32 if policy == "truncate" else lengths.max() <= 32


def test_unequal_texts_of_equal_ids_are_counted(load, write):
    """Cut to one length, the answers begin alike."""
    path = write([("问", WORDS * 30 + "我", WORDS * 30 + "去"), ("问", "今天", "天气")])
    report = load(sources={"x": {"path": path}}, over_length="truncate", sequence_length=64).report["sources"]["x"]
    assert report["equal_ids"] == 1 and report["pairs"] == 1


def test_a_context_shorter_than_the_row_bounds_each_answer(load, write):
    path = write([("问", WORDS * 30, "天气")])
    data = load(sources={"x": {"path": path}}, over_length="truncate", sequence_length=96, context_length=40)
    assert data.answers.lengths.max() == 40


@pytest.mark.parametrize(("changes", "message"), [
    ({"over_length": "raise", "sequence_length": 20}, r"rows.jsonl:\d+: \d+ and \d+ tokens, prompts included, do not"),
    ({"sequence_length": 6}, "no pair is left to train on with sequence_length=6"),
    ({"vocab_size": 100}, "model.vocab_size=100 must be at least"),
    ({"sources": {"x": {"path": "missing.jsonl"}}}, "data.sources.x: missing.jsonl does not exist"),
])
def test_what_does_not_fit_is_refused(load, changes, message):
    with pytest.raises(UserError, match=message):
        load(**changes)
